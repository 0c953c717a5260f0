"""The specification of the inner transformer, in plain PyTorch.

Shapes: R rows (one row = one sentence; B*N of them), M words per sentence, C word width, H heads, F MLP width.

    x   = words + attn_scale * proj(attention(LN1(words)))
    out = x     + mlp_scale  * fc2(GELU(fc1(LN2(x))))

Source: the TNT paper (arXiv 2103.00112), equations 2 and 3, as in the released code: one linear computes q and k, another
one v, and stochastic depth drops the residual of each sentence independently. LayerNorm over all words of a sentence is
PyramidTNT's (arXiv 2201.00978, as in the released code).
"""

from typing import Optional

import torch.nn.functional as F
from torch import Tensor


def inner_transformer(
    words: Tensor,  # (R, M, C)
    norm1_weight: Tensor, norm1_bias: Tensor,  # (C,) or (M*C,)
    qk_weight: Tensor, qk_bias: Optional[Tensor],  # (2C, C), (2C,)
    v_weight: Tensor, v_bias: Optional[Tensor],  # (C, C), (C,)
    proj_weight: Tensor, proj_bias: Tensor,  # (C, C), (C,)
    norm2_weight: Tensor, norm2_bias: Tensor,  # (C,) or (M*C,)
    fc1_weight: Tensor, fc1_bias: Tensor,  # (F, C), (F,)
    fc2_weight: Tensor, fc2_bias: Tensor,  # (C, F), (C,)
    num_heads: int, eps: float = 1e-5, attn_scale: Optional[Tensor] = None, mlp_scale: Optional[Tensor] = None,
    attn_drop: float = 0.0, proj_drop: float = 0.0,
) -> Tensor:  # fmt: skip
    """Apply one pre-norm transformer layer to the words of every sentence.

    Args:
        words: (R, M, C), the words of R sentences.
        norm1_weight ... fc2_bias: the layer's parameters, in PyTorch's (out, in) layout. LayerNorms with C parameters are over
            each word, those with M*C over all words of a sentence.
        num_heads: H, a divisor of C.
        eps: of both LayerNorms.
        attn_scale, mlp_scale: (R, 1, 1), factors on the two residuals for stochastic depth: 0 for a dropped sentence,
            1 / keep probability for the others. None means 1.
        attn_drop, proj_drop: dropout probabilities. Pass 0 in evaluation mode.

    Returns:
        (R, M, C), the new words.
    """
    R, M, C = words.shape
    head_dim = C // num_heads

    x = _layer_norm(words, norm1_weight, norm1_bias, eps)
    q, k = F.linear(x, qk_weight, qk_bias).reshape(R, M, 2, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    v = F.linear(x, v_weight, v_bias).reshape(R, M, num_heads, head_dim).transpose(1, 2)  # (R, H, M, C/H)
    attn = (q @ k.transpose(-2, -1)) * head_dim**-0.5  # (R, H, M, M)
    attn = F.dropout(attn.softmax(dim=-1), attn_drop)
    x = (attn @ v).transpose(1, 2).reshape(R, M, C)
    x = F.dropout(F.linear(x, proj_weight, proj_bias), proj_drop)
    words = words + (x if attn_scale is None else x * attn_scale)

    x = _layer_norm(words, norm2_weight, norm2_bias, eps)
    x = F.dropout(F.gelu(F.linear(x, fc1_weight, fc1_bias)), proj_drop)
    x = F.dropout(F.linear(x, fc2_weight, fc2_bias), proj_drop)
    return words + (x if mlp_scale is None else x * mlp_scale)


def _layer_norm(words: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    _, M, C = words.shape
    shape = [C] if weight.shape[0] == C else [M, C]
    return F.layer_norm(words, shape, weight.reshape(shape), bias.reshape(shape), eps)
