"""Stage 4: compare the speed of TNT with timm's TNT and DeiT; measure the parts of a step and its slowest kernels.

The models of a group are measured alternately. Before that, `--warm-up` fills the cache of torch.compile in several processes,
while stages run that measure nothing.
"""

import functools
import subprocess
import sys
import time
from typing import Any, Dict, List, NamedTuple

import torch
from stage import Stage

from tnt_timm.costs.breakdown import parts, slowest_kernels
from tnt_timm.costs.throughput import Setting, make_step, speeds

# timm's TNT, ours, DeiT; timm has no TNT-Ti and no PyramidTNT
GROUPS: Dict[str, List[str]] = {
    "TNT-S": ["tnt_s_patch16_224", "tnt_s", "deit_small_patch16_224"],
    "TNT-B": ["tnt_b_patch16_224", "tnt_b", "deit_base_patch16_224"],
    "TNT-Ti": ["tnt_ti", "deit_tiny_patch16_224"],
    "PyramidTNT-S": ["pvt_v2_b2", "pyramid_tnt_s", "swin_tiny_patch4_window7_224"],  # each at its published image size
}
COMPILING_AT_ONCE = 3
REPEATS = 7


class Measurement(NamedTuple):
    """A setting in which the models of a group are compared."""

    group: str
    mode: str
    batch_size: int
    compiled: bool

    @property
    def what(self) -> str:
        how = "torch.compile" if self.compiled else "eager"
        return f"{self.group}, {self.mode}, {how}, batch {self.batch_size}"

    @property
    def expected_s(self) -> int:
        """Return the seconds that must be left to start it."""
        return 40 if self.compiled else 10

    def setting(self, device: str) -> Setting:
        dry = device == "cpu"
        dtype = "float32" if dry else "bfloat16"
        return Setting(self.mode, self.batch_size, 32 if dry else None, dtype, self.compiled, device)


def measurements(dry: bool) -> List[Measurement]:
    """Return the measurements, the most valuable ones first."""
    if dry:
        return [Measurement("TNT-S", "train", 2, False), Measurement("TNT-Ti", "infer", 2, True)]
    order = [("TNT-S", 256, False), ("TNT-B", 256, False), ("TNT-Ti", 256, False), ("TNT-S", 256, True)]
    order += [("PyramidTNT-S", 256, False), ("TNT-S", 64, False), ("TNT-Ti", 256, True), ("TNT-B", 256, True)]
    order += [
        ("TNT-B", 64, False),
        ("TNT-Ti", 64, False),
        ("TNT-S", 64, True),
        ("TNT-Ti", 64, True),
        ("TNT-B", 64, True),
    ]
    modes = ("train", "infer")
    return [Measurement(group, mode, batch_size, compiled) for group, batch_size, compiled in order for mode in modes]


def main() -> None:
    stage = Stage("speed", lambda parser: (parser.add_argument("--warm-up", action="store_true"), one_model(parser)))
    if stage.options.model:
        model, mode, batch_size = stage.options.model
        make_step(model, Measurement("", mode, int(batch_size), True).setting(stage.device))()
    elif stage.options.warm_up:
        warm_up(stage)
    else:
        measure(stage)


def one_model(parser: Any) -> None:
    parser.add_argument("--model", nargs=3, metavar=("NAME", "MODE", "BATCH"), help="compile this model and exit")


def warm_up(stage: Stage) -> None:
    """Compile each model in its own process, the most valuable ones first, until the time is over."""
    common = [arg for arg in sys.orig_argv if arg != "--warm-up"]
    # without TNT-B: three of its processes would fill the memory
    compiled = [x for x in measurements(stage.dry) if x.compiled and x.group != "TNT-B"]
    commands = [
        [*common, "--model", model, each.mode, str(each.batch_size)]
        for each in compiled
        for model in GROUPS[each.group]
    ]
    running: List[subprocess.Popen] = []
    while (commands or running) and stage.left() > 0:
        running = [process for process in running if process.poll() is None]
        while commands and len(running) < COMPILING_AT_ONCE:
            running.append(subprocess.Popen(commands.pop(0)))
        time.sleep(0.5)


def measure(stage: Stage) -> None:
    for number, each in enumerate(measurements(stage.dry)):
        if stage.left() > each.expected_s or stage.dry:
            stage.attempt(each.what, functools.partial(compare, each, stage))
        if number == 0:
            setting = each.setting(stage.device)
            stage.attempt("kernels of a step", functools.partial(kernels, setting))
            stage.attempt("parts, train", functools.partial(where_the_time_goes, setting, stage.dry))
            setting = setting._replace(mode="infer")
            stage.attempt("parts, infer", functools.partial(where_the_time_goes, setting, stage.dry))


def compare(each: Measurement, stage: Stage) -> Dict[str, Any]:
    """Measure the models of a group. If one runs out of memory, measure the others without it."""
    torch.compiler.reset()
    names, too_large = list(GROUPS[each.group]), []
    while True:
        try:
            found = speeds(names, each.setting(stage.device), 1 if stage.dry else REPEATS, print)
            break
        except torch.OutOfMemoryError:
            too_large.append(names.pop(0))  # timm's TNT needs the most memory
            torch.cuda.empty_cache()
            if not names:
                raise
    rows = [dict(speed._asdict()) for speed in found]
    return {**each._asdict(), "speeds": rows, "detail": f"out of memory: {', '.join(too_large)}" if too_large else ""}


def where_the_time_goes(setting: Setting, dry: bool) -> Dict[str, Any]:
    found = parts("tnt_ti" if dry else "tnt_s", setting, 1 if dry else REPEATS)
    return {"mode": setting.mode, "parts": [part._asdict() for part in found]}


def kernels(setting: Setting) -> Dict[str, Any]:
    found = slowest_kernels("tnt_s", setting)
    return {"kernels": [kernel._asdict() for kernel in found]}


if __name__ == "__main__":
    main()
