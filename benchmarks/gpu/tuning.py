"""Stage 5: find the best launch sizes of the three kernels for the padded width of each model.

Several processes compile the candidates into Triton's cache. Then this process measures them, one kernel at a time, and
compares their results with those of the current sizes.
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

from tnt_timm.costs.throughput import timed
from tnt_timm.ops import triton_backend, triton_launches, triton_packing
from tnt_timm.ops.layer import Options
from tnt_timm.ops.self_check import NAMES, Case, make_inputs, tolerance
from tnt_timm.ops.triton_launches import Launch

PROCESSES = 12
REPEATS = 11
SENTENCES = 256 * 196  # a batch of 256 images
KERNELS = ("attention_backward", "mlp_backward", "forward")  # the slowest first
WORDS_OF_A_WARP = range(8, 33)  # more take long to compile and spill


class Problem(NamedTuple):
    """One kernel for one model's sizes."""

    model: str
    kernel: str

    def present(self, device: str) -> Launch:
        return triton_launches.launch(capability(device), self.kernel, self.width)

    @property
    def width(self) -> int:
        """Return the padded width of the words."""
        C, heads = MODELS[self.model]
        return triton_packing.widths(C, heads, 4 * C)["CP"]

    def candidates(self, device: str) -> List[Launch]:
        """Return the current sizes, then the candidates. Forward has one stage, because it has no loop over tiles."""
        present = self.present(device)
        if device == "cpu":
            return [present, Launch(64, 2, 1)]
        stages = (1,) if self.kernel == "forward" else (1, 2)
        sizes = itertools.product((32, 64, 128, 256), (2, 4, 8, 16), stages)
        fitting = [Launch(*size) for size in sizes if size[0] // size[1] in WORDS_OF_A_WARP]
        return [present, *(launch for launch in fitting if launch != present)]


def capability(device: str) -> int:
    major, minor = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return 10 * major + minor


class Layer:
    """The inner transformer of a model on random words, called as in a training step."""

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
        self.options = Options(self.case.heads, 1e-5, *self.scales, torch.bfloat16)

    def call(self, kernel: str, launch: Launch) -> torch.Tensor:
        """Compute forward, or the whole backward, with these sizes for one kernel."""
        triton_launches.OVERRIDES[kernel] = launch
        try:
            if kernel == "forward":
                return triton_backend.forward(self.words, self.parameters, self.options)
            return triton_backend.backward(self.grad, self.words, self.parameters, self.grads, self.options)
        finally:
            del triton_launches.OVERRIDES[kernel]

    def results(self, kernel: str, launch: Launch) -> List[torch.Tensor]:
        """Return all results of `call`."""
        first = self.call(kernel, launch)
        return [first, *(x.clone() for x in self.grads if x is not None and kernel != "forward")]


def main() -> None:
    stage = Stage("tuning", lambda parser: (parser.add_argument("--part", type=int), parser.add_argument("--model")))
    if stage.options.part is not None:
        compile_part(stage)
        return
    best = {kernel: dict(rows) for kernel, rows in triton_launches.DEFAULT.items()}
    for kernel, rows in triton_launches.LAUNCHES.get(capability(stage.device), {}).items():
        best[kernel].update(rows)
    models = ["tnt_ti"] if stage.dry else ["tnt_s", "tnt_b", "tnt_ti"]
    for number, model in enumerate(models):
        # of this model's share of the time, use 65 % to compile and the rest to measure
        until = time.monotonic() + 0.65 * stage.left() / (len(models) - number)
        compiled = compile_all(stage, model, until)
        for kernel in KERNELS:
            if stage.left() < 3:
                return
            problem = Problem(model, kernel)
            launches = [launch for other, launch in compiled if other == problem]
            stage.attempt(f"{kernel} of {model}", functools.partial(tune, problem, launches, stage.device, best))
            stage.record("table", source=triton_launches.source(capability(stage.device), best))


def candidates(stage: Stage, model: str) -> List[Tuple[Problem, Launch]]:
    """Return all sizes to try for a model. Kernels alternate, so that a timeout affects all of them equally."""
    problems = [Problem(model, kernel) for kernel in KERNELS]
    columns = itertools.zip_longest(*([(x, launch) for launch in x.candidates(stage.device)] for x in problems))
    return [each for row in columns for each in row if each is not None]


def compile_all(stage: Stage, model: str, until: float) -> List[Tuple[Problem, Launch]]:
    """Compile in several processes until a time. Return the candidates that compile and run."""
    parts = range(processes(stage))
    running = [subprocess.Popen([*sys.orig_argv, "--part", str(part), "--model", model]) for part in parts]
    while any(process.poll() is None for process in running) and time.monotonic() < until:
        time.sleep(0.2)
    for process in running:
        process.kill()
        process.wait()
    done = [line for part in parts for line in lines_of(stage, model, part)]
    return [(Problem(*problem), Launch(*launch)) for problem, launch in map(json.loads, done)]


def processes(stage: Stage) -> int:
    return 1 if stage.dry else min(PROCESSES, os.cpu_count() or 1)


def lines_of(stage: Stage, model: str, part: int) -> List[str]:
    """Return the complete lines that a process has written."""
    file = stage.work / f"compiled-{model}-{part}.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def compile_part(stage: Stage) -> None:
    """Compile this process's share of the candidates by running them. Write those that ran to its file."""
    part, model = stage.options.part, stage.options.model
    layer = Layer(model, stage.device)
    with (stage.work / f"compiled-{model}-{part}.jsonl").open("w") as file:
        for problem, launch in candidates(stage, model)[part :: processes(stage)]:
            try:
                layer.call(problem.kernel, launch)
                if not stage.dry:
                    torch.cuda.synchronize()
            except Exception as error:  # too large for this GPU, or a compiler error
                print(f"{problem}, {launch}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
                continue
            file.write(json.dumps([problem, launch]) + "\n")
            file.flush()


def tune(problem: Problem, launches: List[Launch], device: str, best: Dict[str, Dict[int, Launch]]) -> Dict[str, Any]:
    """Measure the candidates alternately, and put the fastest one into `best` if it is faster by more than 2 %."""
    layer, present = Layer(problem.model, device), problem.present(device)
    launches = [present, *(launch for launch in launches if launch != present)]
    expected = layer.results(problem.kernel, present)
    times: Dict[Launch, List[float]] = {}
    for launch in launches:
        found = layer.results(problem.kernel, launch)
        errors = [((x - right).norm() / right.norm()).item() for x, right in zip(found, expected)]
        if all(error <= tolerance(layer.case, device) for error in errors):  # and none is NaN
            times[launch] = []
    for _ in range(1 if device == "cpu" else REPEATS):
        for launch in times:
            call = functools.partial(layer.call, problem.kernel, launch)
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
