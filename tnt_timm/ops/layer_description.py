"""How a layer of the inner transformer is described to its backends."""

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

Parameters = Sequence[Optional[Tensor]]  # the reference's fourteen in its order; None for a bias that does not exist


class Layer(NamedTuple):
    """Everything except the device that decides which backend computes a layer."""

    backend: str
    words_dtype: torch.dtype
    dtype: torch.dtype  # of the operands of matrix products
    num_words: Optional[int]  # M; None if the backend does not support this number
    inner_dim: int  # C
    num_heads: int  # H
    mlp_dim: int  # F
    qk_bias: bool
    v_bias: bool
    sentence_norm: bool = False  # LayerNorm over all words of a sentence, with M*C parameters
    dropout: bool = False


class Options(NamedTuple):
    """What a backend computes with, besides words and parameters."""

    num_heads: int
    eps: float
    attn_scale: Optional[Tensor]  # (R, 1, 1), or None for 1
    mlp_scale: Optional[Tensor]
    dtype: torch.dtype  # of the operands of matrix products; everything else is computed in float32
