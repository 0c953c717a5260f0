"""The inner transformer of a block as one operator, and linear layers; this module picks who computes them.

The inner transformer:

- `reference`: the specification in plain PyTorch; it can do everything.
- `native`: CPU, in C++, a sentence at a time; recomputed in backward.
- `triton`: CUDA in bfloat16 or float16, fused; recomputed in backward.

The fastest backend that supports the case is chosen automatically. Set the environment variable TNT_BACKEND to name one. Where
that one does not support the case, the reference computes, and the log says why. Exported, traced and scripted models hold
the reference too, so that they need nothing of this package. So does everything that torch.func transforms, and everything
that needs second derivatives.

Before the CUDA kernels compute for the first time, they are compared with the reference (`self_check`). If they fail, there is
one warning, and the reference computes. With TNT_BACKEND=triton this is an error instead.

A linear layer is torch's own, or oneDNN's on processors where that is faster and TNT_BACKEND is not `reference`.
"""

import contextlib
import logging
import os
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tnt_timm.errors import UserError
from tnt_timm.ops import native, onednn, reference, self_check
from tnt_timm.ops.custom_op import BACKENDS
from tnt_timm.ops.custom_op import inner_transformer as _operator

__all__ = [
    "Layer",
    "backend_for",
    "backends_used",
    "fallback_reasons",
    "force_reference",
    "inner_transformer",
    "linear",
    "silent",
]


class Layer(NamedTuple):
    """Everything except the device that decides which backend computes a layer."""

    backend: str
    words_dtype: torch.dtype
    dtype: torch.dtype  # of the products' operands
    num_words: int  # M
    inner_dim: int  # C
    num_heads: int
    mlp_dim: int  # F
    biased: bool  # q, k and v have biases


_logger = logging.getLogger(__name__)
_said: Set[str] = set()
_reasons: Dict[Layer, Optional[str]] = {}  # reason for the fallback, or None
_forced: Dict[Layer, str] = {}  # by `force_reference`
_checks: Dict[Tuple[Layer, torch.device], Optional[str]] = {}  # reason why the check failed, or None
_silent = False
_CHOICES = ("auto", "reference", *BACKENDS)
_wanted = os.environ.get("TNT_BACKEND", "auto")
if _wanted not in _CHOICES:
    raise ImportError(f"TNT_BACKEND={_wanted}: choose {', '.join(_CHOICES[:-1])} or {_CHOICES[-1]}")


def inner_transformer(
    words: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qk_weight: Tensor,
    qk_bias: Optional[Tensor],
    v_weight: Tensor,
    v_bias: Optional[Tensor],
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    num_heads: int,
    eps: float = 1e-5,
    attn_scale: Optional[Tensor] = None,
    mlp_scale: Optional[Tensor] = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> Tensor:
    """`ops.reference.inner_transformer` by the backend of choice; that text says what the arguments are.

    Under autocast the products are of autocast's type; LayerNorm, softmax, GELU and the residuals keep the words' type.
    """
    if not torch.jit.is_scripting():
        biased = (norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias)
        parameters = (*biased, norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        out = _by_operator(words, parameters, num_heads, eps, attn_scale, mlp_scale, max(attn_drop, proj_drop))
        if out is not None:
            return out
    return reference.inner_transformer(
        words,
        norm1_weight,
        norm1_bias,
        qk_weight,
        qk_bias,
        v_weight,
        v_bias,
        proj_weight,
        proj_bias,
        norm2_weight,
        norm2_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        num_heads,
        eps,
        attn_scale,
        mlp_scale,
        attn_drop,
        proj_drop,
    )


def backend_for(device: torch.device) -> str:
    """The backend that words on this device go to, where it can do the case."""
    if _wanted != "auto":
        return _wanted
    fastest = {"cuda": "triton", "cpu": "native"}.get(device.type)
    return fastest if fastest in BACKENDS else "reference"


def backends_used() -> List[str]:
    """Return the backends logged so far, a line each, such as 'inner transformer backend: native (AVX2)'.

    The log has no line for TNT_BACKEND=reference, this list has one.
    """
    return sorted(_said) + ["inner transformer backend: reference (TNT_BACKEND)"] * (_wanted == "reference")


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """`torch.nn.functional.linear`, on CPU by the faster of two libraries: (..., in), (out, in), (out,) -> (..., out)."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript leaves out a branch of this condition alone)
        if _by_onednn(x, weight, bias):
            return onednn.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> bool:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if _wanted == "reference" or not _plain(*tensors) or torch.is_autocast_enabled("cpu"):
        return False
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False  # torch's own says what is wrong
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and _onednn_is_faster()


@torch.compiler.assume_constant_result
def _onednn_is_faster() -> bool:
    if not (torch.backends.mkldnn.enabled and onednn.faster_here()):
        return False
    _say("linear layer backend: oneDNN")
    return True


def _plain(*tensors: Optional[Tensor]) -> bool:
    """Whether an operator may take them: eager or compiled ones; no graph in the making, no torch.func, no quantized weights."""
    # the flag, because is_exporting() is always true in what torch 2.8 compiles
    if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def fallback_reasons() -> Dict[Layer, Optional[str]]:
    """Return, for each layer seen so far, the reason for the fallback to the reference, or None."""
    return dict(_reasons)


def force_reference(layers: Mapping[Layer, str]) -> None:
    """Force the fallback to the reference for these layers; `layers` maps each one to the reason for the log.

    Call it before the network is compiled, because torch.compile fixes the backend at compile time.
    """
    _forced.update(layers)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Choose backends without logging them, for a trial whose choices may still change."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def _by_operator(
    words: Tensor,
    parameters: Sequence[Optional[Tensor]],
    num_heads: int,
    eps: float,
    attn_scale: Optional[Tensor],
    mlp_scale: Optional[Tensor],
    dropout: float,
) -> Optional[Tensor]:
    """The layer by the backend of choice; None where that is the reference."""
    if not _plain(words, *parameters):
        return None
    backend, device = backend_for(words.device), words.device.type
    if backend == "reference" or device not in ("cpu", "cuda"):
        return None
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else words.dtype
    num_words = _constant(words.shape[1], BACKENDS[backend].WORDS)
    sizes = (parameters[0].shape[0], num_heads, parameters[10].shape[0])
    biases = (parameters[3] is not None, parameters[5] is not None)
    if _why_not(backend, words.device, words.dtype, dtype, num_words, *sizes, biases, dropout) is not None:
        return None
    present = [x for x in parameters if x is not None]
    return _operator(words, present, num_heads, eps, attn_scale, mlp_scale, dtype, backend)


def _constant(number: int, choices: Sequence[int]) -> Optional[int]:
    """Return `number` as a constant if it is one of `choices`, otherwise None. torch.compile adds a guard."""
    for choice in choices:
        if number == choice:
            return choice
    return None


@torch.compiler.assume_constant_result
def _why_not(
    backend: str,
    device: torch.device,
    words_dtype: torch.dtype,
    dtype: torch.dtype,
    num_words: Optional[int],
    C: int,
    num_heads: int,
    mlp_dim: int,
    biases: Tuple[bool, bool],
    dropout: float,
) -> Optional[str]:
    """Return the reason for the fallback, or None, and log the choice once; `num_words` is None where it is not supported."""
    level = logging.INFO
    if dropout > 0.0:
        why: Optional[str] = f"{backend} does not support dropout inside"
    elif biases[0] != biases[1]:
        why = f"{backend} needs a bias in both qk and v, or in neither"
    elif num_words is None:
        why = f"{backend} supports only {BACKENDS[backend].WORDS} words per sentence"
    else:
        layer = Layer(backend, words_dtype, dtype, num_words, C, num_heads, mlp_dim, biased=all(biases))
        why, level = _fallback_reason(layer, device)
        _reasons[layer] = why
    if why is not None:
        who = f"reference ({why})"
    else:
        built_for = native.library(C, num_heads, mlp_dim).instruction_set if backend == "native" else None
        who = f"{backend} ({built_for})" if built_for else backend
    _say(f"inner transformer backend: {who}", level)
    return why


def _fallback_reason(layer: Layer, device: torch.device) -> Tuple[Optional[str], int]:
    """Return the reason for the fallback on this machine, or None, and the level at which to log it."""
    if layer in _forced:
        return _forced[layer], logging.WARNING
    sizes = (layer.inner_dim, layer.num_heads, layer.mlp_dim)
    unsupported = BACKENDS[layer.backend].why_not(device.type, layer.words_dtype, layer.dtype, *sizes)
    if unsupported is not None:
        return f"{layer.backend} does not support {unsupported}", logging.INFO
    failure = _failed_check(layer, device) if layer.backend == "triton" else None
    return failure, logging.WARNING if failure else logging.INFO


def _failed_check(layer: Layer, device: torch.device) -> Optional[str]:
    """Compare the CUDA kernels with the reference, once for each layer and device; return why they failed, or None.

    Raises:
        UserError: they failed, and TNT_BACKEND asks for them by name; or a CUDA graph is being captured.
    """
    if (layer, device) not in _checks:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UserError(
                "the CUDA kernels need a check before their first use: run the network once before capturing"
            )
        _checks[layer, device] = self_check.check("triton", device, _case(layer, device))
    wrong = _checks[layer, device]
    if wrong is None:
        return None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, interpreted"
    version, dtype = BACKENDS["triton"].triton.__version__, str(layer.dtype).removeprefix("torch.")
    sizes = f"{layer.num_words} words of width {layer.inner_dim}, {layer.num_heads} heads, MLP of width {layer.mlp_dim}"
    wrong = f"the CUDA kernels failed the self-check on {gpu} (Triton {version}, {dtype}, {sizes}): {wrong}"
    if _wanted == "triton":
        raise UserError(f"TNT_BACKEND=triton: {wrong}; unset TNT_BACKEND to compute with the reference")
    return wrong


def _case(layer: Layer, device: torch.device) -> self_check.Case:
    words_dtype, dtype = (str(x).removeprefix("torch.") for x in (layer.words_dtype, layer.dtype))
    sizes = (self_check.SENTENCES[device.type], layer.num_words, layer.inner_dim, layer.num_heads)
    return self_check.Case(*sizes, dtype, layer.biased, words_dtype=words_dtype, mlp_width=layer.mlp_dim)


def _say(line: str, level: int = logging.INFO) -> None:
    if line not in _said and not _silent:
        _said.add(line)
        _logger.log(level, line)
