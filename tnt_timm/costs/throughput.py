"""Measure the speed of models side by side: their steps alternate, so that a busy moment of the machine affects all of them."""

import ctypes
import multiprocessing
import time
from pathlib import Path
from statistics import median
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from tnt_timm.costs.complexity import cost, create_for_size
from tnt_timm.models.layers import Linear

ROUND_S = 0.2  # seconds per timing round on a GPU
IN_A_ROW = {"cpu": 1, "cuda": 8}  # calls per measurement of a limit, so that the launch time does not count
LARGE = {"cpu": (2048, 2**26), "cuda": (8192, 2**29)}  # edge of a matrix; floats of a tensor that exceeds every cache


class Setting(NamedTuple):
    """What a step is: inference or training on a batch of random images."""

    mode: str  # "infer": forward without gradients. "train": forward, backward, AdamW
    batch_size: int
    img_size: Optional[int] = None  # in pixels (default: the model's)
    dtype: str = "float32"  # others mean autocast
    compiled: bool = False
    device: str = "cpu"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, getattr(torch, self.dtype), enabled=self.dtype != "float32")

    def build(self, name: str) -> Tuple[nn.Module, Tensor]:
        """Return a new model, in training or evaluation mode, and images (batch_size, channels, height, width)."""
        model, input_size = create_for_size(name, self.img_size, self.device)
        return model.train(self.mode == "train"), torch.randn(self.batch_size, *input_size, device=self.device)


class Speed(NamedTuple):
    """The speed of a model. `matmul_share` compares with the operations per second of one large matrix product."""

    model: str
    img_size: int
    batch_size: int
    median_ms: float  # per step
    fastest_ms: float
    slowest_ms: float
    images_per_s: float
    peak_mb: float  # of a step, without model, optimizer and images
    matmul_share: float  # a training step counts as three forward passes

    def ratio(self, other: "Speed") -> float:
        """Return the speedup over another model, in images per second."""
        return self.images_per_s / other.images_per_s


def speeds(models: Sequence[str], setting: Setting, repeats: int, report: Callable[[str], None]) -> List[Speed]:
    """Measure timm's models (including ours) in alternation; return one result per model, in their order.

    `repeats` is the number of timed steps, after two warm-up steps (which compile). `report` receives progress lines.

    Raises:
        UserError: a model does not take images of this size.
    """
    costs = {name: cost(name, setting.img_size) for name in models}  # checks the image size before the slow part
    steps: Dict[str, Callable[[], None]] = {}
    for name in models:
        report(f"{name}: warming up")
        steps[name] = make_step(name, setting)
        for _ in range(2):
            steps[name]()
    matmul = matmul_rate(setting.device, setting.dtype)
    matmul()  # warm-up
    measures = {"matmul": matmul, **{name: timer(step, setting.device) for name, step in steps.items()}}
    measured = alternate(measures, repeats, report)
    found = []
    for name in models:
        report(f"{name}: memory")
        times = measured[name]
        seconds = median(times)
        operations = 2e9 * costs[name].gmacs * setting.batch_size * (3 if setting.mode == "train" else 1)
        found.append(
            Speed(
                name,
                costs[name].image_size,
                setting.batch_size,
                median_ms=1e3 * seconds,
                fastest_ms=1e3 * min(times),
                slowest_ms=1e3 * max(times),
                images_per_s=setting.batch_size / seconds,
                peak_mb=peak_memory(name, setting, steps[name]) / 1e6,
                matmul_share=operations / seconds / median(measured["matmul"]),
            )
        )
    return found


def make_step(name: str, setting: Setting) -> Callable[[], None]:
    """Return a function that runs a step of a new model."""
    model, images = setting.build(name)
    call = torch.compile(model) if setting.compiled else model
    if setting.mode == "infer":

        def infer() -> None:
            with torch.no_grad(), setting.autocast():
                call(images)

        return infer
    targets = torch.arange(setting.batch_size, device=setting.device) % model.num_classes
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def train() -> None:
        with setting.autocast():
            loss = nn.functional.cross_entropy(call(images).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


def alternate(
    measures: Mapping[str, Callable[[], float]], repeats: int, report: Callable[[str], None] = lambda line: None
) -> Dict[str, List[float]]:
    """Call every function, then every function again, and return the results of each."""
    found: Dict[str, List[float]] = {name: [] for name in measures}
    for number in range(repeats):
        report(f"step {number + 1} of {repeats}")
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def timer(step: Callable[[], None], device: str) -> Callable[[], float]:
    """Return a function that measures the seconds of a step, which must have run before.

    A GPU runs several steps at once: it computes one while the next ones are launched, as in training.
    """
    count = max(1, round(ROUND_S / timed(step, device))) if device == "cuda" else 1
    return lambda: timed(step, device, count)


def timed(step: Callable[[], None], device: str, count: int = 1) -> float:
    """Return the mean seconds of `count` consecutive steps, by the GPU's clock on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    begun = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begun) / count


def matmul_rate(device: str, dtype: str) -> Callable[[], float]:
    """Return a function that measures floating point operations per second of a large matrix product.

    The product is that of our own linear layer, which calls the fastest library (oneDNN on some CPUs).
    """
    size, options = LARGE[device][0], dict(device=device, dtype=getattr(torch, dtype))
    x, layer = torch.randn(size, size, **options), Linear(size, size, bias=False, **options).requires_grad_(False)
    return lambda: 2 * size**3 / timed(lambda: layer(x), device, IN_A_ROW[device])


def copy_rate(device: str) -> Callable[[], float]:
    """Return a function that measures bytes per second, read plus written, of a large copy."""
    source = torch.randn(LARGE[device][1], device=device)
    target = torch.empty_like(source)
    return lambda: 2 * source.nbytes / timed(lambda: target.copy_(source), device, IN_A_ROW[device])


def peak_memory(name: str, setting: Setting, step: Callable[[], None]) -> float:
    """Return the bytes that a step needs in addition to the model, its optimizer and the images.

    On a GPU, this measures `step`, which must have run before. On a CPU (Linux), it measures an uncompiled step in a new process.
    """
    if setting.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    fresh = multiprocessing.get_context("forkserver")  # its children have imported this module and computed nothing
    fresh.set_forkserver_preload([__name__])
    with fresh.Pool(1) as process:
        return process.apply(_resident_growth, (name, setting, torch.get_num_threads()))


def _resident_growth(name: str, setting: Setting, threads: int) -> int:
    """Return by how many bytes the resident set grows in a second step."""
    torch.set_num_threads(threads)
    step = make_step(name, setting._replace(compiled=False))
    step()
    ctypes.CDLL(None).malloc_trim(0)  # return the allocator's free memory to the system
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
