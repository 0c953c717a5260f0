"""The inner transformer on CUDA, fused: words are read once and written once, and nothing else is kept for backward.

A program works on a tile of T consecutive words, that is on whole sentences, as T/S groups of S = max(16, M) rows, which
is what the matrix units take; where M < 16, a group holds several sentences and scores across them are masked. Widths
are padded with zero columns (C to CP, the MLP's to FP). All heads share one (T, CP) tile of q, of k and of v: a head is a
mask over its columns, because six columns are too few for a matrix unit, and zeros add nothing to a product.

`ops/reference.py` is the specification. LayerNorm, softmax, GELU and all sums are computed in float32, products with
operands of `dtype`. Backward recomputes a tile from its words, in two kernels: the MLP half turns the gradient of the
output into that of the attention half's output, and the attention half turns that into the words'. Each program adds
up its tiles' weight gradients in registers and writes them once; one reduction adds the programs' in a fixed order, so
that the same input gives the same bits.
"""

from typing import Dict, List, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 63  # wider words would not leave registers for the weight gradients
# places of the packed matrices (CP, CP), (FP, CP), and vectors (CP)
Q, K, V, PROJ = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
FC1, FC2 = tl.constexpr(0), tl.constexpr(1)
NORM1, NORM1_BIAS, PROJ_BIAS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NORM2, NORM2_BIAS, FC2_BIAS = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
# a warp to 16 words, so that attention stays inside it; backward's weight gradients need the registers of more
FORWARD = dict(num_warps=4, num_stages=1)
MLP_BACKWARD = dict(num_warps=8, num_stages=1)
ATTENTION_BACKWARD = dict(num_warps=8, num_stages=1)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: on CPU, to check the kernels
MAX_MLP_WIDTH = 256
WORDS = (1, 2, 4, 8, 16, 32, 64)  # per sentence
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ------------------------------------------------------------------ pieces of a tile


@triton.jit
def _padded(
    pointer, bias, rows, columns, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A (rows, columns) weight, with its bias as one more column, padded with zeros."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    weight = tl.load(pointer + row * row_stride + column * column_stride, (row < rows) & (column < columns), 0.0)
    if bias is not None:
        weight += tl.load(bias + row + 0 * column, (row < rows) & (column == columns), 0.0)
    return weight


@triton.jit
def _padded_vector(pointer, size, last: tl.constexpr, SIZE: tl.constexpr):
    """A vector and then `last`, padded with zeros, as a row."""
    index = tl.arange(0, SIZE)[None, :]
    return tl.where(index == size, last, tl.load(pointer + index, index < size, 0.0).to(tl.float32))


@triton.jit
def _matrix(pointer, index: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A packed weight, or where its gradient goes: number `index` of those of this shape that begin at `pointer`."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return pointer + (index * ROWS * COLUMNS + row * COLUMNS + column)


@triton.jit
def _vector(pointer, index: tl.constexpr, SIZE: tl.constexpr):
    return tl.load(pointer + index * SIZE + tl.arange(0, SIZE))[None, :]


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
def _dot(a, b, precision: tl.constexpr):
    if INTERPRETED:  # its products know no bfloat16; those of rounded operands are the same in float32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=precision)


@triton.jit
def _normalize(x, eps, C: tl.constexpr, CP: tl.constexpr):
    """LayerNorm without its parameters: (normalized (T, CP), 1 / standard deviation (T, 1))."""
    mean = tl.sum(x, 1, keep_dims=True) / C
    centred = tl.where(tl.arange(0, CP)[None, :] < C, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / C + eps)
    return centred * rstd, rstd


@triton.jit
def _normalize_backward(grad, normalized, rstd, weight, C: tl.constexpr):
    grad = grad * weight
    along = tl.sum(grad * normalized, 1, keep_dims=True) / C
    return (grad - tl.sum(grad, 1, keep_dims=True) / C - normalized * along) * rstd


@triton.jit
def _qkv(x, weights, CP: tl.constexpr, precision: tl.constexpr):
    q = _dot(x, tl.trans(tl.load(_matrix(weights, Q, CP, CP))), precision)
    k = _dot(x, tl.trans(tl.load(_matrix(weights, K, CP, CP))), precision)
    v = _dot(x, tl.trans(tl.load(_matrix(weights, V, CP, CP))), precision)
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
def _probabilities(q, k, scale, M: tl.constexpr, S: tl.constexpr, precision: tl.constexpr):
    """Attention within groups: q, k (T/S, S, CP) -> (T/S, S, S)."""
    scores = _dot(q, tl.permute(k, (0, 2, 1)), precision) * scale
    if M < S:
        row, column = tl.arange(0, S)[:, None], tl.arange(0, S)[None, :]
        scores = tl.where((row // M == column // M)[None, :, :], scores, float("-inf"))
    scores = tl.exp(scores - tl.max(scores, 2, keep_dims=True))
    return scores / tl.sum(scores, 2, keep_dims=True)


@triton.jit
def _attention(
    words, weights, vectors, scale, eps,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    dtype: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """LayerNorm, attention and its last linear."""
    normalized, _ = _normalize(words, eps, C, CP)
    x = (normalized * _vector(vectors, NORM1, CP) + _vector(vectors, NORM1_BIAS, CP)).to(dtype)
    q, k, v = _qkv(x, weights, CP, precision)
    k = _groups(k, CP, T, S)
    out = tl.zeros((T // S, S, CP), tl.float32)
    for head in range(H):
        p = _probabilities(_head(q, head, C // H, CP, T, S), k, scale, M, S, precision)
        out += _dot(p.to(dtype), _head(v, head, C // H, CP, T, S), precision)
    out = tl.reshape(out, (T, CP)).to(dtype)
    return _dot(out, tl.trans(tl.load(_matrix(weights, PROJ, CP, CP))), precision) + _vector(vectors, PROJ_BIAS, CP)


@triton.jit
def _below(x):
    """The normal distribution function, with which nn.GELU is x * _below(x)."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


# ------------------------------------------------------------------ kernels


@triton.jit
def _pack_kernel(
    weights, vectors, norm1, norm1_bias, qk, qk_bias, v, v_bias, proj, proj_bias,
    norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias,
    C: tl.constexpr, CP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
):  # fmt: skip
    """Round and pad the parameters, once for all tiles: matrices q k v proj (CP, CP), fc1 and fc2 (FP, CP)."""
    type = weights.dtype.element_ty
    tl.store(_matrix(weights, Q, CP, CP), _padded(qk, qk_bias, C, C, C, 1, CP, CP).to(type))
    k_bias = None if qk_bias is None else qk_bias + C
    tl.store(_matrix(weights, K, CP, CP), _padded(qk + C * C, k_bias, C, C, C, 1, CP, CP).to(type))
    tl.store(_matrix(weights, V, CP, CP), _padded(v, v_bias, C, C, C, 1, CP, CP).to(type))
    tl.store(_matrix(weights, PROJ, CP, CP), _padded(proj, None, C, C, C, 1, CP, CP).to(type))
    weights += 4 * CP * CP
    tl.store(_matrix(weights, FC1, FP, CP), _padded(fc1, fc1_bias, F, C, C, 1, FP, CP).to(type))
    tl.store(_matrix(weights, FC2, FP, CP), _padded(fc2, None, F, C, 1, F, FP, CP).to(type))
    tl.store(_matrix(vectors, NORM1, 1, CP), _padded_vector(norm1, C, 0.0, CP))
    tl.store(_matrix(vectors, NORM1_BIAS, 1, CP), _padded_vector(norm1_bias, C, 1.0, CP))
    tl.store(_matrix(vectors, PROJ_BIAS, 1, CP), _padded_vector(proj_bias, C, 0.0, CP))
    tl.store(_matrix(vectors, NORM2, 1, CP), _padded_vector(norm2, C, 0.0, CP))
    tl.store(_matrix(vectors, NORM2_BIAS, 1, CP), _padded_vector(norm2_bias, C, 1.0, CP))
    tl.store(_matrix(vectors, FC2_BIAS, 1, CP), _padded_vector(fc2_bias, C, 0.0, CP))


@triton.jit
def _forward_kernel(
    out, words, weights, vectors, attn_scale, mlp_scale, tokens, scale, eps,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, FP: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, dtype: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The whole layer for one tile."""
    tile = tl.program_id(0)
    x = _tile(words, tile, tokens, C, CP, T)
    branch = _attention(x, weights, vectors, scale, eps, H, M, C, CP, T, S, dtype, precision)
    if attn_scale is not None:
        branch *= _row_scale(attn_scale, tile, tokens, M, T)
    x += branch
    normalized, _ = _normalize(x, eps, C, CP)
    branch = (normalized * _vector(vectors, NORM2, CP) + _vector(vectors, NORM2_BIAS, CP)).to(dtype)
    mlp = weights + 4 * CP * CP
    hidden = _dot(branch, tl.trans(tl.load(_matrix(mlp, FC1, FP, CP))), precision)
    hidden = (hidden * _below(hidden)).to(dtype)
    branch = _dot(hidden, tl.load(_matrix(mlp, FC2, FP, CP)), precision) + _vector(vectors, FC2_BIAS, CP)
    if mlp_scale is not None:
        branch *= _row_scale(mlp_scale, tile, tokens, M, T)
    _store_tile(out, x + branch, tile, tokens, C, CP, T)


@triton.jit
def _mlp_backward_kernel(
    grad_out, grad_mid, d_weights, d_vectors, words, weights, vectors, attn_scale, mlp_scale, tokens, tiles, scale, eps,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, FP: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, dtype: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The gradient of the attention half's output, and this program's share of those of the MLP half's parameters."""
    d_norm, d_norm_bias = tl.zeros((T, CP), tl.float32), tl.zeros((T, CP), tl.float32)
    d_fc2_bias = tl.zeros((T, CP), tl.float32)
    d_fc1, d_fc2 = tl.zeros((FP, CP), tl.float32), tl.zeros((FP, CP), tl.float32)
    mlp = weights + 4 * CP * CP
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # the attention half again
        x = _tile(words, tile, tokens, C, CP, T)
        branch = _attention(x, weights, vectors, scale, eps, H, M, C, CP, T, S, dtype, precision)
        if attn_scale is not None:
            branch *= _row_scale(attn_scale, tile, tokens, M, T)
        # the MLP half, forward and back
        normalized, rstd = _normalize(x + branch, eps, C, CP)
        branch = (normalized * _vector(vectors, NORM2, CP) + _vector(vectors, NORM2_BIAS, CP)).to(dtype)
        hidden = _dot(branch, tl.trans(tl.load(_matrix(mlp, FC1, FP, CP))), precision)
        below = _below(hidden)
        slope = below + hidden * tl.exp(-0.5 * hidden * hidden) * 0.3989422804014327
        hidden = (hidden * below).to(dtype)
        grad = _tile(grad_out, tile, tokens, C, CP, T)
        d_branch = grad
        if mlp_scale is not None:
            d_branch *= _row_scale(mlp_scale, tile, tokens, M, T)
        d_fc2_bias += d_branch
        d_branch = d_branch.to(dtype)
        d_fc2 += _dot(tl.trans(hidden), d_branch, precision)
        d_hidden = _dot(d_branch, tl.trans(tl.load(_matrix(mlp, FC2, FP, CP))), precision) * slope
        d_hidden = d_hidden.to(dtype)
        d_fc1 += _dot(tl.trans(d_hidden), branch, precision)
        d_branch = _dot(d_hidden, tl.load(_matrix(mlp, FC1, FP, CP)), precision)
        d_norm += d_branch * normalized
        d_norm_bias += d_branch
        grad += _normalize_backward(d_branch, normalized, rstd, _vector(vectors, NORM2, CP), C)
        _store_tile(grad_mid, grad, tile, tokens, C, CP, T)
    d_weights += tl.program_id(0).to(tl.int64) * (4 * CP * CP + 2 * FP * CP) + 4 * CP * CP
    d_vectors += tl.program_id(0).to(tl.int64) * 6 * CP
    tl.store(_matrix(d_weights, FC1, FP, CP), d_fc1)
    tl.store(_matrix(d_weights, FC2, FP, CP), d_fc2)
    tl.store(_matrix(d_vectors, NORM2, 1, CP), tl.sum(d_norm, 0, keep_dims=True))
    tl.store(_matrix(d_vectors, NORM2_BIAS, 1, CP), tl.sum(d_norm_bias, 0, keep_dims=True))
    tl.store(_matrix(d_vectors, FC2_BIAS, 1, CP), tl.sum(d_fc2_bias, 0, keep_dims=True))


@triton.jit
def _attention_backward_kernel(
    grad_words, grad_mid, d_weights, d_vectors, words, weights, vectors, attn_scale, tokens, tiles, scale, eps,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, FP: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, dtype: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The gradient of the words, and this program's share of those of the attention half's parameters."""
    d_norm, d_norm_bias = tl.zeros((T, CP), tl.float32), tl.zeros((T, CP), tl.float32)
    d_proj_bias = tl.zeros((T, CP), tl.float32)
    d_wq, d_wk = tl.zeros((CP, CP), tl.float32), tl.zeros((CP, CP), tl.float32)
    d_wv, d_proj = tl.zeros((CP, CP), tl.float32), tl.zeros((CP, CP), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        normalized, rstd = _normalize(_tile(words, tile, tokens, C, CP, T), eps, C, CP)
        x = (normalized * _vector(vectors, NORM1, CP) + _vector(vectors, NORM1_BIAS, CP)).to(dtype)
        q, k, v = _qkv(x, weights, CP, precision)
        keys, values = _groups(k, CP, T, S), _groups(v, CP, T, S)
        grad = _tile(grad_mid, tile, tokens, C, CP, T)
        d_branch = grad
        if attn_scale is not None:
            d_branch *= _row_scale(attn_scale, tile, tokens, M, T)
        d_proj_bias += d_branch
        d_branch = d_branch.to(dtype)
        d_out = _dot(d_branch, tl.load(_matrix(weights, PROJ, CP, CP)), precision).to(dtype)
        out, d_q = tl.zeros((T // S, S, CP), tl.float32), tl.zeros((T // S, S, CP), tl.float32)
        d_k, d_v = tl.zeros((T // S, S, CP), tl.float32), tl.zeros((T // S, S, CP), tl.float32)
        for head in range(H):
            q_head, d_out_head = _head(q, head, C // H, CP, T, S), _head(d_out, head, C // H, CP, T, S)
            p = _probabilities(q_head, keys, scale, M, S, precision)
            d_scores = _dot(d_out_head, tl.permute(values, (0, 2, 1)), precision)
            d_scores = (p * (d_scores - tl.sum(p * d_scores, 2, keep_dims=True)) * scale).to(dtype)
            p = p.to(dtype)
            out += _dot(p, _head(v, head, C // H, CP, T, S), precision)
            d_v += _dot(tl.permute(p, (0, 2, 1)), d_out_head, precision)
            d_q += _dot(d_scores, _head(k, head, C // H, CP, T, S), precision)
            d_k += _dot(tl.permute(d_scores, (0, 2, 1)), q_head, precision)
        d_proj += _dot(tl.trans(d_branch), tl.reshape(out, (T, CP)).to(dtype), precision)
        d_q, d_k, d_v = tl.reshape(d_q, (T, CP)), tl.reshape(d_k, (T, CP)), tl.reshape(d_v, (T, CP))
        d_q, d_k, d_v = d_q.to(dtype), d_k.to(dtype), d_v.to(dtype)
        d_wq += _dot(tl.trans(d_q), x, precision)
        d_wk += _dot(tl.trans(d_k), x, precision)
        d_wv += _dot(tl.trans(d_v), x, precision)
        d_x = _dot(d_q, tl.load(_matrix(weights, Q, CP, CP)), precision)
        d_x += _dot(d_k, tl.load(_matrix(weights, K, CP, CP)), precision)
        d_x += _dot(d_v, tl.load(_matrix(weights, V, CP, CP)), precision)
        d_norm += d_x * normalized
        d_norm_bias += d_x
        grad += _normalize_backward(d_x, normalized, rstd, _vector(vectors, NORM1, CP), C)
        _store_tile(grad_words, grad, tile, tokens, C, CP, T)
    d_weights += tl.program_id(0).to(tl.int64) * (4 * CP * CP + 2 * FP * CP)
    d_vectors += tl.program_id(0).to(tl.int64) * 6 * CP
    tl.store(_matrix(d_weights, Q, CP, CP), d_wq)
    tl.store(_matrix(d_weights, K, CP, CP), d_wk)
    tl.store(_matrix(d_weights, V, CP, CP), d_wv)
    tl.store(_matrix(d_weights, PROJ, CP, CP), d_proj)
    tl.store(_matrix(d_vectors, PROJ_BIAS, 1, CP), tl.sum(d_proj_bias, 0, keep_dims=True))
    tl.store(_matrix(d_vectors, NORM1, 1, CP), tl.sum(d_norm, 0, keep_dims=True))
    tl.store(_matrix(d_vectors, NORM1_BIAS, 1, CP), tl.sum(d_norm_bias, 0, keep_dims=True))


# ------------------------------------------------------------------ launching


def why_not(
    device: str, words_dtype: torch.dtype, dtype: torch.dtype, C: int, num_heads: int, mlp_dim: int
) -> Optional[str]:
    """What keeps these kernels from a case; None when they can take it."""
    if device != ("cpu" if INTERPRETED else "cuda"):
        return f"words on {device}"
    if words_dtype not in _DTYPES:
        return f"words of {words_dtype}"
    # without tensor cores, TNT-S's MLP backward spills 8 KB a thread, and TNT-B's needs more shared memory than most GPUs have
    if dtype == torch.float32 and not INTERPRETED:
        return "products of float32; turn on mixed precision"
    if C > MAX_WIDTH or mlp_dim > MAX_MLP_WIDTH:
        return f"widths of {C} and {mlp_dim}, more than {MAX_WIDTH} and {MAX_MLP_WIDTH}"
    return None


class _Plan:
    """How a case is cut up, and its packed parameters."""

    def __init__(self, words: Tensor, parameters: Sequence[Optional[Tensor]], num_heads: int, dtype: torch.dtype):
        R, M, C = words.shape
        F = len(parameters[10])
        CP, FP = _padded_widths(C, F)
        self.tokens, self.scale = R * M, (C // num_heads) ** -0.5
        self.sizes = dict(
            kernel_sizes(C, num_heads, M, F), dtype=_DTYPES[dtype],
            precision="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        )  # fmt: skip
        self.tiles = triton.cdiv(self.tokens, self.sizes["T"])
        self.lengths = (4 * CP * CP + 2 * FP * CP, 6 * CP)
        self.weights = words.new_empty(self.lengths[0], dtype=dtype)
        self.vectors = words.new_empty(self.lengths[1], dtype=torch.float32)
        _pack_kernel[(1,)](self.weights, self.vectors, *parameters, C=C, CP=CP, F=F, FP=FP, num_warps=8)

    def programs(self, device: torch.device) -> int:
        """Programs of a backward kernel: as many as run at once, each with its share of the tiles."""
        at_once = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        return min(self.tiles, at_once)


def _padded_widths(C: int, F: int) -> Tuple[int, int]:
    return max(16, triton.next_power_of_2(C + 1)), max(16, triton.next_power_of_2(F))


def kernel_sizes(C: int, num_heads: int, M: int, F: int) -> Dict[str, int]:
    """What the kernels are compiled for: widths, padded widths, words of a tile and of a group."""
    group = max(16, M)
    CP, FP = _padded_widths(C, F)
    return dict(H=num_heads, M=M, C=C, CP=CP, FP=FP, T=max(64, group), S=group)


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
    plan = _Plan(words, parameters, num_heads, dtype)
    out = torch.empty_like(words)
    if plan.tiles:
        _forward_kernel[(plan.tiles,)](
            out, words, plan.weights, plan.vectors, attn_scale, mlp_scale, plan.tokens, plan.scale, eps,
            **plan.sizes, **FORWARD,
        )  # fmt: skip
    return out


def backward(
    grad_out: Tensor,
    words: Tensor,
    parameters: Sequence[Optional[Tensor]],
    num_heads: int,
    eps: float,
    attn_scale: Optional[Tensor],
    mlp_scale: Optional[Tensor],
    dtype: torch.dtype,
) -> Tuple[Tensor, List[Tensor]]:
    """The gradients of the words, and of the fourteen parameters as views or of another type."""
    plan = _Plan(words, parameters, num_heads, dtype)
    programs = plan.programs(words.device)
    grad_mid, grad_words = torch.empty_like(words), torch.empty_like(words)
    d_weights, d_vectors = (words.new_empty(programs, length, dtype=torch.float32) for length in plan.lengths)
    if plan.tiles:
        numbers = (plan.tokens, plan.tiles, plan.scale, eps)
        _mlp_backward_kernel[(programs,)](
            grad_out, grad_mid, d_weights, d_vectors, words, plan.weights, plan.vectors, attn_scale, mlp_scale, *numbers,
            **plan.sizes, **MLP_BACKWARD,
        )  # fmt: skip
        _attention_backward_kernel[(programs,)](
            grad_words, grad_mid, d_weights, d_vectors, words, plan.weights, plan.vectors, attn_scale, *numbers,
            **plan.sizes, **ATTENTION_BACKWARD,
        )  # fmt: skip
    grads = _unpacked(d_weights.sum(0), d_vectors.sum(0), plan.sizes, len(parameters[10]))
    return grad_words, grads


def _unpacked(weights: Tensor, vectors: Tensor, sizes: Dict[str, int], F: int) -> List[Tensor]:
    """The parameters' gradients in the reference's order, out of the layout of `_pack_kernel`."""
    C, CP, FP = sizes["C"], sizes["CP"], sizes["FP"]
    q, k, v, proj = weights[: 4 * CP * CP].view(4, CP, CP)[:, :C, :C]
    fc1, fc2 = weights[4 * CP * CP :].view(2, FP, CP)[:, :F]
    (q_bias, k_bias, v_bias), fc1_bias = weights[: 3 * CP * CP].view(3, CP, CP)[:, :C, C], fc1[:, C]
    rows = vectors.view(6, CP)[:, :C]
    return [
        rows[NORM1.value], rows[NORM1_BIAS.value], torch.cat([q, k]), torch.cat([q_bias, k_bias]), v, v_bias,
        proj, rows[PROJ_BIAS.value], rows[NORM2.value], rows[NORM2_BIAS.value],
        fc1[:, :C], fc1_bias, fc2[:, :C].t(), rows[FC2_BIAS.value],
    ]  # fmt: skip
