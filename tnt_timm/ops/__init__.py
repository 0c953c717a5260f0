"""The inner transformer of a block as one operator, and linear layers; this module picks who computes them.

The inner transformer:

- `reference`: the specification in plain PyTorch; it can do everything.
- `native`: CPU, in C++, a sentence at a time; recomputed in backward.
- `triton`: CUDA in bfloat16 or float16, fused; recomputed in backward.

By itself the fastest one that can do the case is taken. The environment variable TNT_BACKEND names one instead; where
that one cannot do the case the reference does, and the log says why. The reference is also what exported, traced and
scripted models hold, so that they need nothing of this package; what torch.func transforms; and what has second derivatives.

A linear layer is torch's own, or oneDNN's on processors where that is faster and TNT_BACKEND is not `reference`.
"""

import logging
import os
from typing import List, Optional, Sequence, Set

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tnt_timm.ops import native, onednn, reference
from tnt_timm.ops.custom_op import BACKENDS
from tnt_timm.ops.custom_op import inner_transformer as _operator

__all__ = ["backend_for", "backends_used", "inner_transformer", "linear"]

_logger = logging.getLogger(__name__)
_said: Set[str] = set()
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
    words_fit = True if words.shape[1] in BACKENDS[backend].WORDS else False  # noqa: SIM210 (a guard, where compiled)
    half_biased = (parameters[3] is None) != (parameters[5] is None)
    sizes = (parameters[0].shape[0], num_heads, parameters[10].shape[0])
    why = _why_not(backend, device, words.dtype, dtype, *sizes, words_fit, dropout, half_biased)
    if why is not None:
        return None
    present = [x for x in parameters if x is not None]
    return _operator(words, present, num_heads, eps, attn_scale, mlp_scale, dtype, backend)


@torch.compiler.assume_constant_result
def _why_not(
    backend: str,
    device: str,
    words_dtype: torch.dtype,
    dtype: torch.dtype,
    C: int,
    num_heads: int,
    mlp_dim: int,
    words_fit: bool,
    dropout: float,
    half_biased: bool,
) -> Optional[str]:
    """What keeps a backend from this case; said once, as the choice is."""
    if dropout > 0.0:
        why = "dropout inside"
    elif half_biased:
        why = "a bias in qk or in v alone"
    elif not words_fit:
        why = f"a number of words per sentence that is not in {BACKENDS[backend].WORDS}"
    else:
        why = BACKENDS[backend].why_not(device, words_dtype, dtype, C, num_heads, mlp_dim)
    if why is not None:
        who = f"reference ({backend} does not support {why})"
    else:
        built_for = native.library(C, num_heads, mlp_dim).instruction_set if backend == "native" else None
        who = f"{backend} ({built_for})" if built_for else backend
    _say(f"inner transformer backend: {who}")
    return why


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        _logger.info(line)
