"""Pack the parameters of the inner transformer for the CUDA kernels, and unpack their gradients.

The parameters are packed into six matrices. The weight and bias of a LayerNorm, and the scale of the attention scores, are folded
into the linears that follow. A bias is one more column of its matrix, which multiplies the 1 after the columns of a tile.
Gradients have the same layout and include those of the LayerNorms, so that the kernels of the layer sum no vectors.

C, D, F: widths of words, of one head and of the MLP. CP, DP, FP: the same with room for the 1, padded with zeros to a size that
tensor cores accept. HP: the width of all heads, each padded to DP. FS: the width of a slice of the MLP, which the kernels work on
at a time.
"""

from typing import Dict

import triton
import triton.language as tl

# indices of the (HP, CP) matrices, which fc1 and fc2, (FP, CP), follow; proj and fc2 are transposed
Q, K, V, PROJ = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LOG2_E = tl.constexpr(1.4426950408889634)
MLP_SLICE = 64  # a wider slice would take registers that the weight gradients need


def widths(C: int, num_heads: int, F: int) -> Dict[str, int]:
    """Return the widths of words, heads and MLP, and the padded widths, by the names of kernel arguments."""
    FS = min(MLP_SLICE, max(16, triton.next_power_of_2(F + 1)))
    D = C // num_heads
    DP = max(16, triton.next_power_of_2(D + 1))
    return dict(
        C=C, CP=max(16, triton.next_power_of_2(C + 1)), D=D, DP=DP, HP=triton.next_power_of_2(num_heads) * DP,
        F=F, FP=triton.cdiv(F + 1, FS) * FS, FS=FS,
    )  # fmt: skip


@triton.jit
def matrix(pointer, first: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return pointers to ROWS rows of a packed matrix or its gradient, from row `first`."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return pointer + (first * COLUMNS + row * COLUMNS + column)


@triton.jit
def _first(size, SIZE: tl.constexpr):
    """Return (index, valid) of `size` rows or columns that are padded to SIZE."""
    index = tl.arange(0, SIZE)
    return index, index < size


@triton.jit
def _by_head(C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr):
    """Return (index, valid) of C rows or columns, padded from D to DP in each head."""
    place = tl.arange(0, HP)
    index = place // DP * D + place % DP
    return index, (place % DP < D) & (index < C)


@triton.jit
def _load_weight(pointer, rows, rows_valid, columns, columns_valid, row_stride, column_stride):
    """Load a weight as float32, padded with zeros."""
    mask = rows_valid[:, None] & columns_valid[None, :]
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :] * column_stride, mask, 0.0).to(tl.float32)


@triton.jit
def _store_weight(pointer, x, rows, rows_valid, columns, columns_valid, row_stride, column_stride):
    mask = rows_valid[:, None] & columns_valid[None, :]
    place = pointer + rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(place, x.to(pointer.dtype.element_ty), mask)


@triton.jit
def _load_vector(pointer, index, valid):
    return tl.load(pointer + index, valid, 0.0).to(tl.float32)


@triton.jit
def _store_vector(pointer, x, index, valid):
    tl.store(pointer + index, x.to(pointer.dtype.element_ty), valid)


@triton.jit
def _pack(place, weight, bias, norm, norm_bias, factor, rows, rows_valid, C: tl.constexpr, CP: tl.constexpr):
    """Store factor * (weight (norm * x + norm_bias) + bias) as one matrix for x and the 1 after it; bias may be None."""
    columns, columns_valid = _first(C, CP)
    w = _load_weight(weight, rows, rows_valid, columns, columns_valid, C, 1)
    b = tl.sum(w * _load_vector(norm_bias, columns, columns_valid)[None, :], 1)
    if bias is not None:
        b += _load_vector(bias, rows, rows_valid)
    w *= _load_vector(norm, columns, columns_valid)[None, :]
    packed = tl.where(columns[None, :] == C, b[:, None], w) * factor
    tl.store(place, packed.to(place.dtype.element_ty))


@triton.jit
def _unpack(
    place, weight, norm, norm_bias, d_weight, d_bias, factor, rows, rows_valid, C: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Store the gradients of weight and bias of `_pack`. Return those of norm and norm_bias."""
    columns, columns_valid = _first(C, CP)
    d_w = tl.load(place) * factor
    d_b = tl.sum(tl.where(columns[None, :] == C, d_w, 0.0), 1)
    if d_bias is not None:
        _store_vector(d_bias, d_b, rows, rows_valid)
    w = _load_weight(weight, rows, rows_valid, columns, columns_valid, C, 1)
    d_norm, d_norm_bias = tl.sum(d_w * w, 0), tl.sum(d_b[:, None] * w, 0)
    norm = _load_vector(norm, columns, columns_valid)[None, :]
    norm_bias = _load_vector(norm_bias, columns, columns_valid)[None, :]
    d_w = d_w * norm + d_b[:, None] * norm_bias
    _store_weight(d_weight, d_w, rows, rows_valid, columns, columns_valid, C, 1)
    return d_norm, d_norm_bias


@triton.jit
def pack_kernel(
    weights, scale, norm1, norm1_bias, qk, qk_bias, v, v_bias, proj, proj_bias,
    norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias,
    C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
    F: tl.constexpr, FP: tl.constexpr, FS: tl.constexpr,
):  # fmt: skip
    """Pack q, k, v, proj (HP, CP), fc1 and fc2 (FP, CP), rounded and padded, once for all tiles."""
    k_bias = None if qk_bias is None else qk_bias + C
    heads, heads_valid = _by_head(C, D, DP, HP)
    columns, columns_valid = _first(C, CP)
    place = matrix(weights, Q * HP, HP, CP)
    _pack(place, qk, qk_bias, norm1, norm1_bias, scale * LOG2_E, heads, heads_valid, C, CP)
    _pack(matrix(weights, K * HP, HP, CP), qk + C * C, k_bias, norm1, norm1_bias, 1.0, heads, heads_valid, C, CP)
    _pack(matrix(weights, V * HP, HP, CP), v, v_bias, norm1, norm1_bias, 1.0, heads, heads_valid, C, CP)
    w = _load_weight(proj, heads, heads_valid, columns, columns_valid, 1, C)
    packed = tl.where(tl.arange(0, HP)[:, None] == D, _load_vector(proj_bias, columns, columns_valid)[None, :], w)
    tl.store(matrix(weights, PROJ * HP, HP, CP), packed.to(weights.dtype.element_ty))
    weights += 4 * HP * CP
    bias = _load_vector(fc2_bias, columns, columns_valid)[None, :]
    for part in tl.static_range(FP // FS):
        first = part * FS
        rows, rows_valid = _first(F - first, FS)
        place = matrix(weights, part * FS, FS, CP)
        _pack(place, fc1 + first * C, fc1_bias + first, norm2, norm2_bias, 1.0, rows, rows_valid, C, CP)
        w = _load_weight(fc2 + first, rows, rows_valid, columns, columns_valid, 1, F)
        packed = tl.where(rows[:, None] == F - first, bias, w)
        tl.store(matrix(weights, FP + part * FS, FS, CP), packed.to(weights.dtype.element_ty))


@triton.jit
def unpack_kernel(
    d_weights, scale, norm1, norm1_bias, qk, v, norm2, norm2_bias, fc1,
    d_norm1, d_norm1_bias, d_qk, d_qk_bias, d_v, d_v_bias, d_proj, d_proj_bias,
    d_norm2, d_norm2_bias, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias,
    C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
    F: tl.constexpr, FP: tl.constexpr, FS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the parameters from those of the packed matrices."""
    d_k_bias = None if d_qk_bias is None else d_qk_bias + C
    heads, heads_valid = _by_head(C, D, DP, HP)
    columns, columns_valid = _first(C, CP)
    dn_q, db_q = _unpack(
        matrix(d_weights, Q * HP, HP, CP), qk, norm1, norm1_bias, d_qk, d_qk_bias, scale * LOG2_E,
        heads, heads_valid, C, CP,
    )  # fmt: skip
    dn_k, db_k = _unpack(
        matrix(d_weights, K * HP, HP, CP), qk + C * C, norm1, norm1_bias, d_qk + C * C, d_k_bias, 1.0,
        heads, heads_valid, C, CP,
    )  # fmt: skip
    dn_v, db_v = _unpack(
        matrix(d_weights, V * HP, HP, CP), v, norm1, norm1_bias, d_v, d_v_bias, 1.0, heads, heads_valid, C, CP
    )
    _store_vector(d_norm1, dn_q + dn_k + dn_v, columns, columns_valid)
    _store_vector(d_norm1_bias, db_q + db_k + db_v, columns, columns_valid)
    d_w = tl.load(matrix(d_weights, PROJ * HP, HP, CP))
    _store_weight(d_proj, d_w, heads, heads_valid, columns, columns_valid, 1, C)
    d_bias = tl.sum(tl.where(tl.arange(0, HP)[:, None] == D, d_w, 0.0), 0)
    _store_vector(d_proj_bias, d_bias, columns, columns_valid)
    d_weights += 4 * HP * CP
    dn, db, d_bias = tl.zeros((CP,), tl.float32), tl.zeros((CP,), tl.float32), tl.zeros((CP,), tl.float32)
    for part in tl.static_range(FP // FS):
        first = part * FS
        rows, rows_valid = _first(F - first, FS)
        dn_part, db_part = _unpack(
            matrix(d_weights, part * FS, FS, CP), fc1 + first * C, norm2, norm2_bias,
            d_fc1 + first * C, d_fc1_bias + first, 1.0, rows, rows_valid, C, CP,
        )  # fmt: skip
        d_w = tl.load(matrix(d_weights, FP + part * FS, FS, CP))
        _store_weight(d_fc2 + first, d_w, rows, rows_valid, columns, columns_valid, 1, F)
        dn, db = dn + dn_part, db + db_part
        d_bias += tl.sum(tl.where(rows[:, None] == F - first, d_w, 0.0), 0)
    _store_vector(d_norm2, dn, columns, columns_valid)
    _store_vector(d_norm2_bias, db, columns, columns_valid)
    _store_vector(d_fc2_bias, d_bias, columns, columns_valid)
