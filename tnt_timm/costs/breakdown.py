"""Measure where the time of a step goes: by part of a TNT, or by kernel."""

from statistics import median
from typing import Callable, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tnt_timm.costs.throughput import Setting, alternate, copy_rate, make_step, matmul_rate, timer


class Part(NamedTuple):
    """The time of one part, summed over all blocks, and its shares of the machine's limits."""

    model: str
    img_size: int
    batch_size: int
    part: str
    ms: float
    matmul_share: float  # of the operations per second of a large matrix product
    bandwidth_share: float  # of the bytes per second of a large copy, for inputs, outputs and parameters


class _Call(NamedTuple):
    """A part of a TNT as a function call."""

    part: str
    function: Callable
    inputs: List[Tensor]
    modules: Sequence[nn.Module]  # whose parameters the function reads
    count: int  # calls in a step

    def outputs(self) -> Tuple[Tensor, ...]:
        found = self.function(*self.inputs)
        return found if isinstance(found, tuple) else (found,)

    def parameters(self) -> List[nn.Parameter]:
        return [parameter for module in self.modules for parameter in module.parameters()]


def parts(name: str, setting: Setting, repeats: int) -> List[Part]:
    """Measure the parts of a TNT in alternation: stem, inner, fold, outer, head. The times are medians."""
    measures = {"matmul": matmul_rate(setting.device, setting.dtype), "copy": copy_rate(setting.device)}
    for call in _calls(name, setting):
        step = _step(call, setting)
        step()  # warm-up
        measures[call.part] = timer(step, setting.device)
    warm_up = 2
    medians = {key: median(found[warm_up:]) for key, found in alternate(measures, repeats + warm_up).items()}
    stem, *others = _calls(name, setting._replace(device="meta"))  # there, the counter sees every operation
    found = []
    for call in (stem, *others):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            outputs = call.outputs()
        size = sum(x.nbytes for x in (*call.inputs, *outputs, *call.parameters()))
        # a backward pass costs two forward passes, but one in the stem, whose input needs no gradient
        passes = 1 if setting.mode == "infer" else 2 if call is stem else 3
        seconds = medians[call.part]
        found.append(
            Part(
                name,
                stem.inputs[0].shape[-1],
                setting.batch_size,
                call.part,
                ms=1e3 * call.count * seconds,
                matmul_share=passes * counter.get_total_flops() / medians["matmul"] / seconds,
                bandwidth_share=passes * size / medians["copy"] / seconds,
            )
        )
    return found


def _calls(name: str, setting: Setting) -> List[_Call]:
    model, images = setting.build(name)
    block, depth = model.blocks[len(model.blocks) // 2], len(model.blocks)
    with torch.no_grad():
        words, sentences = model.embed(images)
    inner = (block.norm_in, block.attn_in, block.norm_mlp_in, block.mlp_in)
    outer = (block.norm_out, block.attn_out, block.norm_mlp, block.mlp)
    stem = [child for part, child in model.named_children() if part not in ("blocks", "norm", "head")]
    return [
        _Call("stem", model.embed, [images], stem, 1),
        _Call("inner", block.inner, [words], inner, depth),
        _Call("fold", block.fold, [words, sentences], (block.norm1_proj, block.proj, block.norm2_proj), depth),
        _Call("outer", block.outer, [sentences], outer, depth),
        _Call("head", lambda x: model.forward_head(model.norm(x)), [sentences], (model.norm, model.head), 1),
    ]


def _step(call: _Call, setting: Setting) -> Callable[[], None]:
    """Return a function that runs a part and, in training, its backward pass for parameters and tokens."""
    if setting.compiled:
        call = call._replace(function=torch.compile(call.function))
    if setting.mode == "infer":

        def infer() -> None:
            with torch.no_grad(), setting.autocast():
                call.outputs()

        return infer
    call = call._replace(inputs=[x.detach().requires_grad_(x.dim() == 3) for x in call.inputs])  # not for images
    leaves = [x for x in (*call.inputs, *call.parameters()) if x.requires_grad]

    def train() -> None:
        with setting.autocast():
            outputs = call.outputs()
        torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], allow_unused=True)

    return train


class KernelTime(NamedTuple):
    kernel: str
    ms: float  # of all its calls in a step
    calls: int


def slowest_kernels(name: str, setting: Setting, count: int = 12) -> List[KernelTime]:
    """Return the kernels (on a CPU: operators) that take most of a model's step, by PyTorch's profiler, the slowest first."""
    step = make_step(name, setting)
    for _ in range(2):
        step()
    on_cuda = setting.device == "cuda"
    device = DeviceType.CUDA if on_cuda else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda) as profiler:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    found = [
        KernelTime(x.key, (x.self_device_time_total if on_cuda else x.self_cpu_time_total) / 1e3, x.count)
        for x in profiler.key_averages()
        if x.device_type == device and not getattr(x, "is_user_annotation", False)
    ]
    return sorted(found, key=lambda x: -x.ms)[:count]
