"""Choose the backend that computes the inner transformer.

The fastest supported backend is chosen automatically. Set the environment variable TNT_BACKEND to override it. If the chosen
backend does not support a layer, the reference computes it, and the log gives the reason.

The reference also computes in models that are exported, traced or scripted, so that they do not need this package, and under
torch.func and forward-mode differentiation. Only the reference has second derivatives: set TNT_BACKEND=reference for them.

Before the CUDA kernels are used for the first time, `self_check` compares them with the reference. If they fail, the reference
computes after one warning. With TNT_BACKEND=triton, the failure is an error instead.
"""

import contextlib
import logging
import os
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tnt_timm.errors import UserError
from tnt_timm.ops import custom_op, reference, self_check
from tnt_timm.ops.backend_table import BACKENDS
from tnt_timm.ops.layer_description import Layer, Parameters

_CHOICES = ("auto", "reference", *BACKENDS)
wanted = os.environ.get("TNT_BACKEND", "auto")
if wanted not in _CHOICES:
    raise ImportError(f"TNT_BACKEND={wanted}: choose {', '.join(_CHOICES[:-1])} or {_CHOICES[-1]}")

_logger = logging.getLogger(__name__)
_logged: Set[str] = set()
_silent = False
_defaults = {module.DEVICE_TYPE: name for name, module in BACKENDS.items()}
_reasons: Dict[Layer, Optional[str]] = {}  # why the reference computes a layer, or None
_forced: Dict[Layer, str] = {}  # set by `force_reference`


def inner_transformer(
    words: Tensor,
    norm1_weight: Tensor, norm1_bias: Tensor,
    qk_weight: Tensor, qk_bias: Optional[Tensor], v_weight: Tensor, v_bias: Optional[Tensor],
    proj_weight: Tensor, proj_bias: Tensor,
    norm2_weight: Tensor, norm2_bias: Tensor,
    fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor,
    num_heads: int, eps: float = 1e-5, attn_scale: Optional[Tensor] = None, mlp_scale: Optional[Tensor] = None,
    attn_drop: float = 0.0, proj_drop: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute `ops.reference.inner_transformer`, which documents the arguments, by the fastest supported backend.

    Under autocast, matrix products use autocast's dtype. LayerNorm, softmax, GELU and residuals keep the dtype of the words.
    """
    if not torch.jit.is_scripting():
        parameters = (
            norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias,
            norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        )  # fmt: skip
        out = _by_backend(words, parameters, num_heads, eps, attn_scale, mlp_scale, max(attn_drop, proj_drop))
        if out is not None:
            return out
    return reference.inner_transformer(
        words, norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias,
        norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        num_heads, eps, attn_scale, mlp_scale, attn_drop, proj_drop,
    )  # fmt: skip


def _by_backend(
    words: Tensor,
    parameters: Parameters,
    num_heads: int,
    eps: float,
    attn_scale: Optional[Tensor],
    mlp_scale: Optional[Tensor],
    dropout: float,
) -> Optional[Tensor]:
    """Return the output of the chosen backend, or None if the reference must compute."""
    backend, device = backend_for(words.device), words.device.type
    if backend == "reference" or not operators_allowed(words, *parameters):
        return None
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else words.dtype
    num_words = _constant(words.shape[1], BACKENDS[backend].WORDS)
    C, F = parameters[4].shape[0], parameters[10].shape[0]
    sizes = (num_words, C, num_heads, F)
    # `1 if ... else 0`, because torch.compile cannot convert a symbolic comparison to a constant
    switches = (
        parameters[3] is not None,
        parameters[5] is not None,
        parameters[0].shape[0] != C,
        1 if dropout > 0.0 else 0,
    )
    if _reason_for_fallback(words.device, backend, words.dtype, dtype, *sizes, *switches) is not None:
        return None
    present = [x for x in parameters if x is not None]
    return custom_op.inner_transformer(words, present, num_heads, eps, attn_scale, mlp_scale, dtype, backend)


def backend_for(device: torch.device) -> str:
    """Return the backend to try for words on this device."""
    if wanted == "auto" or device.type not in ("cpu", "cuda"):
        return _defaults.get(device.type, "reference")
    return wanted


def operators_allowed(*tensors: Optional[Tensor]) -> bool:
    """Return whether custom operators can take these tensors: not in tracing, export or torch.func, and no tensor subclasses."""
    # the flag, because is_exporting() is always true inside torch.compile of PyTorch 2.8
    if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def _constant(number: int, choices: Sequence[int]) -> Optional[int]:
    """Return `number` as a constant if it is one of `choices`, otherwise None. torch.compile adds a guard."""
    for choice in choices:
        if number == choice:
            return choice
    return None


@torch.compiler.assume_constant_result
def _reason_for_fallback(device: torch.device, *fields) -> Optional[str]:
    """Return why the reference must compute the layer with these fields, or None; log the choice once."""
    layer = Layer(*fields)
    reason, level = _decide(layer, device)
    _reasons[layer] = reason
    chosen = BACKENDS[layer.backend].description(layer) if reason is None else f"reference ({reason})"
    log_once(f"inner transformer backend: {chosen}", level)
    return reason


def _decide(layer: Layer, device: torch.device) -> Tuple[Optional[str], int]:
    """Return the reason for the fallback to the reference, or None, and the level at which to log it.

    Raises:
        UserError: the CUDA kernels failed their check, and TNT_BACKEND=triton.
    """
    if layer in _forced:
        return _forced[layer], logging.WARNING
    if layer.dropout:
        unsupported: Optional[str] = "dropout inside"
    elif layer.qk_bias != layer.v_bias:
        unsupported = "a bias in only one of qk and v"
    else:
        unsupported = BACKENDS[layer.backend].unsupported(layer, device.type)
    if unsupported is not None:
        return f"{layer.backend} does not support {unsupported}", logging.INFO
    failure = self_check.failure(layer, device) if BACKENDS[layer.backend].CHECK_BEFORE_USE else None
    if failure is None:
        return None, logging.INFO
    if wanted == layer.backend:
        raise UserError(f"TNT_BACKEND={wanted}: {failure}; unset TNT_BACKEND to compute with the reference")
    return failure, logging.WARNING


def fallback_reasons() -> Dict[Layer, Optional[str]]:
    """Return, for each layer seen so far, the reason for the fallback to the reference, or None."""
    return dict(_reasons)


def force_reference(layers: Mapping[Layer, str]) -> None:
    """Force the fallback to the reference for these layers; `layers` maps each one to the reason for the log.

    Call it before the network is compiled, because torch.compile fixes the backend at compile time.
    """
    _forced.update(layers)


def log_once(line: str, level: int = logging.INFO) -> None:
    if line not in _logged and not _silent:
        _logged.add(line)
        _logger.log(level, line)


def backends_used() -> List[str]:
    """Return the backends logged so far, one line each, such as 'inner transformer backend: native (AVX2)'.

    TNT_BACKEND=reference is not logged, but has a line here.
    """
    return sorted(_logged) + ["inner transformer backend: reference (TNT_BACKEND)"] * (wanted == "reference")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Choose backends without logging them, for a trial whose choices may still change."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before
