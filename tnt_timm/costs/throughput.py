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
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tnt_timm.costs.complexity import cost
from tnt_timm.models.layers import Linear

ROUND_S = 0.2  # seconds per timing round on a GPU
IN_A_ROW = {"cpu": 1, "cuda": 8}  # so that launching takes no part of the time
LARGE = {"cpu": (2048, 2**26), "cuda": (8192, 2**29)}  # edge of a matrix; floats of a tensor, many times any cache


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
    img_size: int
    batch_size: int
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
    # a model that does not take such images is an error here, before the slow part
    gmacs = {name: cost(name, setting.img_size).gmacs for name in models}
    matmul = matmul_rate(setting.device, setting.dtype)
    steps: Dict[str, Callable[[], None]] = {}
    for name in models:
        report(f"{name}: warming up")
        steps[name] = make_step(name, setting)
        for _ in range(2):
            steps[name]()
    times: Dict[str, List[float]] = {name: [] for name in models}
    matmul()  # warms up
    limits = []
    counts = {name: _steps_per_round(steps[name], setting.device) for name in models}
    for number in range(repeats):
        report(f"step {number + 1} of {repeats}")
        limits.append(matmul())
        for name in models:
            times[name].append(timed(steps[name], setting.device, counts[name]))
    peak = statistics.median(limits)
    found = []
    for name in models:
        report(f"{name}: memory")
        median = statistics.median(times[name])
        work = 2e9 * gmacs[name] * setting.batch_size * (3 if setting.mode == "train" else 1)
        found.append(
            Speed(
                name,
                _edge(name, setting.img_size),
                setting.batch_size,
                median_ms=1e3 * median,
                fastest_ms=1e3 * min(times[name]),
                slowest_ms=1e3 * max(times[name]),
                images_per_s=setting.batch_size / median,
                peak_mb=peak_memory(name, setting, steps[name]) / 1e6,
                matmul_share=work / median / peak,
            )
        )
    return found


def timed(step: Callable[[], None], device: str, count: int = 1) -> float:
    """Seconds that a step takes, the mean of `count` in a row, on the device's clock where it has one."""
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


def _steps_per_round(step: Callable[[], None], device: str) -> int:
    """A GPU gets steps for a fifth of a second at once: while it computes one, the next ones are launched, as in training."""
    return max(1, round(ROUND_S / timed(step, device))) if device == "cuda" else 1


def matmul_rate(device: str, dtype: str) -> Callable[[], float]:
    """Return a function that measures floating point operations per second of a large matrix product, that of a linear layer
    of ours: the limit to compare with."""
    size, options = LARGE[device][0], dict(device=device, dtype=getattr(torch, dtype))
    x, layer = torch.randn(size, size, **options), Linear(size, size, bias=False, **options).requires_grad_(False)
    return lambda: 2 * size**3 / timed(lambda: layer(x), device, IN_A_ROW[device])


def copy_rate(device: str) -> Callable[[], float]:
    """Return a function that measures bytes per second, read and written, of copying a large tensor."""
    source = torch.randn(LARGE[device][1], device=device)
    target = torch.empty_like(source)
    return lambda: 2 * source.nbytes / timed(lambda: target.copy_(source), device, IN_A_ROW[device])


def peak_memory(name: str, setting: Setting, step: Callable[[], None]) -> float:
    """Bytes that a step needs beside the model, its optimizer and the images.

    On a GPU this is that of `step`, which has run before; on CPU that of a new one, uncompiled in a process of its own.
    """
    if setting.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    fresh = multiprocessing.get_context(
        "forkserver"
    )  # forks of a process that has imported everything and done nothing
    fresh.set_forkserver_preload([__name__])
    with fresh.Pool(1) as process:
        return process.apply(_peak_of_a_process, (name, setting, torch.get_num_threads()))


def _peak_of_a_process(name: str, setting: Setting, threads: int) -> float:
    """Linux: how far the resident set grows in a second step."""
    torch.set_num_threads(threads)
    step = make_step(name, setting._replace(compiled=False))
    step()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not in use
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the first step
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


class Part(NamedTuple):
    """Of a TNT, all its blocks together: milliseconds, and its shares of the matmul limit and of the memory's bandwidth
    (for what it must at least read and write: inputs, results and parameters)."""

    model: str
    img_size: int
    batch_size: int
    part: str
    ms: float
    matmul_share: float
    bandwidth_share: float


def parts(name: str, setting: Setting, repeats: int) -> List[Part]:
    """Where a TNT's step spends its time: stem, inner, fold, outer, head. Their turns alternate; the medians count."""
    work = _work(name, setting, setting.device)
    steps = {part: _part_step(setting, *rest[:3]) for part, *rest in work}
    times: Dict[str, List[float]] = {part: [] for part in steps}
    matmul, copy = matmul_rate(setting.device, setting.dtype), copy_rate(setting.device)
    for step in steps.values():  # warm up
        step()
    counts = {part: _steps_per_round(step, setting.device) for part, step in steps.items()}
    limits = []
    for _ in range(repeats + 2):
        limits.append((matmul(), copy()))
        for part, step in steps.items():
            times[part].append(timed(step, setting.device, counts[part]))
    flops, bandwidth = map(statistics.median, zip(*limits[2:]))
    found = []
    for part, function, inputs, modules, count in _work(name, setting, "meta"):  # there, every operation is counted
        seconds = statistics.median(times[part][2:])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = function(*inputs)
        touched = [*inputs, *(out if isinstance(out, tuple) else (out,)), *(p for m in modules for p in m.parameters())]
        size = sum(x.numel() * x.element_size() for x in touched)
        passes = 1 if setting.mode == "infer" else 2 if part == "stem" else 3  # nobody asks for the gradient of pixels
        shares = (passes * counter.get_total_flops() / flops, passes * size / bandwidth)
        where = (name, _edge(name, setting.img_size), setting.batch_size, part)
        found.append(Part(*where, 1e3 * count * seconds, *(share / seconds for share in shares)))
    return found


class KernelTime(NamedTuple):
    """Of one kernel in a step: its name, milliseconds of all its calls, and how many these are."""

    kernel: str
    ms: float
    calls: int


def slowest_kernels(name: str, setting: Setting, count: int = 12) -> List[KernelTime]:
    """Return the kernels that take most of a model's step, by PyTorch's profiler (on CPU: operators), the slowest first."""
    step = make_step(name, setting)
    for _ in range(2):
        step()
    on_cuda = setting.device == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    found = [
        KernelTime(x.key, (x.self_device_time_total if on_cuda else x.self_cpu_time_total) / 1e3, x.count)
        for x in profiler.key_averages()
        if not getattr(x, "is_user_annotation", False)
        and x.device_type == (DeviceType.CUDA if on_cuda else DeviceType.CPU)
    ]
    return sorted(found, key=lambda x: -x.ms)[:count]


def _work(name: str, setting: Setting, device: str) -> List[tuple]:
    """The parts of a TNT on a device: name, function, inputs, modules whose parameters it reads, how often it is called."""
    model = _model(name, setting.img_size).to(device).train(setting.mode == "train")
    images = torch.randn(setting.batch_size, *_input(model, setting.img_size), device=device)
    block, depth = model.blocks[len(model.blocks) // 2], len(model.blocks)
    with torch.no_grad():
        words, sentences = model.embed(images)
    inner = (block.norm_in, block.attn_in, block.norm_mlp_in, block.mlp_in)
    outer = (block.norm_out, block.attn_out, block.norm_mlp, block.mlp)
    stem = [child for part, child in model.named_children() if part not in ("blocks", "norm", "head")]
    return [
        ("stem", model.embed, [images], stem, 1),
        ("inner", block.inner, [words], inner, depth),
        ("fold", block.fold, [words, sentences], (block.norm1_proj, block.proj, block.norm2_proj), depth),
        ("outer", block.outer, [sentences], outer, depth),
        ("head", lambda x: model.forward_head(model.norm(x)), [sentences], (model.norm, model.head), 1),
    ]


def _part_step(
    setting: Setting, function: Callable, inputs: Sequence[torch.Tensor], modules: Sequence[nn.Module]
) -> Callable[[], None]:
    """A call of a part, and in training its backward, for what flows in and for its parameters."""
    call = torch.compile(function) if setting.compiled else function
    if setting.mode == "infer":

        def step() -> None:
            with torch.no_grad(), _precision(setting):
                call(*inputs)

        return step
    inputs = [x.detach().requires_grad_(x.dim() == 3) for x in inputs]  # of tokens, not of images
    leaves = [*(x for x in inputs if x.requires_grad), *(p for module in modules for p in module.parameters())]

    def step() -> None:
        with _precision(setting):
            out = call(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs], allow_unused=True)

    return step


def _model(name: str, img_size: Optional[int]) -> nn.Module:
    return timm.create_model(name, **({} if img_size is None else {"img_size": img_size}))


def _input(model: nn.Module, img_size: Optional[int]) -> Tuple[int, int, int]:
    channels, *size = model.default_cfg["input_size"]
    return (channels, img_size, img_size) if img_size else (channels, *size)


def _edge(name: str, img_size: Optional[int]) -> int:
    return img_size or timm.get_pretrained_cfg(name).input_size[-1]


def _precision(setting: Setting):
    dtype = getattr(torch, setting.dtype)
    return torch.autocast(setting.device, dtype, enabled=dtype != torch.float32)


def make_step(name: str, setting: Setting) -> Callable[[], None]:
    """Return a step of a new model, ready to run."""
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
