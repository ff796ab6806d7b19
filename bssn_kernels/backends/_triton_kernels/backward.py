"""The backward kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_kernels.backends._tables import ADDRESSES, BLOCK_FIELDS, LAYER_FIELDS, ROLE_FIELDS, TILE_FIELDS
from bssn_kernels.backends._triton_kernels.device import await_counter, cast, draw, leave, only, select
from bssn_kernels.backends._triton_kernels.products import in_units, place_of, product_tile
from bssn_kernels.backends._triton_kernels.records import (
    ADDRESS_WIDTH,
    DOT,
    FLAT,
    LAYER_WIDTH,
    ROLE_WIDTH,
    ROLES_AT,
    SIZES,
    TILE_WIDTH,
    UPDATE,
    at,
)
from bssn_kernels.backends._triton_kernels.sums import arrive, block_of
from bssn_kernels.plan import SCALARS

T_KIND, T_LAYER, T_ROW0, T_ROWS, T_SLOT0, T_WAIT = at(TILE_FIELDS, "kind", "layer", "row0", "rows", "slot0", "wait")
T_WAIT_TARGET = at(TILE_FIELDS, "wait_target")
B_COUNTER = at(BLOCK_FIELDS, "counter")
L_ALIGNED, L_SCALARS, L_DOTS = at(LAYER_FIELDS, "aligned", "scalars", "dots")
R_EXISTS, R_DIRECTION, R_INNER_FIRST, R_STORED_XQ = at(ROLE_FIELDS, "exists", "direction", "inner_first", "stored_xq")
R_STORED_XR, R_STORED_YP, R_STORED_YQ = at(ROLE_FIELDS, "stored_xr", "stored_yp", "stored_yq")
R_STORED_YR, R_RAW_XQ, R_RAW_XR, R_RAW_YP = at(ROLE_FIELDS, "stored_yr", "raw_xq", "raw_xr", "raw_yp")
R_RAW_YQ, R_RAW_YR, R_SLAB, R_SPREAD = at(ROLE_FIELDS, "raw_yq", "raw_yr", "slab", "spread")
R_SAVED_SPREAD, R_SAVED_SLAB, R_SAVED_START = at(ROLE_FIELDS, "saved_spread", "saved_slab", "saved_start")
A_WEIGHT = at(ADDRESSES, "weight")
S_MULTIPLIER, S_SLOPE_OUT, S_START_OUT = at(SCALARS, "multiplier", "slope_out", "start_out")
S_RESIDUAL_OUT = at(SCALARS, "residual_out")


@triton.jit
def _dot(tp, g_ptr, w_ptr, accum: tl.constexpr, BLOCK: tl.constexpr):
    """<G, W> of a flat tile. G is read again soon, W is not."""
    start, n = tl.load(tp + T_ROW0).to(tl.int64) * FLAT, tl.load(tp + T_ROWS)
    g_ptr += start
    w_ptr += start
    o = tl.arange(0, BLOCK)
    whole = n // 8 * 8
    sums = tl.zeros([BLOCK], dtype=accum)
    for i in tl.range(0, whole, BLOCK, num_stages=1):
        m = i + o < whole
        w = tl.load(w_ptr + i + o, mask=m, other=0.0, eviction_policy="evict_first").to(accum)
        sums = tl.fma(tl.load(g_ptr + i + o, mask=m, other=0.0).to(accum), w, sums)
    product = tl.sum(sums, axis=0)
    if whole < n:
        o_t = whole + tl.arange(0, 8)
        w = tl.load(w_ptr + o_t, mask=o_t < n, other=0.0).to(accum)
        product += tl.sum(tl.load(g_ptr + o_t, mask=o_t < n, other=0.0).to(accum) * w, axis=0)
    return product


@triton.jit
def _rank_spread(
    lp, rp, q, r, R, o_c, m_c, product, scalars_ptr, saved_ptr, work_ptr, THROUGH: tl.constexpr
):  # fmt: skip
    """The spread side of dW's rank terms for a chunk: of k u v^T, and of k start r^T, 0 where they do not count."""
    accum: tl.constexpr = saved_ptr.dtype.element_ty
    d = tl.load(rp + R_DIRECTION)
    slope = tl.load(scalars_ptr + S_SLOPE_OUT + d).to(tl.float64)
    counts = (slope != 0.0) & (tl.load(rp + R_EXISTS) != 0)
    factor = tl.where(counts, product * slope, 0.0).to(accum)
    xq, xr = tl.load(rp + R_STORED_XQ), tl.load(rp + R_STORED_XR)
    o_x = q * xq + r * xr + (o_c // R) * xq + (o_c % R) * xr
    x = tl.load(saved_ptr + tl.load(rp + R_SAVED_SPREAD) + o_x, mask=only(m_c, counts), other=0.0)
    other = tl.zeros_like(x)
    if THROUGH:
        start, residual = tl.load(scalars_ptr + S_START_OUT + d), tl.load(scalars_ptr + S_RESIDUAL_OUT + d)
        goes = only(m_c, counts & (start != 0.0))
        from_spread = tl.load(rp + R_INNER_FIRST) != 0  # it started from the spread, else r is one
        ptr = work_ptr + tl.load(rp + R_SPREAD)
        if from_spread:
            ptr = saved_ptr + tl.load(rp + R_SAVED_START)
        rq, rr = tl.where(from_spread, xq, tl.load(rp + R_RAW_XQ)), tl.where(from_spread, xr, tl.load(rp + R_RAW_XR))
        other = tl.load(ptr + q * rq + r * rr + (o_c // R) * rq + (o_c % R) * rr, mask=goes, other=0.0)
        other = tl.where(goes, (other - tl.where(from_spread, 0.0, residual) * x) * (factor * start), 0.0)
    return factor * x, other


@triton.jit
def _slab_places(rp, p, q, r, R, o_r, o_c, OTHER: tl.constexpr, WIDE: tl.constexpr):
    """Where the slab of a block of numbers stands: its first number, stride of rows, place of each from the first.

    OTHER: not of the vector, but of what stands beside start: the raw product that r is made of, or start itself.
    """
    yp, yq, yr = tl.load(rp + R_STORED_YP), tl.load(rp + R_STORED_YQ), tl.load(rp + R_STORED_YR)
    if OTHER:
        raw = tl.load(rp + R_INNER_FIRST) != 0
        yp = tl.where(raw, tl.load(rp + R_RAW_YP), yp)
        yq, yr = tl.where(raw, tl.load(rp + R_RAW_YQ), yq), tl.where(raw, tl.load(rp + R_RAW_YR), yr)
    o_y = (o_r * yp.to(tl.int32))[:, None]
    if WIDE:
        o_y = o_y + ((o_c // R) * yq.to(tl.int32) + (o_c % R) * yr.to(tl.int32))[None, :]
    return p * yp + q * yq + r * yr, yp, o_y


@triton.jit
def _rank_slab(
    lp, rp, i_r, begin, stride, o_y, other_begin, other_stride, o_z, m, scalars_ptr, saved_ptr, work_ptr,
    THROUGH: tl.constexpr,
):  # fmt: skip
    """The slab side for a block of rows: of k u v^T, and of k start r^T."""
    d = tl.load(rp + R_DIRECTION)
    counts = (tl.load(scalars_ptr + S_SLOPE_OUT + d) != 0.0) & (tl.load(rp + R_EXISTS) != 0)
    m = only(m, counts)
    y = tl.load(saved_ptr + tl.load(rp + R_SAVED_SLAB) + begin + i_r * stride + o_y, mask=m, other=0.0)
    other = tl.zeros_like(y)
    if THROUGH:
        start, residual = tl.load(scalars_ptr + S_START_OUT + d), tl.load(scalars_ptr + S_RESIDUAL_OUT + d)
        goes = only(m, start != 0.0)
        raw = tl.load(rp + R_INNER_FIRST) != 0  # r is a slab, else it started from one
        ptr = saved_ptr + tl.load(rp + R_SAVED_START)
        if raw:
            ptr = work_ptr + tl.load(rp + R_SLAB)
        other = tl.load(ptr + other_begin + i_r * other_stride + o_z, mask=goes, other=0.0)
        other = tl.where(goes, other - tl.where(raw, residual, 0.0) * y, 0.0)
    return y, other


@triton.jit
def _plus_rank(
    total, lp, rp, i_r, p, q, r, R, o_r, o_c, x, x0, m, scalars_ptr, saved_ptr, work_ptr,
    THROUGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of numbers plus k (u v^T + start r^T) of one direction, from its spread side."""
    begin, stride, o_y = _slab_places(rp, p, q, r, R, o_r, o_c, False, WIDE)
    begin0, stride0, o_y0 = _slab_places(rp, p, q, r, R, o_r, o_c, True, WIDE)
    y, y0 = _rank_slab(
        lp, rp, i_r, begin, stride, o_y, begin0, stride0, o_y0, m, scalars_ptr, saved_ptr, work_ptr, THROUGH
    )
    total = tl.fma(x[None, :], y, total)
    if THROUGH:
        total = tl.fma(x0[None, :], y0, total)
    return total


@triton.jit
def _update(
    place, lp, g_ptr, d_ptr, saved_ptr, work_ptr, double_ptr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GENERAL: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """dW = m G + sum over directions of k (u v^T + start r^T)."""
    accum: tl.constexpr = saved_ptr.dtype.element_ty
    row0, rows, col0, chunks, step, width, left, L, R = in_units(place, UNIT)
    L64 = L.to(tl.int64)
    rp, rp1 = lp + ROLES_AT, lp + ROLES_AT + ROLE_WIDTH
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLS)
    g_ptr += row0 * L64 + col0
    d_ptr += row0 * L64 + col0
    scalars_ptr = saved_ptr + tl.load(lp + L_SCALARS)
    product = tl.load(double_ptr + tl.load(lp + L_DOTS), cache_modifier=".cg")
    multiplier = tl.load(scalars_ptr + S_MULTIPLIER)
    for i in range(0, chunks):
        m_c = (o_c < width) & (o_c < left - i * step)
        begin = col0 + i * step
        q, r = (begin // R).to(tl.int64), (begin % R).to(tl.int64)
        x, x0 = _rank_spread(lp, rp, q, r, R, o_c, m_c, product, scalars_ptr, saved_ptr, work_ptr, THROUGH)
        if GENERAL:
            x1, x10 = _rank_spread(lp, rp1, q, r, R, o_c, m_c, product, scalars_ptr, saved_ptr, work_ptr, THROUGH)
        for i_r in tl.range(0, rows, ROWS, num_stages=1):
            m_r = i_r + o_r < rows
            m = m_r[:, None] & m_c[None, :]
            o = i_r * L64 + i * step + (o_r[:, None] * L + o_c[None, :])
            total = multiplier * tl.load(g_ptr + o, mask=m, other=0.0, eviction_policy="evict_first").to(accum)
            total = _plus_rank(
                total, lp, rp, i_r, row0, q, r, R, o_r, o_c, x, x0, m_r[:, None], scalars_ptr, saved_ptr, work_ptr,
                THROUGH, False,
            )  # fmt: skip
            if GENERAL:
                total = _plus_rank(
                    total, lp, rp1, i_r, row0, q, r, R, o_r, o_c, x1, x10, m, scalars_ptr, saved_ptr, work_ptr,
                    THROUGH, True,
                )  # fmt: skip
            tl.store(d_ptr + o, cast(total, d_ptr.dtype.element_ty), mask=m, eviction_policy="evict_first")


@triton.jit
def _update_unaligned(
    place, lp, g_ptr, d_ptr, saved_ptr, work_ptr, double_ptr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GENERAL: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """The same number by number, one direction after the other."""
    accum: tl.constexpr = saved_ptr.dtype.element_ty
    row0, rows, col0, chunks, step, width, left, L, R = in_units(place, 1)
    L64 = L.to(tl.int64)
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLS)
    scalars_ptr = saved_ptr + tl.load(lp + L_SCALARS)
    product = tl.load(double_ptr + tl.load(lp + L_DOTS), cache_modifier=".cg")
    row_blocks = tl.cdiv(rows, ROWS)
    for block in range(0, chunks * row_blocks):
        i, i_r = block // row_blocks, block % row_blocks * ROWS
        m_c = (o_c < width) & (o_c < left - i * step)
        m_r = i_r + o_r < rows
        m = m_r[:, None] & m_c[None, :]
        begin = col0 + i * step
        q, r = (begin // R).to(tl.int64), (begin % R).to(tl.int64)
        o = (row0 + i_r) * L64 + begin + (o_r[:, None] * L + o_c[None, :])
        total = tl.load(scalars_ptr + S_MULTIPLIER) * tl.load(g_ptr + o, mask=m, other=0.0).to(accum)
        for e in range(0, 1 + GENERAL):
            rp = lp + ROLES_AT + e * ROLE_WIDTH
            x, x0 = _rank_spread(lp, rp, q, r, R, o_c, m_c, product, scalars_ptr, saved_ptr, work_ptr, THROUGH)
            total = _plus_rank(
                total, lp, rp, i_r, row0, q, r, R, o_r, o_c, x, x0, m if GENERAL else m_r[:, None], scalars_ptr,
                saved_ptr, work_ptr, THROUGH, GENERAL,
            )  # fmt: skip
        tl.store(d_ptr + o, cast(total, d_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    tile_ptr, block_ptr, layer_ptr, address_ptr, weight_ptr, grad_ptrs, out_ptrs, saved_ptr, grad_gain_ptr, work_ptr,
    double_ptr, counter_ptr, n_tiles, n_programs, n_counters,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, GENERAL: tl.constexpr,
    THROUGH: tl.constexpr,
):  # fmt: skip
    """dW and dgain of some layers; see BackwardSchedule."""
    # Through the iteration a block has twice the terms, and with all rows at once would not fit the registers.
    AT_ONCE: tl.constexpr = ROWS // 4 if THROUGH else ROWS
    accum: tl.constexpr = saved_ptr.dtype.element_ty
    UNIT: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    ticket = draw(counter_ptr)
    while ticket < n_tiles:
        tp = tile_ptr + ticket * TILE_WIDTH
        kind, k = tl.load(tp + T_KIND), tl.load(tp + T_LAYER)
        lp = layer_ptr + k * LAYER_WIDTH
        ap = address_ptr + k * ADDRESS_WIDTH
        target, distance = tl.load(tp + T_WAIT_TARGET), tl.load(ap + A_WEIGHT)
        if target > 0:
            await_counter(counter_ptr, tl.load(tp + T_WAIT), target)
        if kind == UPDATE:
            g_ptr, d_ptr = select(grad_ptrs, k), select(out_ptrs, k)
            place = place_of(tp, lp)
            if tl.load(lp + L_ALIGNED) != 0:
                _update(
                    place, lp, g_ptr, d_ptr, saved_ptr, work_ptr, double_ptr,
                    UNIT, AT_ONCE, COLS, GENERAL, THROUGH,
                )  # fmt: skip
            else:
                _update_unaligned(
                    place, lp, g_ptr, d_ptr, saved_ptr, work_ptr, double_ptr, ROWS // 4, COLS, GENERAL, THROUGH
                )
        else:
            if kind == DOT:
                g_ptr = select(grad_ptrs, k)
                if distance % UNIT == 0:
                    product = _dot(tp, g_ptr, weight_ptr + distance // UNIT * UNIT, accum, BLOCK)
                else:
                    product = _dot(tp, g_ptr, weight_ptr + distance, accum, BLOCK // 2)
                tl.store(double_ptr + tl.load(lp + L_DOTS) + 1 + tl.load(tp + T_SLOT0), product)
            elif THROUGH:
                product_tile(
                    kind, tp, lp, ap, weight_ptr, distance, saved_ptr, saved_ptr, work_ptr, double_ptr,
                    ROWS, COLS, STAGES, GENERAL, False,
                )  # fmt: skip
            bp = block_of(tp, block_ptr)
            arrive(
                bp, tl.load(bp + B_COUNTER), lp, ap, double_ptr, saved_ptr, saved_ptr, saved_ptr, grad_gain_ptr,
                work_ptr, double_ptr, counter_ptr, k, False, THROUGH,
            )  # fmt: skip
        ticket = draw(counter_ptr)
    leave(counter_ptr, ticket, n_tiles, n_programs, n_counters)
