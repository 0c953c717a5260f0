"""Compare a backend of the inner transformer with the reference, before its first use on a GPU and in tests.

The reference computes in float64 on the CPU. A separate generator draws the random inputs, so that a check does not change the
random state of a run.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tnt_timm.errors import UserError, one_line
from tnt_timm.ops import reference
from tnt_timm.ops.backend_table import BACKENDS
from tnt_timm.ops.layer_description import Layer, Options

# names of the parameters, in the reference's order
NAMES = "norm1 norm1_bias qk qk_bias v v_bias proj proj_bias norm2 norm2_bias fc1 fc1_bias fc2 fc2_bias".split()
# On CUDA, the last tile must be partly empty, and each program must take several tiles. On CPU, Triton's interpreter is slow.
SENTENCES = {"cuda": 301, "cpu": 5}
# maximum relative error by dtype of words and products, about three times the rounding error
TOLERANCES = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 3e-6}
INTERPRETED_BFLOAT16 = 0.1  # Triton's interpreter truncates where the GPU rounds


class Case(NamedTuple):
    """Sizes and dtypes of one comparison."""

    sentences: int  # R
    words: int  # M, per sentence
    width: int  # C
    heads: int
    dtype: str = "float32"  # of the operands of matrix products
    biased: bool = False  # q, k and v have biases
    drop_path: bool = False  # stochastic depth: both residuals have factors, some of them zero
    words_dtype: str = "float32"
    mlp_width: int = 0  # F; 0 means 4 * width
    sentence_norm: bool = False  # LayerNorm over all words of a sentence

    @property
    def name(self) -> str:
        return "-".join(str(x) for x in self)


class Inputs(NamedTuple):
    """Inputs of a case, in float64 on the CPU."""

    words: Tensor  # (R, M, C)
    grad: Tensor  # (R, M, C), of the output
    parameters: Dict[str, Optional[Tensor]]
    scales: List[Optional[Tensor]]  # of attention and MLP, (R, 1, 1)


def make_inputs(case: Case) -> Inputs:
    """Return random inputs, which depend on the case only."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)

    C, F = case.width, case.mlp_width or 4 * case.width
    N = C * case.words if case.sentence_norm else C
    shapes = [(N,), (N,), (2 * C, C), (2 * C,), (C, C), (C,), (C, C), (C,), (N,), (N,), (F, C), (F,), (C, F), (C,)]
    parameters: Dict[str, Optional[Tensor]] = {name: 0.2 * normal(*shape) for name, shape in zip(NAMES, shapes)}
    parameters["norm1"] += 1
    parameters["norm2"] += 1
    if not case.biased:
        parameters["qk_bias"] = parameters["v_bias"] = None
    words, grad = (normal(case.sentences, case.words, C) for _ in range(2))
    scales: List[Optional[Tensor]] = [None, None]
    if case.drop_path:
        scales = [normal(case.sentences, 1, 1).gt(-0.5).double() / 0.7 for _ in range(2)]
    return Inputs(words, grad, parameters, scales)


def expected(case: Case, inputs: Inputs) -> Dict[str, Tensor]:
    """Return the reference's output and gradients by name, in float64 on the CPU."""
    leaves = {"words": inputs.words, **inputs.parameters}
    leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in leaves.items()}
    out = reference.inner_transformer(*leaves.values(), case.heads, 1e-5, *inputs.scales)
    present = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(out, list(present.values()), inputs.grad)
    return {"out": out.detach(), **dict(zip(present, gradients))}


def computed(case: Case, inputs: Inputs, backend: str, device: str = "cpu") -> Dict[str, Tensor]:
    """Return a backend's output and gradients by name. New tensors are filled with NaN to detect results that are not written."""

    def moved(x: Optional[Tensor]) -> Optional[Tensor]:
        return None if x is None else x.to(device, getattr(torch, case.words_dtype))

    words, grad = moved(inputs.words), moved(inputs.grad)
    parameters = [moved(inputs.parameters[name]) for name in NAMES]
    gradients = [None if x is None else torch.full_like(x, math.nan) for x in parameters]
    options = Options(case.heads, 1e-5, *map(moved, inputs.scales), getattr(torch, case.dtype))
    with torch.no_grad(), torch.cuda.device_of(words), _NewTensorsHoldNan():
        out = BACKENDS[backend].forward(words, parameters, options)
        d_words = BACKENDS[backend].backward(grad, words, parameters, gradients, options)
    found = {"out": out, "words": d_words, **dict(zip(NAMES, gradients))}
    assert all(x is None or x.dtype == words.dtype for x in found.values())
    return {name: x for name, x in found.items() if x is not None}


class _NewTensorsHoldNan(TorchFunctionMode):
    """Fill the tensors that `torch.empty_like` and `Tensor.new_empty` allocate in this thread."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.empty_like, torch.Tensor.new_empty):
            result.fill_(math.nan)
        return result


def differences(expected: Dict[str, Tensor], computed: Dict[str, Tensor]) -> Dict[str, float]:
    """Return the relative error |computed - expected| / |expected| of each tensor; NaN if the tensor contains NaN.

    For the output and the gradient of the words, it is the error of the worst sentence. Expected gradients near zero, such as
    that of qk with one word per sentence, are replaced by 1e-3 of the largest gradient of a parameter in the denominator.
    """
    largest = max((x.norm().item() for name, x in expected.items() if x.dim() < 3), default=0.0)
    found = {}
    for name, right in expected.items():
        assert right.shape == computed[name].shape
        error = computed[name].to("cpu", torch.float64) - right
        if right.numel() == 0:
            found[name] = 0.0
        elif right.dim() == 3:
            found[name] = (error.norm(dim=(1, 2)) / right.norm(dim=(1, 2))).max().item()
        else:
            found[name] = error.norm().item() / max(right.norm().item(), 1e-3 * largest, 1e-30)
    return found


def errors(case: Case, backend: str, device: str = "cpu") -> Dict[str, float]:
    """Return the relative error of a backend's output and of each of its gradients, by name."""
    inputs = make_inputs(case)
    return differences(expected(case, inputs), computed(case, inputs, backend, device))


def tolerance(case: Case, device: str) -> float:
    """Return the maximum relative error on "cuda", or on "cpu" under Triton's interpreter."""
    types = (case.dtype, case.words_dtype)
    if device == "cpu" and "bfloat16" in types:
        return INTERPRETED_BFLOAT16
    return max(TOLERANCES[dtype] for dtype in types)


def check(backend: str, device: torch.device, case: Case) -> Optional[str]:
    """Compare a backend's forward and backward with the reference, with and without stochastic depth.

    Returns:
        None if the results are right, otherwise the reason in one line.

    Raises:
        RuntimeError: out of memory (torch.OutOfMemoryError or the driver's error), or the device is unusable after a crash.
    """
    try:
        for drop_path in (False, True):
            case = case._replace(drop_path=drop_path)
            # in a new thread, to which the caller's autocast, inference mode, tracing and FLOP counter do not apply
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(errors, case, backend, str(device)).result()
            name, error = max(found.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
            if not error <= tolerance(case, device.type):
                what = "output" if name == "out" else f"gradient of {name}"
                return f"the relative error of the {what} is {error:.2g} (tolerance: {tolerance(case, device.type):g})"
    except Exception as error:  # compiler, driver and launcher raise many types
        if "out of memory" in str(error):
            raise
        why = f"{type(error).__name__}: {one_line(error, 200)}"
        try:
            torch.ones(1, device=device).add_(1).item()
        except RuntimeError:
            message = f"{device} is unusable after a crash in the {backend} kernels ({why}); set TNT_BACKEND=reference"
            raise RuntimeError(message) from error
        return why
    return None


@functools.cache
def failure(layer: Layer, device: torch.device) -> Optional[str]:
    """Check the CUDA kernels once for each layer and device. Return None if they are right, otherwise the reason in one line.

    Raises:
        UserError: a CUDA graph is being captured.
        RuntimeError: as in `check`.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UserError("the CUDA kernels need a check before their first use: run the network once before capturing")
    words_dtype, dtype = (str(x).removeprefix("torch.") for x in (layer.words_dtype, layer.dtype))
    sizes = (SENTENCES[device.type], layer.num_words, layer.inner_dim, layer.num_heads)
    case = Case(*sizes, dtype, layer.qk_bias, words_dtype=words_dtype, mlp_width=layer.mlp_dim)
    case = case._replace(sentence_norm=layer.sentence_norm)
    wrong = check(layer.backend, device, case)
    if wrong is None:
        return None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, interpreted"
    sizes = f"{case.words} words of width {case.width}, {case.heads} heads, MLP of width {case.mlp_width}"
    version = BACKENDS[layer.backend].VERSION
    return f"the CUDA kernels failed the self-check on {gpu} ({version}, {dtype}, {sizes}): {wrong}"
