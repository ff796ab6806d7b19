"""The two products of a weight with vectors, tile by tile: INNER makes a slab from the spread, OUTER a spread from the
slab. Partial sums have a place per tile; sums.py adds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_kernels.backends._tables import LAYER_FIELDS, ROLE_FIELDS, TILE_FIELDS
from bssn_kernels.backends._triton_kernels.device import only
from bssn_kernels.backends._triton_kernels.records import INNER, ROLE_WIDTH, ROLES_AT, STORED, at
from bssn_kernels.backends._triton_kernels.vectors import load_vector, scale_of, source_of

T_ROW0, T_ROWS, T_COL0, T_CHUNKS, T_STEP, T_WIDTH = at(TILE_FIELDS, "row0", "rows", "col0", "chunks", "step", "width")
T_END, T_SLOT0, T_MASK, T_SOURCE = at(TILE_FIELDS, "end", "slot0", "mask", "source")
L_L, L_R, L_ALIGNED = at(LAYER_FIELDS, "l", "r", "aligned")
R_RAW_YP, R_RAW_YQ, R_RAW_YR, R_MODULUS = at(ROLE_FIELDS, "raw_yp", "raw_yq", "raw_yr", "modulus")
R_SLAB_SIZE, R_INNER_PARTIAL, R_OUTER_PARTIAL = at(ROLE_FIELDS, "slab_size", "inner_partial", "outer_partial")


@triton.jit
def place_of(tp, lp):
    """Where a tile is: first row, rows, first column, chunks of columns, their distance and width, end; L and R."""
    row0, rows, col0 = tl.load(tp + T_ROW0).to(tl.int64), tl.load(tp + T_ROWS), tl.load(tp + T_COL0)
    chunks, step = tl.load(tp + T_CHUNKS), tl.load(tp + T_STEP)
    width, end = tl.load(tp + T_WIDTH), tl.load(tp + T_END)
    return row0, rows, col0, chunks, step, width, end, tl.load(lp + L_L).to(tl.int32), tl.load(lp + L_R).to(tl.int32)


@triton.jit
def in_units(place, UNIT: tl.constexpr):
    """The same, with columns as multiples of UNIT, and with the columns that are left instead of the end."""
    row0, rows, col0, chunks, step, width, end, L, R = place
    col0 = col0 // UNIT * UNIT
    left = (end - col0) // UNIT * UNIT
    return row0, rows, col0, chunks, step // UNIT * UNIT, width // UNIT * UNIT, left, L // UNIT * UNIT, R


@triton.jit
def _inner(
    place, tp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, GENERAL: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Partial slab of a tile: for each of its rows and classes the sum of W * spread over its columns."""
    accum: tl.constexpr = work_ptr.dtype.element_ty
    row0, rows, col0, chunks, step, width, left, L, R = in_units(place, UNIT)
    mask, source = tl.load(tp + T_MASK), tl.load(tp + T_SOURCE)
    L64 = L.to(tl.int64)
    q0, r0 = (col0 // R).to(tl.int64), (col0 % R).to(tl.int64)
    step_q, step_r = step // R, step % R
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLS)
    stored = source == STORED
    w_ptr += row0 * L64 + col0

    rp, on = lp + ROLES_AT, (mask & 1) != 0
    x_ptr, x_stored, _, xq, xr = source_of(
        rp, ap, 0, source, True, row0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED
    )
    x_step = (step_q * xq + step_r * xr).to(tl.int32)
    o_x = (o_c // R) * xq.to(tl.int32) + (o_c % R) * xr.to(tl.int32)
    scale = scale_of(rp, source, double_ptr, accum)
    if GENERAL:
        rp1, on1 = lp + ROLES_AT + ROLE_WIDTH, (mask & 2) != 0
        x1_ptr, x1_stored, _, x1q, x1r = source_of(
            rp1, ap, 1, source, True, row0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED
        )
        x1_step = (step_q * x1q + step_r * x1r).to(tl.int32)
        o_x1 = (o_c // R) * x1q.to(tl.int32) + (o_c % R) * x1r.to(tl.int32)
        scale1 = scale_of(rp1, source, double_ptr, accum)

    # One direction: one loop over the chunks of all rows, so that while a block of rows is summed up the next one is on
    # its way. Two have no registers for that.
    row_blocks = tl.cdiv(rows, ROWS)
    for begin in range(0, row_blocks if GENERAL else 1):
        i, i_r = 0, begin * ROWS
        sums = tl.zeros([ROWS, COLS], dtype=accum)
        sums1 = tl.zeros([ROWS, COLS], dtype=accum)
        for n in tl.range(0, chunks if GENERAL else row_blocks * chunks, num_stages=STAGES):
            if GENERAL:
                i = n
            m_r = i_r + o_r < rows
            m_c = (o_c < width) & (o_c < left - i * step)
            w = tl.load(
                w_ptr + i_r * L64 + i * step + (o_r[:, None] * L + o_c[None, :]),
                mask=m_r[:, None] & m_c[None, :], other=0.0,
            ).to(accum)  # fmt: skip
            x = load_vector(x_ptr + i * x_step, x_stored + i * x_step, o_x, only(m_c, on), stored, MIXED)
            sums = tl.fma(w, (x * scale)[None, :], sums)
            if GENERAL:
                if on1:  # a branch keeps these loads, which hit L1, out of the pipeline: it would take registers
                    x1 = load_vector(x1_ptr + i * x1_step, x1_stored + i * x1_step, o_x1, m_c, stored, MIXED)
                    sums1 = tl.fma(w, (x1 * scale1)[None, :], sums1)
            else:
                last = i == chunks - 1
                if last:
                    _store_slab(0, tp, rp, row0, i_r, o_r, q0, r0, width, sums, m_r, o_c, work_ptr, False)
                    sums = tl.zeros([ROWS, COLS], dtype=accum)
                # Not within the branch: what the next loads need must not wait for it.
                i_r = tl.where(last, i_r + ROWS, i_r)
                i = tl.where(last, 0, i + 1)
        if GENERAL:
            m_r = i_r + o_r < rows
            if on:
                _store_slab(0, tp, rp, row0, i_r, o_r, q0, r0, width, sums, m_r, o_c, work_ptr, False)
            if on1:
                _store_slab(1, tp, rp1, row0, i_r, o_r, q0, r0, width, sums1, m_r, o_c, work_ptr, True)


@triton.jit
def _store_slab(e, tp, rp, row0, i_r, o_r, q0, r0, width, sums, m_r, o_c, work_ptr, CLASSES: tl.constexpr):
    """Partial sums of some rows of an inner tile, each over its columns; CLASSES: separately for each class."""
    stride = tl.load(rp + R_RAW_YP).to(tl.int32)
    ptr = work_ptr + tl.load(rp + R_INNER_PARTIAL) + tl.load(tp + T_SLOT0 + e) * tl.load(rp + R_SLAB_SIZE)
    ptr += row0 * stride + q0 * tl.load(rp + R_RAW_YQ) + r0 * tl.load(rp + R_RAW_YR)
    if CLASSES:
        modulus = tl.load(rp + R_MODULUS).to(tl.int32)
        if modulus == 0:
            m = m_r[:, None] & (o_c < width)[None, :]
            tl.store(ptr + (i_r + o_r)[:, None] * stride + o_c[None, :], sums, mask=m)
        # A row of COLS numbers belongs to two warps, or to one in half precision. Taken as two rows, it is summed by
        # shuffles alone, and threads meet once for 16 classes.
        ROWS: tl.constexpr = sums.shape[0]
        HALF: tl.constexpr = sums.shape[1] // 2
        halves = tl.reshape(sums, [2 * ROWS, HALF])
        o_half, o_16 = tl.arange(0, 2 * ROWS) % 2 * HALF, tl.arange(0, 16)
        classes = (o_half[:, None] + tl.arange(0, HALF)[None, :]) % tl.maximum(modulus, 1)
        for first in range(0, modulus, 16):
            found = tl.zeros([2 * ROWS, 16], dtype=sums.dtype)
            for c in range(first, tl.minimum(first + 16, modulus)):
                of_class = tl.sum(tl.where(classes == c, halves, 0.0), axis=1)
                found = tl.where((first + o_16 == c)[None, :], of_class[:, None], found)
            whole = tl.sum(tl.reshape(found, [ROWS, 2, 16]), axis=1)
            m = m_r[:, None] & (first + o_16 < modulus)[None, :]
            tl.store(ptr + (i_r + o_r)[:, None] * stride + (first + o_16)[None, :], whole, mask=m)
    else:
        tl.store(ptr + (i_r + o_r) * stride, tl.sum(sums, axis=1), mask=m_r)


@triton.jit
def _outer(
    place, tp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, GENERAL: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Partial spread of a tile: for each of its columns the sum of W * slab over its rows."""
    accum: tl.constexpr = work_ptr.dtype.element_ty
    row0, rows, col0, chunks, step, width, left, L, R = in_units(place, UNIT)
    mask, source = tl.load(tp + T_MASK), tl.load(tp + T_SOURCE)
    L64 = L.to(tl.int64)
    q0, r0 = (col0 // R).to(tl.int64), (col0 % R).to(tl.int64)
    step_q, step_r = step // R, step % R
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLS)
    stored = source == STORED
    w_ptr += row0 * L64 + col0

    rp, on = lp + ROLES_AT, (mask & 1) != 0
    y_ptr, y_stored, yp, yq, yr = source_of(
        rp, ap, 0, source, False, row0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED
    )
    y_step, y_row = (step_q * yq + step_r * yr).to(tl.int32), yp.to(tl.int32)
    scale = scale_of(rp, source, double_ptr, accum)
    if GENERAL:
        rp1, on1 = lp + ROLES_AT + ROLE_WIDTH, (mask & 2) != 0
        y1_ptr, y1_stored, y1p, y1q, y1r = source_of(
            rp1, ap, 1, source, False, row0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED
        )
        y1_step, y1_row = (step_q * y1q + step_r * y1r).to(tl.int32), y1p.to(tl.int32)
        o_y1 = (o_c // R) * y1q.to(tl.int32) + (o_c % R) * y1r.to(tl.int32)
        scale1 = scale_of(rp1, source, double_ptr, accum)

    # One loop over the rows of all chunks, or one for each chunk, as above.
    row_blocks = tl.cdiv(rows, ROWS)
    for begin in range(0, chunks if GENERAL else 1):
        i, i_r = begin, 0
        sums = tl.zeros([ROWS, COLS], dtype=accum)
        sums1 = tl.zeros([ROWS, COLS], dtype=accum)
        for n in tl.range(0, row_blocks if GENERAL else row_blocks * chunks, num_stages=STAGES):
            if GENERAL:
                i_r = n * ROWS
            m_r = i_r + o_r < rows
            m_c = (o_c < width) & (o_c < left - i * step)
            m = m_r[:, None] & m_c[None, :]
            o = o_r[:, None] * L + o_c[None, :]
            w = tl.load(w_ptr + i_r * L64 + i * step + o, mask=m, other=0.0).to(accum)
            at = i * y_step
            y = load_vector(y_ptr + at, y_stored + at, (i_r + o_r) * y_row, only(m_r, on), stored, MIXED)
            sums = tl.fma(w, (y * scale)[:, None], sums)
            if GENERAL:
                if on1:
                    at1, o_y = i * y1_step, (i_r + o_r)[:, None] * y1_row + o_y1[None, :]
                    y1 = load_vector(y1_ptr + at1, y1_stored + at1, o_y, m, stored, MIXED)
                    sums1 = tl.fma(w, y1 * scale1, sums1)
            else:
                last = i_r + ROWS >= rows
                if last:
                    _store_spread(0, tp, rp, L64, col0 + i * step + o_c, sums, m_c, work_ptr)
                    sums = tl.zeros([ROWS, COLS], dtype=accum)
                i = tl.where(last, i + 1, i)
                i_r = tl.where(last, 0, i_r + ROWS)
        if GENERAL:
            m_c = (o_c < width) & (o_c < left - i * step)
            if on:
                _store_spread(0, tp, rp, L64, col0 + i * step + o_c, sums, m_c, work_ptr)
            if on1:
                _store_spread(1, tp, rp1, L64, col0 + i * step + o_c, sums1, m_c, work_ptr)


@triton.jit
def _store_spread(e, tp, rp, L, o, sums, m_c, work_ptr):
    """Partial sums of a chunk of an outer tile, one per column."""
    ptr = work_ptr + tl.load(rp + R_OUTER_PARTIAL) + tl.load(tp + T_SLOT0 + e) * L
    tl.store(ptr + o, tl.sum(sums, axis=0), mask=m_c)


@triton.jit
def _unaligned(
    kind, e, place, tp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GENERAL: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Either product for one role, reading number by number."""
    accum: tl.constexpr = work_ptr.dtype.element_ty
    row0, rows, col0, chunks, step, width, left, L, R = in_units(place, 1)
    source, inner = tl.load(tp + T_SOURCE), kind == INNER
    L64, rp = L.to(tl.int64), lp + ROLES_AT + e * ROLE_WIDTH
    q0, r0 = (col0 // R).to(tl.int64), (col0 % R).to(tl.int64)
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLS)
    w_ptr += row0 * L64 + col0
    y_ptr, y_stored, yp, yq, yr = source_of(
        rp, ap, e, source, inner, row0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED
    )
    y_step = ((step // R) * yq + (step % R) * yr).to(tl.int32)
    o_y = (o_c // R) * yq.to(tl.int32) + (o_c % R) * yr.to(tl.int32)
    scale = scale_of(rp, source, double_ptr, accum)
    row_blocks = tl.cdiv(rows, ROWS)
    for a in range(0, tl.where(inner, row_blocks, chunks)):  # inner: rows outside, chunks inside; else the other way
        sums = tl.zeros([ROWS, COLS], dtype=accum)
        for b in range(0, tl.where(inner, chunks, row_blocks)):
            i_r, i = tl.where(inner, a, b) * ROWS, tl.where(inner, b, a)
            m = (i_r + o_r < rows)[:, None] & ((o_c < width) & (o_c < left - i * step))[None, :]
            w = tl.load(w_ptr + i_r * L64 + i * step + (o_r[:, None] * L + o_c[None, :]), mask=m, other=0.0).to(accum)
            o = (i_r + o_r)[:, None] * yp.to(tl.int32) + o_y[None, :]
            y = load_vector(y_ptr + i * y_step, y_stored + i * y_step, o, m, source == STORED, MIXED)
            sums = tl.fma(w, y * scale, sums)
        if inner:
            m_r = a * ROWS + o_r < rows
            if e == 0:  # as in a kernel of one direction: a layer's bits must not depend on the group that it is in
                _store_slab(e, tp, rp, row0, a * ROWS, o_r, q0, r0, width, sums, m_r, o_c, work_ptr, False)
            elif GENERAL:
                _store_slab(e, tp, rp, row0, a * ROWS, o_r, q0, r0, width, sums, m_r, o_c, work_ptr, True)
        else:
            m_c = (o_c < width) & (o_c < left - a * step)
            _store_spread(e, tp, rp, L64, col0 + a * step + o_c, sums, m_c, work_ptr)


@triton.jit
def product_tile(
    kind, tp, lp, ap, weight_ptr, distance, vector_ptr, saved_ptr, work_ptr, double_ptr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, GENERAL: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """An INNER or OUTER tile. Layers whose rows are not at multiples of 16 bytes are few and small: one simple path
    reads them number by number, one direction after the other.
    """
    UNIT: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    place = place_of(tp, lp)
    if (distance % UNIT == 0) & (tl.load(lp + L_ALIGNED) != 0):
        w_ptr = weight_ptr + distance // UNIT * UNIT
        if kind == INNER:
            _inner(
                place, tp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr,
                UNIT, ROWS, COLS, STAGES, GENERAL, MIXED,
            )  # fmt: skip
        else:
            _outer(
                place, tp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr,
                UNIT, ROWS, COLS, STAGES, GENERAL, MIXED,
            )  # fmt: skip
    else:
        for e in range(0, 1 + GENERAL):
            if (tl.load(tp + T_MASK) >> e & 1) != 0:
                _unaligned(
                    kind, e, place, tp, lp, ap, weight_ptr + distance, vector_ptr, saved_ptr, work_ptr, double_ptr,
                    ROWS // 4, COLS, GENERAL, MIXED,
                )  # fmt: skip
