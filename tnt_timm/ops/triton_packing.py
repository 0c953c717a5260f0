"""The inner transformer's parameters, packed for the CUDA kernels, and their gradients, unpacked.

The parameters are packed into six matrices. LayerNorm's weight and bias go into the linears that read its result, and so
does the factor of the scores; a tile has a one behind its columns, so that a bias is one more column of its matrix.
Gradients come in the same layout, those of LayerNorm's parameters among them: the layer's kernels sum no vectors.

C, F: the widths of words and of the MLP; CP, FP: those with the one and with zeros up to what the matrix units take; FS: the
MLP's columns that are worked on at a time, a slice.
"""

from typing import Dict

import triton
import triton.language as tl

# places of the (CP, CP) matrices; behind them are fc1 and fc2, which is transposed, as (FS, CP) slices
Q, K, V, PROJ = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LOG2_E = tl.constexpr(1.4426950408889634)
MLP_SLICE = 64  # more would take registers that the weight gradients need


def widths(C: int, F: int) -> Dict[str, int]:
    """Of words and of the MLP, as they are and with the one behind them and zeros."""
    FS = min(MLP_SLICE, max(16, triton.next_power_of_2(F + 1)))
    return dict(C=C, CP=max(16, triton.next_power_of_2(C + 1)), F=F, FP=triton.cdiv(F + 1, FS) * FS, FS=FS)


@triton.jit
def matrix(pointer, index: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A packed matrix, or where its gradient goes: number `index` of those of this shape that begin at `pointer`."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return pointer + (index * ROWS * COLUMNS + row * COLUMNS + column)


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
def pack_kernel(
    weights, scale, norm1, norm1_bias, qk, qk_bias, v, v_bias, proj, proj_bias,
    norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias,
    C: tl.constexpr, CP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FS: tl.constexpr,
):  # fmt: skip
    """Once for all tiles: matrices q k v proj (CP, CP), fc1 and fc2 (FP, CP), rounded and padded."""
    k_bias = None if qk_bias is None else qk_bias + C
    _pack(matrix(weights, Q, CP, CP), qk, qk_bias, norm1, norm1_bias, scale * LOG2_E, C, C, CP, CP)
    _pack(matrix(weights, K, CP, CP), qk + C * C, k_bias, norm1, norm1_bias, 1.0, C, C, CP, CP)
    _pack(matrix(weights, V, CP, CP), v, v_bias, norm1, norm1_bias, 1.0, C, C, CP, CP)
    _pack(matrix(weights, PROJ, CP, CP), proj, proj_bias, None, None, 1.0, C, C, CP, CP)
    weights += 4 * CP * CP
    bias = _load_vector(fc2_bias, C, CP)[None, :]  # of the transposed fc2, so that it is a row
    for part in tl.static_range(FP // FS):
        first, rows = part * FS, F - part * FS
        place = matrix(weights, part, FS, CP)
        _pack(place, fc1 + first * C, fc1_bias + first, norm2, norm2_bias, 1.0, rows, C, FS, CP)
        packed = tl.where(tl.arange(0, FS)[:, None] == rows, bias, _load_weight(fc2 + first, rows, C, 1, F, FS, CP))
        tl.store(matrix(weights, FP // FS + part, FS, CP), packed.to(weights.dtype.element_ty))


@triton.jit
def unpack_kernel(
    d_weights, scale, norm1, norm1_bias, qk, v, norm2, norm2_bias, fc1,
    d_norm1, d_norm1_bias, d_qk, d_qk_bias, d_v, d_v_bias, d_proj, d_proj_bias,
    d_norm2, d_norm2_bias, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias,
    C: tl.constexpr, CP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FS: tl.constexpr,
):  # fmt: skip
    """The gradients of the parameters, from those of the packed matrices."""
    d_k_bias = None if d_qk_bias is None else d_qk_bias + C
    place = matrix(d_weights, Q, CP, CP)
    dn_q, db_q = _unpack(place, qk, norm1, norm1_bias, d_qk, d_qk_bias, scale * LOG2_E, C, C, CP, CP)
    place = matrix(d_weights, K, CP, CP)
    dn_k, db_k = _unpack(place, qk + C * C, norm1, norm1_bias, d_qk + C * C, d_k_bias, 1.0, C, C, CP, CP)
    dn_v, db_v = _unpack(matrix(d_weights, V, CP, CP), v, norm1, norm1_bias, d_v, d_v_bias, 1.0, C, C, CP, CP)
    _store_vector(d_norm1, dn_q + dn_k + dn_v, C, CP)
    _store_vector(d_norm1_bias, db_q + db_k + db_v, C, CP)
    _unpack(matrix(d_weights, PROJ, CP, CP), None, None, None, d_proj, d_proj_bias, 1.0, C, C, CP, CP)
    d_weights += 4 * CP * CP
    dn, db, d_bias = tl.zeros((CP,), tl.float32), tl.zeros((CP,), tl.float32), tl.zeros((CP,), tl.float32)
    for part in tl.static_range(FP // FS):
        first, rows = part * FS, F - part * FS
        dn_part, db_part = _unpack(
            matrix(d_weights, part, FS, CP), fc1 + first * C, norm2, norm2_bias,
            d_fc1 + first * C, d_fc1_bias + first, 1.0, rows, C, FS, CP,
        )  # fmt: skip
        d_w = tl.load(matrix(d_weights, FP // FS + part, FS, CP))
        _store_weight(d_fc2 + first, d_w, rows, C, 1, F, FS, CP)
        dn, db = dn + dn_part, db + db_part
        d_bias += tl.sum(tl.where(tl.arange(0, FS)[:, None] == rows, d_w, 0.0), 0)
    _store_vector(d_norm2, dn, C, CP)
    _store_vector(d_norm2_bias, db, C, CP)
    _store_vector(d_fc2_bias, d_bias, C, CP)
