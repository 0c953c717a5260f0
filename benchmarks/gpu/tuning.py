"""Stage 5: the best launch sizes of the three kernels, for the padded width of each model.

Several processes compile the candidates into Triton's cache first. Then this one measures them, one kernel at a time, and
compares their results with those of the present sizes.
"""

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from compare import MODELS
from stage import Stage

from tnt_timm.analysis.throughput import timed
from tnt_timm.ops import triton_inner, triton_launches
from tnt_timm.ops.self_check import NAMES, Case, make_inputs, tolerance
from tnt_timm.ops.triton_launches import Launch

PROCESSES = 12
REPEATS = 11
SENTENCES = 256 * 196  # a batch of 256 images
KERNELS = ("attention_backward", "mlp_backward", "forward")  # the slowest first
WORDS_OF_A_WARP = range(8, 65)


class Problem(NamedTuple):
    """One kernel for one model's sizes."""

    model: str
    kernel: str

    def present(self, device: str) -> Launch:
        return triton_launches.launch(capability(device), self.kernel, self.width)

    @property
    def width(self) -> int:
        """Padded, as the table has it."""
        C, heads = MODELS[self.model]
        return triton_inner.widths(C, heads, 4 * C)["CP"]

    def candidates(self, device: str) -> List[Launch]:
        """The present sizes first. Only a loop over tiles has something to load ahead, so forward has one stage."""
        present = self.present(device)
        if device == "cpu":
            return [present, Launch(64, 2, 1)]
        stages = (1,) if self.kernel == "forward" else (1, 2)
        sizes = itertools.product((32, 64, 128, 256), (2, 4, 8, 16), stages)
        fitting = [Launch(*size) for size in sizes if size[0] // size[1] in WORDS_OF_A_WARP]
        return [present, *(launch for launch in fitting if launch != present)]


def problems(dry: bool) -> List[Problem]:
    models = ["tnt_ti"] if dry else ["tnt_s", "tnt_b", "tnt_ti"]
    return [Problem(model, kernel) for model in models for kernel in KERNELS]


def capability(device: str) -> int:
    major, minor = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return 10 * major + minor


class Layer:
    """A model's inner transformer on random words, as a training step calls it."""

    def __init__(self, model: str, device: str):
        self.case = Case(5 if device == "cpu" else SENTENCES, 16, *MODELS[model], "bfloat16", drop_path=True)
        few = make_inputs(self.case._replace(sentences=min(self.case.sentences, 1024)))
        times = -(-self.case.sentences // 1024)

        def many(x: torch.Tensor) -> torch.Tensor:
            return x.float().to(device).repeat(times, 1, 1)[: self.case.sentences].contiguous()

        self.words, self.grad = many(few.words), many(few.grad)
        self.scales = [many(scale) for scale in few.scales]
        self.parameters = [None if few.parameters[n] is None else few.parameters[n].float().to(device) for n in NAMES]
        self.grads = [None if x is None else torch.empty_like(x) for x in self.parameters]
        self.options = (self.case.heads, 1e-5, *self.scales, torch.bfloat16)

    def forward(self) -> Dict[str, torch.Tensor]:
        return {"out": triton_inner.forward(self.words, self.parameters, *self.options)}

    def backward(self) -> Dict[str, torch.Tensor]:
        words = triton_inner.backward(self.grad, self.words, self.parameters, self.grads, *self.options)
        return {"words": words, **{name: x.clone() for name, x in zip(NAMES, self.grads) if x is not None}}

    def run(self, kernel: str, launch: Launch) -> Dict[str, torch.Tensor]:
        """Return the results of forward or backward, with these sizes for one kernel."""
        triton_launches.OVERRIDES[kernel] = launch
        try:
            return self.forward() if kernel == "forward" else self.backward()
        finally:
            del triton_launches.OVERRIDES[kernel]


def main() -> None:
    stage = Stage("tuning", lambda parser: parser.add_argument("--part", type=int))
    if stage.options.part is not None:
        compile_part(stage)
        return
    compiled = compile_all(stage)
    best = {kernel: dict(rows) for kernel, rows in triton_launches.DEFAULT.items()}
    for kernel, rows in triton_launches.LAUNCHES.get(capability(stage.device), {}).items():
        best[kernel].update(rows)
    for problem in problems(stage.dry):
        if stage.left() < 5:
            break
        launches = [launch for other, launch in compiled if other == problem]
        what = f"{problem.kernel} of {problem.model}"
        stage.attempt(what, functools.partial(tune, problem, launches, stage.device, best))
    stage.record("table", source=triton_launches.source(capability(stage.device), best))


def all_candidates(stage: Stage) -> List[Tuple[Problem, Launch]]:
    return [(problem, launch) for problem in problems(stage.dry) for launch in problem.candidates(stage.device)]


def compile_all(stage: Stage) -> List[Tuple[Problem, Launch]]:
    """Compile in several processes, for up to two thirds of the time; returns the candidates that compile and run."""
    parts = range(processes(stage))
    running = [subprocess.Popen([*sys.orig_argv, "--part", str(part)]) for part in parts]
    until = time.monotonic() + stage.left() * 2 / 3
    while any(process.poll() is None for process in running) and time.monotonic() < until:
        time.sleep(0.2)
    for process in running:
        process.kill()
        process.wait()
    done = [line for part in parts for line in lines_of(stage, part)]
    return [(Problem(*problem), Launch(*launch)) for problem, launch in map(json.loads, done)]


def processes(stage: Stage) -> int:
    return 1 if stage.dry else min(PROCESSES, os.cpu_count() or 1)


def lines_of(stage: Stage, part: int) -> List[str]:
    """The whole lines that a process has written."""
    file = stage.work / f"compiled-{part}.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def compile_part(stage: Stage) -> None:
    """Compile this process's share of the candidates by running it; the file names those that ran."""
    part, count = stage.options.part, processes(stage)
    layers: Dict[str, Layer] = {}
    with (stage.work / f"compiled-{part}.jsonl").open("w") as file:
        for problem, launch in all_candidates(stage)[part::count]:
            layer = layers.setdefault(problem.model, Layer(problem.model, stage.device))
            try:
                layer.run(problem.kernel, launch)
                if not stage.dry:
                    torch.cuda.synchronize()
            except Exception as error:  # too large for this GPU, or the compiler's fault
                print(f"{problem}, {launch}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
                continue
            file.write(json.dumps([problem, launch]) + "\n")
            file.flush()


def tune(problem: Problem, launches: List[Launch], device: str, best: Dict[str, Dict[int, Launch]]) -> Dict[str, Any]:
    """Measure candidates in turns, and put the fastest one into `best` where it is faster by more than 2 %."""
    layer, present = Layer(problem.model, device), problem.present(device)
    launches = [present, *(launch for launch in launches if launch != present)]
    wanted = layer.run(problem.kernel, present)
    times: Dict[Launch, List[float]] = {}
    for launch in launches:
        found = layer.run(problem.kernel, launch)
        errors = [((found[name] - x).norm() / x.norm()).item() for name, x in wanted.items()]
        if all(error <= tolerance(layer.case, device) for error in errors):  # and none is NaN
            times[launch] = []
    for _ in range(1 if device == "cpu" else REPEATS):
        for launch in times:
            call = functools.partial(layer.run, problem.kernel, launch)
            times[launch].append(timed(call, device, count=1 if device == "cpu" else 4))
    medians = {launch: 1e3 * statistics.median(seconds) for launch, seconds in times.items()}
    fastest = min(medians, key=medians.get)
    if medians[fastest] < 0.98 * medians[present]:
        best[problem.kernel][problem.width] = fastest
    wrong = [str(tuple(launch)) for launch in launches if launch not in times]
    return {
        "kernel": problem.kernel,
        "model": problem.model,
        "width": problem.width,
        "present": str(tuple(present)),
        "present_ms": medians[present],
        "best": str(tuple(fastest)),
        "best_ms": medians[fastest],
        "tried": [[*launch, ms] for launch, ms in medians.items()],
        "ok": not wrong,
        "detail": f"wrong with {', '.join(wrong)}" if wrong else "",
    }


if __name__ == "__main__":
    main()
