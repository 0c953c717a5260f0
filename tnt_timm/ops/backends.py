"""The table of backends of the inner transformer. Each backend is a module with

    DEVICE_TYPE                                            the device type on which it is the default
    WORDS                                                  the supported numbers of words per sentence
    CHECK_BEFORE_USE                                       whether `self_check` must pass first
    unsupported(layer, device_type)                        what it does not support, or None
    description(layer)                                     its name in the log
    forward(words, parameters, options)                    the new words
    backward(grad_out, words, parameters, grads, options)  the gradient of the words; writes those of the parameters into `grads`

The reference is not in the table. It is plain PyTorch and needs no operator.
"""

from types import ModuleType
from typing import Dict

from tnt_timm.ops import native

try:  # Triton is installed together with PyTorch's CUDA builds only
    from tnt_timm.ops import triton_backend
except ImportError:
    triton_backend = None

BACKENDS: Dict[str, ModuleType] = {"native": native}
if triton_backend is not None:
    BACKENDS["triton"] = triton_backend
