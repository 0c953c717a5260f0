"""The inner transformer on CUDA, fused: words are read once and written once, and nothing else is kept for backward.

A program works on a tile of T consecutive words, that is on whole sentences, as T/S groups of S = max(16, M) rows, which
is what the matrix units take; where M < 16, a group holds several sentences and scores across them are masked. Widths
are padded with zero columns (C to CP, the MLP's F to FP). All heads share one (T, CP) tile of q, of k and of v: a head is
a mask over its columns, because six columns are too few for a matrix unit, and zeros add nothing to a product.

The parameters are packed into six matrices. LayerNorm's weight and bias go into the linears that read its result, and so
does the factor of the scores; a tile has a one behind its columns, so that a bias is one more column of its matrix.
Gradients come in the same layout, those of LayerNorm's parameters among them: no vector is summed in the kernels.

`ops/reference.py` is the specification. LayerNorm, softmax, GELU and all sums are computed in float32, products with
operands of `dtype`. Backward recomputes a tile from its words, in two kernels: the MLP half turns the gradient of the
output into that of the attention half's output, and the attention half turns that into the words'. Each program adds
up its tiles' weight gradients in registers and writes them once; one reduction adds the programs' in a fixed order, so
that the same input gives the same bits.
"""

from typing import Dict, Optional, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 63  # wider words would not leave registers for the weight gradients
MAX_MLP_WIDTH = 255
WORDS = (1, 2, 4, 8, 16, 32, 64)  # per sentence
Q, K, V, PROJ = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # places of the (CP, CP) matrices
FC1, FC2 = tl.constexpr(0), tl.constexpr(1)  # and of the (FP, CP) ones behind them; fc2 is transposed
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ------------------------------------------------------------------ pieces of a tile


@triton.jit
def _matrix(pointer, index: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A packed matrix, or where its gradient goes: number `index` of those of this shape that begin at `pointer`."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return pointer + (index * ROWS * COLUMNS + row * COLUMNS + column)


INTERPRETED = tl.constexpr(
    not isinstance(_matrix, triton.JITFunction)
)  # TRITON_INTERPRET=1: on CPU, to check the kernels


@triton.jit
def _tile(pointer, tile, tokens, C: tl.constexpr, CP: tl.constexpr, T: tl.constexpr):
    token, column = tile * T + tl.arange(0, T)[:, None].to(tl.int64), tl.arange(0, CP)[None, :]
    return tl.load(pointer + token * C + column, (token < tokens) & (column < C), 0.0).to(tl.float32)


@triton.jit
def _store_tile(pointer, x, tile, tokens, C: tl.constexpr, CP: tl.constexpr, T: tl.constexpr):
    token, column = tile * T + tl.arange(0, T)[:, None].to(tl.int64), tl.arange(0, CP)[None, :]
    tl.store(pointer + token * C + column, x.to(pointer.dtype.element_ty), (token < tokens) & (column < C))


@triton.jit
def _row_scale(pointer, tile, tokens, M: tl.constexpr, T: tl.constexpr):
    """Each word's factor on a residual, which is its sentence's."""
    token = tile * T + tl.arange(0, T)
    return tl.load(pointer + token // M, token < tokens, 0.0).to(tl.float32)[:, None]


@triton.jit
def _with_one(x, C: tl.constexpr, CP: tl.constexpr):
    """A one behind the columns, which the next matrix's bias is multiplied with."""
    return tl.where(tl.arange(0, CP)[None, :] == C, 1.0, x)


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # its products know no bfloat16; those of rounded operands are the same in float32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _normalize(x, eps, C: tl.constexpr, CP: tl.constexpr):
    """LayerNorm without its parameters: (normalized (T, CP), 1 / standard deviation (T, 1))."""
    mean = tl.sum(x, 1, keep_dims=True) / C
    centred = tl.where(tl.arange(0, CP)[None, :] < C, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / C + eps)
    return centred * rstd, rstd


@triton.jit
def _normalize_backward(grad, normalized, rstd, C: tl.constexpr, CP: tl.constexpr):
    grad = tl.where(tl.arange(0, CP)[None, :] < C, grad, 0.0)
    along = tl.sum(grad * normalized, 1, keep_dims=True) / C
    return (grad - tl.sum(grad, 1, keep_dims=True) / C - normalized * along) * rstd


@triton.jit
def _qkv(x, weights, CP: tl.constexpr):
    q = _dot(x, tl.trans(tl.load(_matrix(weights, Q, CP, CP))))
    k = _dot(x, tl.trans(tl.load(_matrix(weights, K, CP, CP))))
    v = _dot(x, tl.trans(tl.load(_matrix(weights, V, CP, CP))))
    return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)


@triton.jit
def _groups(x, CP: tl.constexpr, T: tl.constexpr, S: tl.constexpr):
    return tl.reshape(x, (T // S, S, CP))


@triton.jit
def _head(x, head, D: tl.constexpr, CP: tl.constexpr, T: tl.constexpr, S: tl.constexpr):
    """One head's columns of a (T, CP) tile, the others zero, as groups (T/S, S, CP)."""
    column = tl.arange(0, CP)[None, :]
    return _groups(tl.where((column >= head * D) & (column < (head + 1) * D), x, 0.0), CP, T, S)


@triton.jit
def _probabilities(q, k, M: tl.constexpr, S: tl.constexpr):
    """Attention within groups: q, k (T/S, S, CP) -> (T/S, S, S); the scores are exponents of two."""
    scores = _dot(q, tl.permute(k, (0, 2, 1)))
    if M < S:
        row, column = tl.arange(0, S)[:, None], tl.arange(0, S)[None, :]
        scores = tl.where((row // M == column // M)[None, :, :], scores, float("-inf"))
    scores = tl.exp2(scores - tl.max(scores, 2, keep_dims=True))
    return scores / tl.sum(scores, 2, keep_dims=True)


@triton.jit
def _attention(
    words, weights, eps,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """LayerNorm, attention and its last linear."""
    normalized, _ = _normalize(words, eps, C, CP)
    q, k, v = _qkv(_with_one(normalized, C, CP).to(dtype), weights, CP)
    k = _groups(k, CP, T, S)
    out = tl.zeros((T // S, S, CP), tl.float32)
    for head in range(H):
        p = _probabilities(_head(q, head, C // H, CP, T, S), k, M, S)
        out += _dot(p.to(dtype), _head(v, head, C // H, CP, T, S))
    out = _with_one(tl.reshape(out, (T, CP)), C, CP).to(dtype)
    return _dot(out, tl.trans(tl.load(_matrix(weights, PROJ, CP, CP))))


@triton.jit
def _below(x):
    """The normal distribution function, with which nn.GELU is x * _below(x)."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


# ------------------------------------------------------------------ parameters, packed and unpacked


@triton.jit
def _load_weight(pointer, rows, columns, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A (rows, columns) weight, padded with zeros."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    return tl.load(pointer + row * row_stride + column * column_stride, mask, 0.0).to(tl.float32)


@triton.jit
def _store_weight(pointer, x, rows, columns, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    tl.store(pointer + row * row_stride + column * column_stride, x.to(pointer.dtype.element_ty), mask)


@triton.jit
def _load_vector(pointer, size, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    return tl.load(pointer + index, index < size, 0.0).to(tl.float32)


@triton.jit
def _store_vector(pointer, x, size, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(pointer + index, x.to(pointer.dtype.element_ty), index < size)


@triton.jit
def _pack(
    place, weight, bias, norm, norm_bias, factor, rows,
    C: tl.constexpr, ROWS: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """factor * (weight (norm * x + norm_bias) + bias) as one matrix for x and a one behind it; all but weight may be None."""
    w, b = _load_weight(weight, rows, C, C, 1, ROWS, CP), tl.zeros((ROWS,), tl.float32)
    if bias is not None:
        b += _load_vector(bias, rows, ROWS)
    if norm is not None:
        b += tl.sum(w * _load_vector(norm_bias, C, CP)[None, :], 1)
        w *= _load_vector(norm, C, CP)[None, :]
    packed = tl.where(tl.arange(0, CP)[None, :] == C, b[:, None], w) * factor
    tl.store(place, packed.to(place.dtype.element_ty))


@triton.jit
def _unpack(
    place, weight, norm, norm_bias, d_weight, d_bias, factor, rows,
    C: tl.constexpr, ROWS: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """The gradients of what `_pack` put together; returns those of norm and of norm_bias."""
    d_w = tl.load(place) * factor
    d_b = tl.sum(tl.where(tl.arange(0, CP)[None, :] == C, d_w, 0.0), 1)
    if d_bias is not None:
        _store_vector(d_bias, d_b, rows, ROWS)
    if norm is None:
        _store_weight(d_weight, d_w, rows, C, C, 1, ROWS, CP)
        d_norm, d_norm_bias = tl.zeros((CP,), tl.float32), tl.zeros((CP,), tl.float32)
    else:
        w = _load_weight(weight, rows, C, C, 1, ROWS, CP)
        d_norm, d_norm_bias = tl.sum(d_w * w, 0), tl.sum(d_b[:, None] * w, 0)
        norm, norm_bias = _load_vector(norm, C, CP)[None, :], _load_vector(norm_bias, C, CP)[None, :]
        _store_weight(d_weight, d_w * norm + d_b[:, None] * norm_bias, rows, C, C, 1, ROWS, CP)
    return d_norm, d_norm_bias


@triton.jit
def _pack_kernel(
    weights, scale, norm1, norm1_bias, qk, qk_bias, v, v_bias, proj, proj_bias,
    norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias,
    C: tl.constexpr, CP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
):  # fmt: skip
    """Once for all tiles: matrices q k v proj (CP, CP), fc1 and fc2 (FP, CP), rounded and padded."""
    k_bias = None if qk_bias is None else qk_bias + C
    _pack(_matrix(weights, Q, CP, CP), qk, qk_bias, norm1, norm1_bias, scale * LOG2_E, C, C, CP, CP)
    _pack(_matrix(weights, K, CP, CP), qk + C * C, k_bias, norm1, norm1_bias, 1.0, C, C, CP, CP)
    _pack(_matrix(weights, V, CP, CP), v, v_bias, norm1, norm1_bias, 1.0, C, C, CP, CP)
    _pack(_matrix(weights, PROJ, CP, CP), proj, proj_bias, None, None, 1.0, C, C, CP, CP)
    weights += 4 * CP * CP
    _pack(_matrix(weights, FC1, FP, CP), fc1, fc1_bias, norm2, norm2_bias, 1.0, F, C, FP, CP)
    bias = _load_vector(fc2_bias, C, CP)[None, :]  # transposed, so that it is a row
    packed = tl.where(tl.arange(0, FP)[:, None] == F, bias, _load_weight(fc2, F, C, 1, F, FP, CP))
    tl.store(_matrix(weights, FC2, FP, CP), packed.to(weights.dtype.element_ty))


@triton.jit
def _unpack_kernel(
    d_weights, scale, norm1, norm1_bias, qk, v, norm2, norm2_bias, fc1,
    d_norm1, d_norm1_bias, d_qk, d_qk_bias, d_v, d_v_bias, d_proj, d_proj_bias,
    d_norm2, d_norm2_bias, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias,
    C: tl.constexpr, CP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
):  # fmt: skip
    """The gradients of the parameters, from those of the packed matrices."""
    d_k_bias = None if d_qk_bias is None else d_qk_bias + C
    place = _matrix(d_weights, Q, CP, CP)
    dn_q, db_q = _unpack(place, qk, norm1, norm1_bias, d_qk, d_qk_bias, scale * LOG2_E, C, C, CP, CP)
    place = _matrix(d_weights, K, CP, CP)
    dn_k, db_k = _unpack(place, qk + C * C, norm1, norm1_bias, d_qk + C * C, d_k_bias, 1.0, C, C, CP, CP)
    dn_v, db_v = _unpack(_matrix(d_weights, V, CP, CP), v, norm1, norm1_bias, d_v, d_v_bias, 1.0, C, C, CP, CP)
    _store_vector(d_norm1, dn_q + dn_k + dn_v, C, CP)
    _store_vector(d_norm1_bias, db_q + db_k + db_v, C, CP)
    _unpack(_matrix(d_weights, PROJ, CP, CP), None, None, None, d_proj, d_proj_bias, 1.0, C, C, CP, CP)
    d_weights += 4 * CP * CP
    dn, db = _unpack(_matrix(d_weights, FC1, FP, CP), fc1, norm2, norm2_bias, d_fc1, d_fc1_bias, 1.0, F, C, FP, CP)
    _store_vector(d_norm2, dn, C, CP)
    _store_vector(d_norm2_bias, db, C, CP)
    d_w = tl.load(_matrix(d_weights, FC2, FP, CP))
    _store_weight(d_fc2, d_w, F, C, 1, F, FP, CP)
    _store_vector(d_fc2_bias, tl.sum(tl.where(tl.arange(0, FP)[:, None] == F, d_w, 0.0), 0), C, CP)


# ------------------------------------------------------------------ the layer


@triton.jit
def _forward_kernel(
    out, words, weights, attn_scale, mlp_scale, tokens, eps,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The whole layer for one tile."""
    tile = tl.program_id(0)
    x = _tile(words, tile, tokens, C, CP, T)
    branch = _attention(x, weights, eps, H, M, C, CP, T, S, dtype)
    if attn_scale is not None:
        branch *= _row_scale(attn_scale, tile, tokens, M, T)
    x += branch
    normalized, _ = _normalize(x, eps, C, CP)
    mlp = weights + 4 * CP * CP
    fc1 = tl.load(_matrix(mlp, FC1, FP, CP))
    hidden = _dot(_with_one(normalized, C, CP).to(dtype), tl.trans(fc1))
    hidden = _with_one(hidden * _below(hidden), F, FP).to(dtype)
    branch = _dot(hidden, tl.load(_matrix(mlp, FC2, FP, CP)))
    if mlp_scale is not None:
        branch *= _row_scale(mlp_scale, tile, tokens, M, T)
    _store_tile(out, x + branch, tile, tokens, C, CP, T)


@triton.jit
def _mlp_backward_kernel(
    grad_out, grad_mid, d_weights, words, weights, attn_scale, mlp_scale, tokens, tiles, eps,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The gradient of the attention half's output, and this program's share of those of the MLP half's matrices."""
    d_fc1, d_fc2 = tl.zeros((FP, CP), tl.float32), tl.zeros((FP, CP), tl.float32)
    mlp = weights + 4 * CP * CP
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # the attention half again
        x = _tile(words, tile, tokens, C, CP, T)
        branch = _attention(x, weights, eps, H, M, C, CP, T, S, dtype)
        if attn_scale is not None:
            branch *= _row_scale(attn_scale, tile, tokens, M, T)
        # the MLP half, forward and back
        normalized, rstd = _normalize(x + branch, eps, C, CP)
        x = _with_one(normalized, C, CP).to(dtype)
        hidden = _dot(x, tl.trans(tl.load(_matrix(mlp, FC1, FP, CP))))
        below = _below(hidden)
        slope = below + hidden * tl.exp(-0.5 * hidden * hidden) * 0.3989422804014327
        hidden = _with_one(hidden * below, F, FP).to(dtype)
        grad = _tile(grad_out, tile, tokens, C, CP, T)
        d_branch = grad
        if mlp_scale is not None:
            d_branch *= _row_scale(mlp_scale, tile, tokens, M, T)
        d_branch = d_branch.to(dtype)
        d_fc2 += _dot(tl.trans(hidden), d_branch)
        d_hidden = _dot(d_branch, tl.trans(tl.load(_matrix(mlp, FC2, FP, CP)))) * slope
        d_hidden = d_hidden.to(dtype)
        d_fc1 += _dot(tl.trans(d_hidden), x)
        d_x = _dot(d_hidden, tl.load(_matrix(mlp, FC1, FP, CP)))
        grad += _normalize_backward(d_x, normalized, rstd, C, CP)
        _store_tile(grad_mid, grad, tile, tokens, C, CP, T)
    d_weights += tl.program_id(0).to(tl.int64) * (4 * CP * CP + 2 * FP * CP) + 4 * CP * CP
    tl.store(_matrix(d_weights, FC1, FP, CP), d_fc1)
    tl.store(_matrix(d_weights, FC2, FP, CP), d_fc2)


@triton.jit
def _attention_backward_kernel(
    grad_words, grad_mid, d_weights, words, weights, attn_scale, tokens, tiles, eps,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The gradient of the words, and this program's share of those of the attention half's matrices."""
    d_wq, d_wk = tl.zeros((CP, CP), tl.float32), tl.zeros((CP, CP), tl.float32)
    d_wv, d_proj = tl.zeros((CP, CP), tl.float32), tl.zeros((CP, CP), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        normalized, rstd = _normalize(_tile(words, tile, tokens, C, CP, T), eps, C, CP)
        x = _with_one(normalized, C, CP).to(dtype)
        q, k, v = _qkv(x, weights, CP)
        keys, values = _groups(k, CP, T, S), _groups(v, CP, T, S)
        grad = _tile(grad_mid, tile, tokens, C, CP, T)
        d_branch = grad
        if attn_scale is not None:
            d_branch *= _row_scale(attn_scale, tile, tokens, M, T)
        d_branch = d_branch.to(dtype)
        d_out = _dot(d_branch, tl.load(_matrix(weights, PROJ, CP, CP))).to(dtype)
        out, d_q = tl.zeros((T // S, S, CP), tl.float32), tl.zeros((T // S, S, CP), tl.float32)
        d_k, d_v = tl.zeros((T // S, S, CP), tl.float32), tl.zeros((T // S, S, CP), tl.float32)
        for head in range(H):
            q_head, d_out_head = _head(q, head, C // H, CP, T, S), _head(d_out, head, C // H, CP, T, S)
            p = _probabilities(q_head, keys, M, S)
            d_scores = _dot(d_out_head, tl.permute(values, (0, 2, 1)))
            d_scores = (p * (d_scores - tl.sum(p * d_scores, 2, keep_dims=True)) * LN_2).to(dtype)
            p = p.to(dtype)
            out += _dot(p, _head(v, head, C // H, CP, T, S))
            d_v += _dot(tl.permute(p, (0, 2, 1)), d_out_head)
            d_q += _dot(d_scores, _head(k, head, C // H, CP, T, S))
            d_k += _dot(tl.permute(d_scores, (0, 2, 1)), q_head)
        out = _with_one(tl.reshape(out, (T, CP)), C, CP).to(dtype)
        d_proj += _dot(tl.trans(d_branch), out)
        d_q, d_k, d_v = tl.reshape(d_q, (T, CP)), tl.reshape(d_k, (T, CP)), tl.reshape(d_v, (T, CP))
        d_q, d_k, d_v = d_q.to(dtype), d_k.to(dtype), d_v.to(dtype)
        d_wq += _dot(tl.trans(d_q), x)
        d_wk += _dot(tl.trans(d_k), x)
        d_wv += _dot(tl.trans(d_v), x)
        d_x = _dot(d_q, tl.load(_matrix(weights, Q, CP, CP)))
        d_x += _dot(d_k, tl.load(_matrix(weights, K, CP, CP)))
        d_x += _dot(d_v, tl.load(_matrix(weights, V, CP, CP)))
        grad += _normalize_backward(d_x, normalized, rstd, C, CP)
        _store_tile(grad_words, grad, tile, tokens, C, CP, T)
    d_weights += tl.program_id(0).to(tl.int64) * (4 * CP * CP + 2 * FP * CP)
    tl.store(_matrix(d_weights, Q, CP, CP), d_wq)
    tl.store(_matrix(d_weights, K, CP, CP), d_wk)
    tl.store(_matrix(d_weights, V, CP, CP), d_wv)
    tl.store(_matrix(d_weights, PROJ, CP, CP), d_proj)


# ------------------------------------------------------------------ launching

# by padded width: words of a tile, and warps. Chosen for few instructions a word, spills included, and for shared memory that
# every GPU since 8.0 has (scripts/kernel_resources.py); not yet timed.
FORWARD = {16: (64, 4), 32: (64, 4), 64: (64, 4)}
MLP_BACKWARD = {16: (64, 4), 32: (128, 8), 64: (64, 4)}
ATTENTION_BACKWARD = {16: (64, 4), 32: (64, 4), 64: (64, 4)}
WARPS_AT_ONCE = 8  # of a multiprocessor's 65,536 registers, 255 for each thread


def why_not(
    device: str, words_dtype: torch.dtype, dtype: torch.dtype, C: int, num_heads: int, mlp_dim: int
) -> Optional[str]:
    """What keeps these kernels from a case; None when they can take it."""
    if device != ("cpu" if INTERPRETED else "cuda"):
        return f"words on {device}"
    if words_dtype not in _DTYPES:
        return f"words of {words_dtype}"
    # without tensor cores, TNT-S's MLP backward spills 2.6 KB a thread, and TNT-B's needs more shared memory than most GPUs have
    if dtype == torch.float32 and not INTERPRETED:
        return "products of float32; turn on mixed precision"
    if C > MAX_WIDTH or mlp_dim > MAX_MLP_WIDTH:
        return f"widths of {C} and {mlp_dim}, more than {MAX_WIDTH} and {MAX_MLP_WIDTH}"
    return None


def launch_sizes(launches: Dict[int, tuple], C: int, num_heads: int, M: int, F: int) -> Dict[str, int]:
    """What a kernel is compiled for: widths and padded widths, words of a tile and of a group, warps."""
    group, (CP, FP) = max(16, M), _padded_widths(C, F)
    tile, warps = launches[CP]
    return dict(
        H=num_heads, M=M, C=C, CP=CP, F=F, FP=FP, T=max(tile, group), S=group, num_warps=warps, num_stages=1
    )  # fmt: skip


def _padded_widths(C: int, F: int) -> tuple:
    return max(16, triton.next_power_of_2(C + 1)), max(16, triton.next_power_of_2(F + 1))


class _Case:
    """A layer's sizes and its packed parameters."""

    def __init__(self, words: Tensor, parameters: Sequence[Optional[Tensor]], num_heads: int, dtype: torch.dtype):
        R, self.M, self.C = words.shape
        self.words, self.num_heads, self.F = words, num_heads, len(parameters[10])
        self.tokens, self.scale = R * self.M, (self.C // num_heads) ** -0.5
        CP, FP = _padded_widths(self.C, self.F)
        self.widths = dict(C=self.C, CP=CP, F=self.F, FP=FP)
        self.dtype = _DTYPES[dtype]
        self.weights = words.new_empty(4 * CP * CP + 2 * FP * CP, dtype=dtype)
        _pack_kernel[(1,)](self.weights, self.scale, *parameters, **self.widths, num_warps=8)

    def launch(self, launches: Dict[int, tuple]) -> Dict[str, object]:
        """The keywords of a kernel's launch."""
        sizes = launch_sizes(launches, self.C, self.num_heads, self.M, self.F)
        return dict(sizes, dtype=self.dtype)


def forward(
    words: Tensor,
    parameters: Sequence[Optional[Tensor]],
    num_heads: int,
    eps: float,
    attn_scale: Optional[Tensor],
    mlp_scale: Optional[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The inner transformer; arguments as in `ops.custom_op`."""
    case, out = _Case(words, parameters, num_heads, dtype), torch.empty_like(words)
    sizes = case.launch(FORWARD)
    if case.tokens:
        _forward_kernel[(triton.cdiv(case.tokens, sizes["T"]),)](
            out, words, case.weights, attn_scale, mlp_scale, case.tokens, eps, **sizes
        )
    return out


def backward(
    grad_out: Tensor,
    words: Tensor,
    parameters: Sequence[Optional[Tensor]],
    grads: Sequence[Optional[Tensor]],
    num_heads: int,
    eps: float,
    attn_scale: Optional[Tensor],
    mlp_scale: Optional[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The words' gradient, while those of the parameters go into `grads`; arguments as in `ops.custom_op`."""
    case = _Case(words, parameters, num_heads, dtype)
    grad_mid, grad_words = torch.empty_like(words), torch.empty_like(words)
    sizes, attention_sizes = case.launch(MLP_BACKWARD), case.launch(ATTENTION_BACKWARD)
    tiles, attention_tiles = (triton.cdiv(case.tokens, x["T"]) for x in (sizes, attention_sizes))
    at_once = WARPS_AT_ONCE // min(sizes["num_warps"], attention_sizes["num_warps"])
    programs = min(max(tiles, attention_tiles), at_once * _multiprocessors(words.device))
    d_weights = words.new_empty(programs, case.weights.numel(), dtype=torch.float32)
    if case.tokens:
        _mlp_backward_kernel[(programs,)](
            grad_out, grad_mid, d_weights, words, case.weights, attn_scale, mlp_scale, case.tokens, tiles, eps, **sizes
        )
        _attention_backward_kernel[(programs,)](
            grad_words, grad_mid, d_weights, words, case.weights, attn_scale, case.tokens, attention_tiles, eps,
            **attention_sizes,
        )  # fmt: skip
    norm1, norm1_bias, qk, _, v, _, _, _, norm2, norm2_bias, fc1, *_ = parameters
    _unpack_kernel[(1,)](
        d_weights.sum(0), case.scale, norm1, norm1_bias, qk, v, norm2, norm2_bias, fc1, *grads,
        **case.widths, num_warps=8,
    )  # fmt: skip
    return grad_words


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
