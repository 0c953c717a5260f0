"""The CUDA kernels of the inner transformer, fused: each kernel reads a tile of words once and writes its results once.

    x   = words + attn_scale * proj(attention(LN1(words)))
    out = x     + mlp_scale  * fc2(GELU(fc1(LN2(x))))

`ops/reference.py` is the specification. LayerNorm, softmax, GELU and all sums are computed in float32, products with operands
of `dtype`. Nothing is saved for backward, which recomputes a tile from its words in two kernels. The MLP half turns the gradient
of the output into that of the attention half's output. The attention half turns that into the gradient of the words. Each
program sums the weight gradients of its tiles in registers and writes them once. A reduction then adds the programs' sums in a
fixed order, so that the same input gives the same bits.

A program works on a tile of T consecutive words, which are whole sentences, as T/S groups of S = max(16, M) rows. 16 is the
smallest size that tensor cores accept. If M < 16, a group holds several sentences, and scores between them are masked. Widths are
padded with zero columns: words from C to CP, each head from D to DP, the MLP from F to FP. The padding makes the columns of a
head a matrix of their own, so that one product computes the scores of all groups and heads. The kernels work on HS columns of
the heads and FS columns of the MLP at a time, which saves registers. `triton_packing` packs parameters and their gradients.
"""

import triton
import triton.language as tl

from tnt_timm.ops.triton_packing import PROJ, K, Q, V, matrix

LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(not isinstance(matrix, triton.JITFunction))  # TRITON_INTERPRET=1, for tests on CPU


# ------------------------------------------------------------------ pieces of a tile


@triton.jit
def _tile(pointer, tile, tokens, C: tl.constexpr, CP: tl.constexpr, T: tl.constexpr, again: tl.constexpr = False):
    """Load a tile as float32. With `again`, wide words are loaded a second time instead of being kept in registers."""
    # another eviction policy, because the compiler would merge equal loads
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
    """Load the factor on the residual for each word: that of its sentence."""
    token = tile * T + tl.arange(0, T)
    return tl.load(pointer + token // M, token < tokens, 0.0).to(tl.float32)[:, None]


@triton.jit
def _with_one(x, C: tl.constexpr, CP: tl.constexpr):
    """Put a 1 after the last column, to multiply the bias of the next matrix."""
    return tl.where(tl.arange(0, CP)[None, :] == C, 1.0, x)


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # the interpreter has no bfloat16 products; float32 products of rounded operands are equal
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _normalize(x, eps, C: tl.constexpr, CP: tl.constexpr):
    """Return (LayerNorm without its parameters (T, CP), mean (T, 1), 1 / standard deviation (T, 1))."""
    mean = tl.sum(x, 1, keep_dims=True) / C
    centred = tl.where(tl.arange(0, CP)[None, :] < C, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / C + eps)
    return centred * rstd, mean, rstd


@triton.jit
def _normalize_backward(grad, x, mean, rstd, C: tl.constexpr, CP: tl.constexpr):
    """Return the gradient of `x`, with zeros in the padding."""
    normalized = (x - mean) * rstd
    grad = tl.where(tl.arange(0, CP)[None, :] < C, grad, 0.0)
    along = tl.sum(grad * normalized, 1, keep_dims=True) / C
    return (grad - tl.sum(grad, 1, keep_dims=True) / C - normalized * along) * rstd


@triton.jit
def _split_heads(x, HS: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, S: tl.constexpr):
    """(T, HS) -> (heads * T/S, S, DP), the heads of every group."""
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
    """Multiply x by HS transposed rows of a matrix, from row `first`. Return (heads * T/S, S, DP)."""
    x = _dot(x, tl.trans(tl.load(matrix(weights, first, HS, CP)))).to(x.dtype)
    return _split_heads(x, HS, DP, T, S)


@triton.jit
def _probabilities(q, k, M: tl.constexpr, S: tl.constexpr):
    """Attention probabilities within groups: q, k (N, S, DP) -> (N, S, S). q is scaled by log2(e), for exp2."""
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
    """Return proj(attention(LN1(words)))."""
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
    """Return the normal distribution's tail beyond |x|, with an error below 1e-6.

    A polynomial approximates its binary logarithm, with a quarter of the instructions of erf. The coefficients minimize the
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
    """Return (GELU, its derivative)."""
    above = _above(x)
    below = tl.where(x > 0, 1.0 - above, above)
    return x * below, below + x * tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361593)


@triton.jit
def _mlp_slice(branch, x, mlp, first: tl.constexpr, FP: tl.constexpr, SLICE: tl.constexpr, CP: tl.constexpr):
    """Add to `branch` the output of SLICE hidden units of the MLP."""
    hidden = _dot(x, tl.trans(tl.load(matrix(mlp, first, SLICE, CP))))
    return branch + _dot(_gelu(hidden).to(x.dtype), tl.load(matrix(mlp, FP + first, SLICE, CP)))


# ------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=["tokens"])  # so that all batch sizes share one compilation
def forward_kernel(
    out, words, weights, attn_scale, mlp_scale, tokens, eps,
    M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
    HS: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FS: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Compute the whole layer for one tile."""
    tile = tl.program_id(0)
    x = _tile(words, tile, tokens, C, CP, T)
    branch = _attention(x, weights, eps, M, C, CP, D, DP, HP, HS, T, S, dtype)
    if attn_scale is not None:
        branch *= _row_scale(attn_scale, tile, tokens, M, T)
    x += branch
    normalized, _, _ = _normalize(x, eps, C, CP)
    normalized = _with_one(normalized, C, CP).to(dtype)
    # add the bias of fc2 here: without a column for it, half a slice may be enough at the end
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


@triton.jit(do_not_specialize=["tokens", "tiles"])  # so that all batch sizes share one compilation
def mlp_backward_kernel(
    grad_out, grad_mid, d_weights, words, weights, attn_scale, mlp_scale, tokens, tiles, eps,
    M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
    HS: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FS: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the attention half's output, and this program's sum of the gradients of fc1 and fc2."""
    d_mlp = (tl.zeros((FS, CP), tl.float32),) * (2 * FP // FS)  # slices of fc1, then of fc2
    mlp = weights + 4 * HP * CP
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # recompute the attention half
        x = _tile(words, tile, tokens, C, CP, T)
        branch = _attention(x, weights, eps, M, C, CP, D, DP, HP, HS, T, S, dtype)
        if attn_scale is not None:
            branch *= _row_scale(attn_scale, tile, tokens, M, T)
        # the MLP half, forward and backward
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


@triton.jit(do_not_specialize=["tokens", "tiles"])  # so that all batch sizes share one compilation
def attention_backward_kernel(
    grad_words, grad_mid, d_weights, words, weights, attn_scale, tokens, tiles, eps,
    M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
    HS: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FS: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the words, and this program's sum of the gradients of q, k, v and proj."""
    parts: tl.constexpr = HP // HS
    d_attention = (tl.zeros((HS, CP), tl.float32),) * (4 * parts)  # q, k, v and proj of each part
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
