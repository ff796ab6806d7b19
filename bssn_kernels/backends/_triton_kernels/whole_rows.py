"""Both products from one reading of a weight, where a program holds whole rows."""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_kernels.backends._tables import BLOCK_FIELDS, LAYER_FIELDS, ROLE_FIELDS, TILE_FIELDS
from bssn_kernels.backends._triton_kernels.records import ROLES_AT, STORED, at
from bssn_kernels.backends._triton_kernels.vectors import load_vector, scale_of, source_of

T_ROW0, T_ROWS, T_COL0, T_SLOT0, T_SOURCE = at(TILE_FIELDS, "row0", "rows", "col0", "slot0", "source")
B_PARITY = at(BLOCK_FIELDS, "parity")
L_L, L_R = at(LAYER_FIELDS, "l", "r")
R_OUTER_PARTIAL, R_SLAB, R_SLAB_ODD = at(ROLE_FIELDS, "outer_partial", "slab", "slab_odd")
R_INNER_SHARES = at(ROLE_FIELDS, "inner_shares")


@triton.jit
def _whole_rows(
    tp, bp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Both products of a tile of whole rows: s = W x, which is complete, and the part of W^T s that its rows give."""
    accum: tl.constexpr = work_ptr.dtype.element_ty
    UNIT: tl.constexpr = 128 // w_ptr.dtype.element_ty.primitive_bitwidth
    row0, rows, source = tl.load(tp + T_ROW0).to(tl.int64), tl.load(tp + T_ROWS), tl.load(tp + T_SOURCE)
    L, R = tl.load(lp + L_L).to(tl.int32) // UNIT * UNIT, tl.load(lp + L_R).to(tl.int32)
    L64, rp, slot = L.to(tl.int64), lp + ROLES_AT, tl.load(tp + T_SLOT0)
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLS)
    m_c = o_c < L
    zero = row0 * 0
    x_ptr, x_stored, _, xq, xr = source_of(
        rp, ap, 0, source, True, row0, zero, zero, vector_ptr, saved_ptr, work_ptr, MIXED
    )
    # col0 is 0, and a compiler that knew would keep what follows from columns in registers from launch to end. No
    # division of integers, of which a thread would have 32: numbers below 2^12 are exact without.
    c = (tl.load(tp + T_COL0) + tl.arange(0, 128))[None, :] + (tl.arange(0, COLS // 128) * 128)[:, None]
    q = ((c.to(tl.float32) + 0.5) * (1.0 / R.to(tl.float32))).to(tl.int32)
    o_x = q * xq.to(tl.int32) + (c - q * R) * xr.to(tl.int32)
    x = load_vector(x_ptr, x_stored, o_x, c < L, source == STORED, MIXED) * scale_of(rp, source, double_ptr, accum)
    x = tl.reshape(x, [COLS])
    slab = tl.where(tl.load(bp + B_PARITY) != 0, tl.load(rp + R_SLAB_ODD), tl.load(rp + R_SLAB))
    slab_ptr = work_ptr + slab + row0
    w_ptr += row0 * L64
    sums = tl.zeros([ROWS, COLS], dtype=accum)
    for i in tl.range(0, rows, ROWS, num_stages=STAGES):
        m_r = i + o_r < rows
        o = o_r[:, None] * L + o_c[None, :]
        w = tl.load(w_ptr + i * L64 + o, mask=m_r[:, None] & m_c[None, :], other=0.0).to(accum)
        s = tl.sum(w * x[None, :], axis=1)
        tl.store(slab_ptr + i + o_r, s, mask=m_r)
        sums = tl.fma(w, s[:, None], sums)
    # Room for partial sums begins at multiples of 16 numbers, and so these are stored as the weight is read.
    part = tl.load(rp + R_OUTER_PARTIAL) // 16 * 16 + slot * L64
    tl.store(work_ptr + part + o_c, tl.sum(sums, axis=0), mask=m_c)
    tl.debug_barrier()
    o = tl.arange(0, 128)
    squares = tl.zeros([128], dtype=tl.float64)
    for i in range(0, rows, 128):
        s = tl.load(slab_ptr + i + o, mask=i + o < rows, other=0.0).to(tl.float64)
        squares += s * s
    tl.store(double_ptr + tl.load(rp + R_INNER_SHARES) + slot, tl.sum(squares, axis=0))


@triton.jit
def whole_tile(
    tp, bp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """A tile of whole rows: one of them at once, or four if they are short."""
    if tl.load(lp + L_L) <= WHOLE // 4:
        _whole_rows(
            tp, bp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr, 4, WHOLE // 4, STAGES, MIXED
        )
    else:
        _whole_rows(tp, bp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr, 1, WHOLE, STAGES, MIXED)
