"""The inner transformer of a block as one operator, and linear layers. Both are computed by the fastest supported backend."""

from tnt_timm.ops.dispatch import (
    backends_used,
    fallback_reasons,
    force_reference,
    inner_transformer,
    silent,
)
from tnt_timm.ops.layer import Layer
from tnt_timm.ops.linear_layer import linear

__all__ = [
    "Layer",
    "backends_used",
    "fallback_reasons",
    "force_reference",
    "inner_transformer",
    "linear",
    "silent",
]
