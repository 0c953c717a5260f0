"""How fast models are, side by side: their steps take turns, so that a busy moment of the machine hits all alike."""

import ctypes
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
from torch import nn

from tnt_timm.analysis.complexity import cost


class Setting(NamedTuple):
    """What a step is.

    `mode` is 'infer' (forward without gradients) or 'train' (forward, backward, AdamW); a step takes `batch_size` random
    images of `img_size` pixels (None: the model's). `dtype` other than float32 means autocast.
    """

    mode: str
    batch_size: int
    img_size: Optional[int] = None
    dtype: str = "float32"
    compiled: bool = False
    device: str = "cpu"


class Speed(NamedTuple):
    """Of one model: milliseconds per step, images per second, the step's memory and its share of the matmul limit
    (a training step counts as three forward passes)."""

    model: str
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    images_per_s: float
    peak_mb: float
    matmul_share: float

    def ratio(self, other: "Speed") -> float:
        """How many times as many images per second as the other."""
        return self.images_per_s / other.images_per_s


def speeds(models: Sequence[str], setting: Setting, repeats: int, report: Callable[[str], None]) -> List[Speed]:
    """Measure models in turns.

    Args:
        models: timm's names, ours among them.
        setting: what a step is.
        repeats: timed steps of each, after two that warm up (and compile).
        report: told what is going on.

    Returns:
        A row per model, in their order; the median over the repeats.
    """
    peak = matmul_flops(setting)
    steps = {}
    for name in models:
        report(f"{name}: warming up")
        steps[name] = _step(name, setting)
        for _ in range(2):
            steps[name]()
    times: Dict[str, List[float]] = {name: [] for name in models}
    for number in range(repeats):
        report(f"step {number + 1} of {repeats}")
        for name in models:
            times[name].append(timed(steps[name], setting.device))
    found = []
    for name in models:
        report(f"{name}: memory")
        median = statistics.median(times[name])
        work = 2e9 * cost(name, setting.img_size).gmacs * setting.batch_size * (3 if setting.mode == "train" else 1)
        found.append(
            Speed(
                name, 1e3 * median, 1e3 * min(times[name]), 1e3 * max(times[name]), setting.batch_size / median,
                peak_memory(name, setting) / 1e6, work / median / peak,
            )
        )  # fmt: skip
    return found


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds that a step takes, on the device's clock where it has one."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def matmul_flops(setting: Setting, size: int = 2048) -> float:
    """Floating point operations per second of a large matrix product on this device: the limit to compare with."""
    dtype = getattr(torch, setting.dtype)
    a, b = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: a @ b, setting.device) for _ in range(5))
    return 2 * size**3 / best


def peak_memory(name: str, setting: Setting) -> float:
    """Bytes that a step needs beside the model, its optimizer and the images; on CPU, uncompiled in a process of its own."""
    if setting.device == "cuda":
        step = _step(name, setting)
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(_peak_of_a_process, (name, setting))


def _peak_of_a_process(name: str, setting: Setting) -> float:
    """Linux: how far the resident set grows in a second step."""
    step = _step(name, setting._replace(compiled=False))
    step()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not in use
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the first step
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def parts(name: str, setting: Setting, repeats: int) -> List[Tuple[str, float]]:
    """Milliseconds of a TNT's forward pass by part, all blocks together: stem, inner, fold, outer, head."""
    model = _model(name, setting.img_size).to(setting.device).eval()
    images = torch.randn(setting.batch_size, *_input(model, setting.img_size), device=setting.device)
    with torch.no_grad(), _precision(setting):
        words, sentences = model.embed(images)
        block = model.blocks[len(model.blocks) // 2]
        depth = len(model.blocks)
        calls = {
            "stem": (lambda: model.embed(images), 1),
            "inner": (lambda: block.inner(words), depth),
            "fold": (lambda: block.fold(words, sentences), depth),
            "outer": (lambda: block.outer(sentences), depth),
            "head": (lambda: model.forward_head(model.norm(sentences)), 1),
        }
        times: Dict[str, List[float]] = {part: [] for part in calls}
        for _ in range(repeats + 2):
            for part, (call, _) in calls.items():
                times[part].append(timed(call, setting.device))
    return [(part, 1e3 * count * statistics.median(times[part][2:])) for part, (_, count) in calls.items()]


def _model(name: str, img_size: Optional[int]) -> nn.Module:
    return timm.create_model(name, **({} if img_size is None else {"img_size": img_size}))


def _input(model: nn.Module, img_size: Optional[int]) -> Tuple[int, int, int]:
    channels, *size = model.default_cfg["input_size"]
    return (channels, img_size, img_size) if img_size else (channels, *size)


def _precision(setting: Setting):
    dtype = getattr(torch, setting.dtype)
    return torch.autocast(setting.device, dtype, enabled=dtype != torch.float32)


def _step(name: str, setting: Setting) -> Callable[[], None]:
    """A step that is ready to run."""
    model = _model(name, setting.img_size).to(setting.device)
    images = torch.randn(setting.batch_size, *_input(model, setting.img_size), device=setting.device)
    targets = torch.arange(setting.batch_size, device=setting.device) % model.num_classes
    model.train(setting.mode == "train")
    call = torch.compile(model) if setting.compiled else model

    def infer() -> None:
        with torch.no_grad(), _precision(setting):
            call(images)

    if setting.mode == "infer":
        return infer
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def train() -> None:
        with _precision(setting):
            loss = nn.functional.cross_entropy(call(images).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train
