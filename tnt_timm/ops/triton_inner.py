"""The inner transformer on CUDA, fused: words are read once and written once, and nothing else is kept for backward.

A program works on a tile of T consecutive words, that is on whole sentences, as T/S groups of S = max(16, M) rows, the
smallest size that tensor cores accept; where M < 16, a group holds several sentences and scores across them are masked. Widths
are padded with zero columns: words from C to CP, each head from D to DP, the MLP from F to FP. The padding makes a head's
columns a matrix of their own, so that one product computes the scores of all groups and heads. The kernels work on HS
columns of the heads and FS columns of the MLP at a time, which spares registers. Parameters and
their gradients are packed (`triton_packing`).

`ops/reference.py` is the specification. LayerNorm, softmax, GELU and all sums are computed in float32, products with
operands of `dtype`. Backward recomputes a tile from its words, in two kernels: the MLP half turns the gradient of the
output into that of the attention half's output, and the attention half turns that into the words'. Each program adds
up its tiles' weight gradients in registers and writes them once; one reduction adds the programs' in a fixed order, so
that the same input gives the same bits.
"""

from typing import Dict, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_timm.ops import triton_launches
from tnt_timm.ops.triton_packing import PROJ, K, Q, V, matrix, pack_kernel, unpack_kernel, widths

MAX_WIDTH = 63  # wider words would not leave registers for the weight gradients
MAX_MLP_WIDTH = 255
WORDS = (1, 2, 4, 8, 16, 32, 64)  # per sentence
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(not isinstance(matrix, triton.JITFunction))  # on CPU, by TRITON_INTERPRET=1, to be checked
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ------------------------------------------------------------------ pieces of a tile


@triton.jit
def _tile(pointer, tile, tokens, C: tl.constexpr, CP: tl.constexpr, T: tl.constexpr, again: tl.constexpr = False):
    """A tile in float32. With `again`, wide words are loaded again to save registers."""
    # another eviction policy, because the compiler merges equal loads
    policy: tl.constexpr = "evict_last" if again and CP >= 64 else ""
    token, column = tile * T + tl.arange(0, T)[:, None].to(tl.int64), tl.arange(0, CP)[None, :]
    mask = (token < tokens) & (column < C)
    return tl.load(pointer + token * C + column, mask, 0.0, eviction_policy=policy).to(tl.float32)


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
    """Put a 1 after the last column. It multiplies the bias of the next matrix."""
    return tl.where(tl.arange(0, CP)[None, :] == C, 1.0, x)


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # its products know no bfloat16; those of rounded operands are the same in float32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _normalize(x, eps, C: tl.constexpr, CP: tl.constexpr):
    """LayerNorm without its parameters: (normalized (T, CP), mean, 1 / standard deviation (T, 1))."""
    mean = tl.sum(x, 1, keep_dims=True) / C
    centred = tl.where(tl.arange(0, CP)[None, :] < C, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / C + eps)
    return centred * rstd, mean, rstd


@triton.jit
def _normalize_backward(grad, x, mean, rstd, C: tl.constexpr, CP: tl.constexpr):
    """The gradient of `x`, with zeros in the padding."""
    normalized = (x - mean) * rstd
    grad = tl.where(tl.arange(0, CP)[None, :] < C, grad, 0.0)
    along = tl.sum(grad * normalized, 1, keep_dims=True) / C
    return (grad - tl.sum(grad, 1, keep_dims=True) / C - normalized * along) * rstd


@triton.jit
def _split_heads(x, HS: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, S: tl.constexpr):
    """The heads of every group: (T, HS) -> (heads * T/S, S, DP)."""
    x = tl.permute(tl.reshape(x, (T // S, S, HS // DP, DP)), (2, 0, 1, 3))
    return tl.reshape(x, (HS // DP * (T // S), S, DP))


@triton.jit
def _join_heads(x, HS: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, S: tl.constexpr):
    """(heads * T/S, S, DP) -> (T, HS)."""
    x = tl.permute(tl.reshape(x, (HS // DP, T // S, S, DP)), (1, 2, 0, 3))
    return tl.reshape(x, (T, HS))


@triton.jit
def _heads(
    x, weights, first: tl.constexpr,
    CP: tl.constexpr, HS: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """A slice of heads of x times the transposed matrix from row `first` on: (heads * T/S, S, DP)."""
    x = _dot(x, tl.trans(tl.load(matrix(weights, first, HS, CP)))).to(x.dtype)
    return _split_heads(x, HS, DP, T, S)


@triton.jit
def _probabilities(q, k, M: tl.constexpr, S: tl.constexpr):
    """Attention within groups: q, k (N, S, DP) -> (N, S, S); the scores are exponents of two."""
    scores = _dot(q, tl.permute(k, (0, 2, 1)))
    if M < S:
        row, column = tl.arange(0, S)[:, None], tl.arange(0, S)[None, :]
        scores = tl.where((row // M == column // M)[None, :, :], scores, float("-inf"))
    scores = tl.exp2(scores - tl.max(scores, 2, keep_dims=True))
    return scores * (1.0 / tl.sum(scores, 2, keep_dims=True))


@triton.jit
def _attention(
    words, weights, eps,
    M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
    HS: tl.constexpr, T: tl.constexpr, S: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """LayerNorm, attention and its last linear."""
    normalized, _, _ = _normalize(words, eps, C, CP)
    x, branch = _with_one(normalized, C, CP).to(dtype), tl.zeros((T, CP), tl.float32)
    parts: tl.constexpr = HP // HS
    for part in tl.static_range(parts):
        q = _heads(x, weights, Q * HP + part * HS, CP, HS, DP, T, S)
        k = _heads(x, weights, K * HP + part * HS, CP, HS, DP, T, S)
        p = _probabilities(q, k, M, S).to(dtype)
        v = _heads(x, weights, V * HP + part * HS, CP, HS, DP, T, S)
        out = _join_heads(_dot(p, v), HS, DP, T, S)
        if part == 0:
            out = _with_one(out, D, HS)
        branch += _dot(out.to(dtype), tl.load(matrix(weights, PROJ * HP + part * HS, HS, CP)))
    return branch


@triton.jit
def _above(x):
    """The normal distribution's tail beyond |x|, with an error below 1e-6.

    Its binary logarithm is a polynomial, which takes a quarter of erf's instructions. The coefficients minimize the
    largest error of the tail.
    """
    x = tl.abs(x)
    exponent = -5.0213733e-4 * x + 7.2897308e-3
    exponent = exponent * x - 5.2346561e-2
    exponent = exponent * x - 4.5942501e-1
    exponent = exponent * x - 1.1510438
    return tl.exp2(exponent * x - 1.0000026)


@triton.jit
def _gelu(x):
    return tl.maximum(x, 0.0) - tl.abs(x) * _above(x)


@triton.jit
def _gelu_and_slope(x):
    """(GELU, its derivative)."""
    above = _above(x)
    below = tl.where(x > 0, 1.0 - above, above)
    return x * below, below + x * tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361593)


@triton.jit
def _mlp_slice(branch, x, mlp, first: tl.constexpr, FP: tl.constexpr, SLICE: tl.constexpr, CP: tl.constexpr):
    """`branch` and what a slice of the MLP adds to it."""
    hidden = _dot(x, tl.trans(tl.load(matrix(mlp, first, SLICE, CP))))
    return branch + _dot(_gelu(hidden).to(x.dtype), tl.load(matrix(mlp, FP + first, SLICE, CP)))


# ------------------------------------------------------------------ the layer


@triton.jit(do_not_specialize=["tokens"])  # one compilation for all batches
def _forward_kernel(
    out, words, weights, attn_scale, mlp_scale, tokens, eps,
    M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
    HS: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FS: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The whole layer for one tile."""
    tile = tl.program_id(0)
    x = _tile(words, tile, tokens, C, CP, T)
    branch = _attention(x, weights, eps, M, C, CP, D, DP, HP, HS, T, S, dtype)
    if attn_scale is not None:
        branch *= _row_scale(attn_scale, tile, tokens, M, T)
    x += branch
    normalized, _, _ = _normalize(x, eps, C, CP)
    normalized = _with_one(normalized, C, CP).to(dtype)
    # the bias of fc2 is added here, so that the MLP needs no extra column, and a half slice may be enough at the end
    SLICE: tl.constexpr = FS if F >= FS or FS < 64 else FS // 2
    mlp = weights + 4 * HP * CP
    bias = tl.load(mlp + (FP + F) * CP + tl.arange(0, CP)).to(tl.float32)
    branch = tl.zeros((T, CP), tl.float32) + bias[None, :]
    for part in tl.static_range(F // SLICE):
        branch = _mlp_slice(branch, normalized, mlp, part * SLICE, FP, SLICE, CP)
    if F % SLICE > SLICE // 2 or (F % SLICE > 0 and SLICE < 32):
        branch = _mlp_slice(branch, normalized, mlp, F // SLICE * SLICE, FP, SLICE, CP)
    elif F % SLICE > 0:
        branch = _mlp_slice(branch, normalized, mlp, F // SLICE * SLICE, FP, SLICE // 2, CP)
    if mlp_scale is not None:
        branch *= _row_scale(mlp_scale, tile, tokens, M, T)
    _store_tile(out, x + branch, tile, tokens, C, CP, T)


@triton.jit(do_not_specialize=["tokens", "tiles"])  # one compilation for all batches
def _mlp_backward_kernel(
    grad_out, grad_mid, d_weights, words, weights, attn_scale, mlp_scale, tokens, tiles, eps,
    M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
    HS: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FS: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The gradient of the attention half's output, and this program's share of those of the MLP half's matrices."""
    d_mlp = (tl.zeros((FS, CP), tl.float32),) * (2 * FP // FS)  # of fc1's slices, then of fc2's
    mlp = weights + 4 * HP * CP
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # the attention half again
        x = _tile(words, tile, tokens, C, CP, T)
        branch = _attention(x, weights, eps, M, C, CP, D, DP, HP, HS, T, S, dtype)
        if attn_scale is not None:
            branch *= _row_scale(attn_scale, tile, tokens, M, T)
        # the MLP half, forward and back
        mid = x + branch
        normalized, mean, rstd = _normalize(mid, eps, C, CP)
        x = _with_one(normalized, C, CP).to(dtype)
        d_branch = _tile(grad_out, tile, tokens, C, CP, T)
        if mlp_scale is not None:
            d_branch *= _row_scale(mlp_scale, tile, tokens, M, T)
        d_branch = d_branch.to(dtype)
        d_x, d_fc1, d_fc2 = tl.zeros((T, CP), tl.float32), (), ()
        for part in tl.static_range(FP // FS):
            fc1, fc2 = tl.load(matrix(mlp, part * FS, FS, CP)), tl.load(matrix(mlp, FP + part * FS, FS, CP))
            hidden, slope = _gelu_and_slope(_dot(x, tl.trans(fc1)))
            hidden = _with_one(hidden, F - part * FS, FS).to(dtype)
            d_hidden = (_dot(d_branch, tl.trans(fc2)) * slope).to(dtype)
            d_fc1 = d_fc1 + (d_mlp[part] + _dot(tl.trans(d_hidden), x),)
            d_fc2 = d_fc2 + (d_mlp[FP // FS + part] + _dot(tl.trans(hidden), d_branch),)
            d_x += _dot(d_hidden, fc1)
        d_mlp = d_fc1 + d_fc2
        grad = _normalize_backward(d_x, mid, mean, rstd, C, CP) + _tile(grad_out, tile, tokens, C, CP, T, True)
        _store_tile(grad_mid, grad, tile, tokens, C, CP, T)
    d_weights += tl.program_id(0).to(tl.int64) * (2 * FP * CP)
    for part in tl.static_range(2 * FP // FS):
        tl.store(matrix(d_weights, part * FS, FS, CP), d_mlp[part])


@triton.jit(do_not_specialize=["tokens", "tiles"])  # one compilation for all batches
def _attention_backward_kernel(
    grad_words, grad_mid, d_weights, words, weights, attn_scale, tokens, tiles, eps,
    M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
    HS: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FS: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The gradient of the words, and this program's share of those of the attention half's matrices."""
    parts: tl.constexpr = HP // HS
    d_attention = (tl.zeros((HS, CP), tl.float32),) * (4 * parts)  # of q, k, v and proj of every part
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        normalized, mean, rstd = _normalize(_tile(words, tile, tokens, C, CP, T), eps, C, CP)
        x = _with_one(normalized, C, CP).to(dtype)
        d_branch = _tile(grad_mid, tile, tokens, C, CP, T)
        if attn_scale is not None:
            d_branch *= _row_scale(attn_scale, tile, tokens, M, T)
        d_branch = d_branch.to(dtype)
        d_x, d_weights_now = tl.zeros((T, CP), tl.float32), ()
        for part in tl.static_range(parts):
            q = _heads(x, weights, Q * HP + part * HS, CP, HS, DP, T, S)
            k = _heads(x, weights, K * HP + part * HS, CP, HS, DP, T, S)
            v = _heads(x, weights, V * HP + part * HS, CP, HS, DP, T, S)
            d_out = _heads(d_branch, weights, PROJ * HP + part * HS, CP, HS, DP, T, S)
            p = _probabilities(q, k, M, S)
            d_scores = _dot(d_out, tl.permute(v, (0, 2, 1)))
            d_scores = p * (d_scores * LN_2 - tl.sum(p * d_scores, 2, keep_dims=True) * LN_2)
            p, d_scores = p.to(dtype), d_scores.to(dtype)
            out = _join_heads(_dot(p, v), HS, DP, T, S)
            if part == 0:
                out = _with_one(out, D, HS)
            d_proj = d_attention[4 * part + 3] + _dot(tl.trans(out.to(dtype)), d_branch)
            d_v = _join_heads(_dot(tl.permute(p, (0, 2, 1)), d_out), HS, DP, T, S).to(dtype)
            d_wv = d_attention[4 * part + 2] + _dot(tl.trans(d_v), x)
            d_x += _dot(d_v, tl.load(matrix(weights, V * HP + part * HS, HS, CP)))
            d_q = _join_heads(_dot(d_scores, k), HS, DP, T, S).to(dtype)
            d_wq = d_attention[4 * part] + _dot(tl.trans(d_q), x)
            d_x += _dot(d_q, tl.load(matrix(weights, Q * HP + part * HS, HS, CP)))
            d_k = _join_heads(_dot(tl.permute(d_scores, (0, 2, 1)), q), HS, DP, T, S).to(dtype)
            d_wk = d_attention[4 * part + 1] + _dot(tl.trans(d_k), x)
            d_x += _dot(d_k, tl.load(matrix(weights, K * HP + part * HS, HS, CP)))
            d_weights_now = d_weights_now + (d_wq, d_wk, d_wv, d_proj)
        d_attention = d_weights_now
        grad = _normalize_backward(d_x, _tile(words, tile, tokens, C, CP, T, True), mean, rstd, C, CP)
        grad += _tile(grad_mid, tile, tokens, C, CP, T, True)
        _store_tile(grad_words, grad, tile, tokens, C, CP, T)
    d_weights += tl.program_id(0).to(tl.int64) * (4 * HP * CP)
    for part in tl.static_range(parts):
        for kind in tl.static_range(4):
            tl.store(matrix(d_weights, kind * HP + part * HS, HS, CP), d_attention[4 * part + kind])


# ------------------------------------------------------------------ launching

HEADS_SLICE = 64  # head columns per step; also limits shared memory
WARPS_AT_ONCE = 8  # of a multiprocessor's 65,536 registers, 255 for each thread


def why_not(
    device: str, words_dtype: torch.dtype, dtype: torch.dtype, C: int, num_heads: int, mlp_dim: int
) -> Optional[str]:
    """What keeps these kernels from a case; None when they can take it."""
    if device != ("cpu" if INTERPRETED else "cuda"):
        return f"words on {device}"
    if words_dtype not in _DTYPES:
        return f"words of {words_dtype}"
    # without tensor cores these kernels spill kilobytes a thread, and TNT-B's need more shared memory than there is
    if dtype == torch.float32 and not INTERPRETED:
        return "products of float32; turn on mixed precision"
    if C > MAX_WIDTH or mlp_dim > MAX_MLP_WIDTH:
        return f"widths of {C} and {mlp_dim}, more than {MAX_WIDTH} and {MAX_MLP_WIDTH}"
    return None


def launch_sizes(kernel: str, capability: Optional[int], C: int, num_heads: int, M: int, F: int) -> Dict[str, int]:
    """Return what a kernel is compiled for: widths, words of a sentence, of a tile and of a group, warps and stages."""
    sizes, group = widths(C, num_heads, F), max(16, M)
    chosen = triton_launches.launch(capability, kernel, sizes["CP"])
    return dict(
        sizes, HS=min(HEADS_SLICE, sizes["HP"]), M=M, T=max(chosen.tile_words, group), S=group,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip


class _Case:
    """A layer's sizes and its packed parameters."""

    def __init__(self, words: Tensor, parameters: Sequence[Optional[Tensor]], num_heads: int, dtype: torch.dtype):
        R, self.M, self.C = words.shape
        self.words, self.num_heads, self.F = words, num_heads, len(parameters[10])
        self.tokens, self.scale = R * self.M, (self.C // num_heads) ** -0.5
        self.widths = widths(self.C, num_heads, self.F)
        CP, HP, FP = (self.widths[name] for name in ("CP", "HP", "FP"))
        self.dtype = _DTYPES[dtype]
        self.weights = words.new_empty(4 * HP * CP + 2 * FP * CP, dtype=dtype)
        pack_kernel[(1,)](self.weights, self.scale, *parameters, **self.widths, num_warps=8)

    def launch(self, kernel: str) -> Dict[str, object]:
        """The keywords of a kernel's launch."""
        sizes = launch_sizes(kernel, _capability(self.words.device), self.C, self.num_heads, self.M, self.F)
        return dict(sizes, dtype=self.dtype)

    def shares(self, sizes: Dict[str, object], size: int) -> Tuple[Tensor, int]:
        """(a row of weight gradients for each program of a backward kernel, the number of tiles)."""
        tiles = triton.cdiv(self.tokens, sizes["T"])
        programs = max(1, WARPS_AT_ONCE // sizes["num_warps"]) * _multiprocessors(self.words.device)
        # at least two tiles each, so that a check on few sentences tests the sums over tiles too
        programs = min(triton.cdiv(tiles, 2), programs)
        return self.words.new_empty(programs, size, dtype=torch.float32), tiles


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
    sizes = case.launch("forward")
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
    # the attention half's come first, as in the packed parameters
    CP, HP, FP = (case.widths[name] for name in ("CP", "HP", "FP"))
    d_weights = words.new_zeros(case.weights.numel(), dtype=torch.float32)
    if case.tokens:
        sizes = case.launch("mlp_backward")
        shares, tiles = case.shares(sizes, 2 * FP * CP)
        _mlp_backward_kernel[(len(shares),)](
            grad_out, grad_mid, shares, words, case.weights, attn_scale, mlp_scale, case.tokens, tiles, eps, **sizes
        )
        torch.sum(shares, 0, out=d_weights[4 * HP * CP :])
        sizes = case.launch("attention_backward")
        shares, tiles = case.shares(sizes, 4 * HP * CP)
        _attention_backward_kernel[(len(shares),)](
            grad_words, grad_mid, shares, words, case.weights, attn_scale, case.tokens, tiles, eps, **sizes
        )
        torch.sum(shares, 0, out=d_weights[: 4 * HP * CP])
    norm1, norm1_bias, qk, _, v, _, _, _, norm2, norm2_bias, fc1, *_ = parameters
    unpack_kernel[(1,)](
        d_weights, case.scale, norm1, norm1_bias, qk, v, norm2, norm2_bias, fc1, *grads, **case.widths, num_warps=8
    )
    return grad_words


def _capability(device: torch.device) -> Optional[int]:
    """The GPU's compute capability as one number, 80 for 8.0; None for the interpreter on CPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
