"""The Triton kernels: every layer of a group in one launch, forward and backward. The work is data: see _schedule.py.

Reads and writes of full-size arrays, per layer, by phase (partial sums add 1 to 8 %; Schedule.traffic counts the rest):

    forward   ROWS     reads W once per iteration, for both products, where a program holds whole rows
              INNER    of other layers: reads W once per iteration
              OUTER    reads W once per iteration; from L2 if INNER came first and the set of weights fits there
              SCALE    reads W (evict-first), from L2 under the same condition; writes W_bar (evict-first)
              without an iteration: one INNER pass; directions of contradicting order: each phase twice
    backward  DOT      reads G and W (W evict-first, G stays for UPDATE)
              INNER, OUTER   only through the iteration: read W once more, just after DOT read it
              UPDATE   reads G (evict-first), writes dW (evict-first)

Rules of this file. Data, then a barrier of the whole program, then one releasing atomic; who reads acquires first. A
tile waits only on counters that smaller tickets raise. No float atomics: sums have a place per tile and are added in
the order of places. Kernels are compiled without fusion of a product and a sum, and call fma where it is meant: left
to the compiler, it would be another one in each variant of a kernel, and a layer's bits would depend on the group that
it is in. Counters are zero between launches: the program that draws the last ticket of all knows that every other
program is done, and clears them. Pointers to weights, gradients and results are an anchor of the right type plus a
distance, which keeps accesses at 16 bytes; UNIT is 16 bytes in elements, or 1 for a layer whose rows do not begin at
multiples of that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_kernels.backends import _tables as names
from bssn_kernels.backends._geometry import FLAT as FLAT_STEP
from bssn_kernels.plan import SCALARS


def _at(fields, *names):
    found = [tl.constexpr(fields.index(name)) for name in names]
    return found if len(found) > 1 else found[0]


INNER, OUTER, VECTORS, SCALE, DOT, UPDATE, ROWS_WHOLE, COMBINE = (
    tl.constexpr(getattr(names, kind))
    for kind in ("INNER", "OUTER", "VECTORS", "SCALE", "DOT", "UPDATE", "ROWS", "COMBINE")
)
STORED, RAW, SCALED, SAVED = (tl.constexpr(source) for source in (names.STORED, names.RAW, names.SCALED, names.SAVED))

TILE_WIDTH, BLOCK_WIDTH, VECTOR_WIDTH = (
    tl.constexpr(len(fields)) for fields in (names.TILE_FIELDS, names.BLOCK_FIELDS, names.VECTOR_FIELDS)
)
LAYER_WIDTH = tl.constexpr(len(names.LAYER_FIELDS) + 2 * len(names.ROLE_FIELDS))
ROLES_AT, ROLE_WIDTH = tl.constexpr(len(names.LAYER_FIELDS)), tl.constexpr(len(names.ROLE_FIELDS))
ADDRESS_WIDTH, FLOAT_WIDTH = tl.constexpr(len(names.ADDRESSES)), tl.constexpr(5)
FLAT = tl.constexpr(FLAT_STEP)
COUNTER = tl.constexpr(8)  # counters are 32 bytes apart, or those who poll one slow those who raise its neighbour

T_KIND, T_LAYER, T_ROW0, T_ROWS, T_COL0 = _at(names.TILE_FIELDS, "kind", "layer", "row0", "rows", "col0")
T_CHUNKS, T_STEP, T_WIDTH, T_END = _at(names.TILE_FIELDS, "chunks", "step", "width", "end")
T_SLOT0, T_BLOCK = _at(names.TILE_FIELDS, "slot0", "block")  # slot1 follows slot0
T_WAIT, T_WAIT_TARGET, T_MASK, T_SOURCE = _at(names.TILE_FIELDS, "wait", "wait_target", "mask", "source")

B_KIND, B_COUNTER, B_ARRIVALS, B_THEN = _at(names.BLOCK_FIELDS, "kind", "counter", "arrivals", "then")
B_THEN_TARGET, B_DONE, B_BATCH = _at(names.BLOCK_FIELDS, "then_target", "done", "batch")
B_MASK, B_PARITY, B_SHARE, B_FINAL, B_DOT = _at(names.BLOCK_FIELDS, "mask", "parity", "share", "final", "dot")
B_START0, B_COUNT0, B_SEGMENTS = _at(names.BLOCK_FIELDS, "start0", "count0", "segments")
B_START1, B_COUNT1 = _at(names.BLOCK_FIELDS, "start1", "count1")

L_L, L_R, L_ALIGNED = _at(names.LAYER_FIELDS, "l", "r", "aligned")
L_SCALARS, L_HAS_GAIN, L_NORM_ADDS = _at(names.LAYER_FIELDS, "scalars", "has_gain", "norm_adds")
L_THROUGH, L_ITERATED = _at(names.LAYER_FIELDS, "through", "iterated")
L_DOTS, L_DOT_COUNT = _at(names.LAYER_FIELDS, "dots", "dot_count")

R_EXISTS, R_DIRECTION, R_INNER_FIRST = _at(names.ROLE_FIELDS, "exists", "direction", "inner_first")
R_STORED_XQ, R_STORED_XR = _at(names.ROLE_FIELDS, "stored_xq", "stored_xr")
R_STORED_YP, R_STORED_YQ, R_STORED_YR = _at(names.ROLE_FIELDS, "stored_yp", "stored_yq", "stored_yr")
R_RAW_XQ, R_RAW_XR = _at(names.ROLE_FIELDS, "raw_xq", "raw_xr")
R_RAW_YP, R_RAW_YQ, R_RAW_YR = _at(names.ROLE_FIELDS, "raw_yp", "raw_yq", "raw_yr")
R_MODULUS, R_FOLD, R_FOLD_STRIDE, R_ENTRY_STRIDE = _at(
    names.ROLE_FIELDS, "modulus", "fold", "fold_stride", "entry_stride"
)
R_SLAB_SIZE, R_INNER_SLOTS, R_INNER_PARTIAL = _at(names.ROLE_FIELDS, "slab_size", "inner_slots", "inner_partial")
R_OUTER_SLOTS, R_OUTER_PARTIAL = _at(names.ROLE_FIELDS, "outer_slots", "outer_partial")
R_SLAB, R_SLAB_ODD, R_SPREAD, R_SPREAD_ODD = _at(names.ROLE_FIELDS, "slab", "slab_odd", "spread", "spread_odd")
R_INNER_SHARES, R_INNER_SHARE_COUNT = _at(names.ROLE_FIELDS, "inner_shares", "inner_share_count")
R_OUTER_SHARES, R_OUTER_SHARE_COUNT = _at(names.ROLE_FIELDS, "outer_shares", "outer_share_count")
R_RESULTS = _at(names.ROLE_FIELDS, "results")
R_SAVED_SPREAD, R_SAVED_SLAB, R_SAVED_START = _at(names.ROLE_FIELDS, "saved_spread", "saved_slab", "saved_start")
RESULT_WIDTH = tl.constexpr(len(names.RESULTS))

V_LAYER, V_ADDRESS, V_RAW, V_SCALE, V_OK = _at(names.VECTOR_FIELDS, "layer", "address", "raw", "scale", "ok")
V_COPY, V_START, V_SAVED, V_DIVISOR = _at(names.VECTOR_FIELDS, "copy", "start", "saved", "divisor")
V_HIGH, V_LOW, V_BEGIN, V_COUNT, V_SIZE = _at(names.VECTOR_FIELDS, "high", "low", "begin", "count", "size")

A_WEIGHT, A_SPREAD, A_SLAB, A_GAIN = _at(names.ADDRESSES, "weight", "spread0", "slab0", "gain")

S_SIGMA, S_SIGMA_OUT, S_MULTIPLIER, S_SLOPE_OUT = _at(SCALARS, "sigma", "sigma_out", "multiplier", "slope_out")
S_SLOPE_GAIN, S_START_OUT, S_RESIDUAL_OUT = _at(SCALARS, "slope_gain", "start_out", "residual_out")
N_SCALARS = tl.constexpr(len(SCALARS))


# Whether a size is a multiple of 16 changes nothing in a kernel, and must not make another one.
SIZES = ["n_tiles", "n_programs", "n_counters"]


@triton.jit
def _draw(counter_ptr):
    """The next ticket."""
    return tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def _raise(counter_ptr, i):
    """Publish what this program wrote, and count it; returns the count before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr + i * COUNTER, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _await(counter_ptr, i, target):
    """Mostly it is there already. Else polls with reads: an acquire each time would hold up those who count, and empty
    L1 for the programs beside."""
    ptr = counter_ptr + i * COUNTER
    while tl.atomic_add(ptr, 0, sem="acquire", scope="gpu") < target:
        while tl.load(ptr, volatile=True) < target:
            pass


@triton.jit
def _leave(counter_ptr, ticket, n_tiles, n_programs, n_counters):
    """Who draws the last ticket clears the counters for the next launch."""
    if ticket == n_tiles + n_programs - 1:
        o = tl.arange(0, 1024)
        for i in range(0, n_counters * COUNTER, 1024):
            zeros = tl.zeros([1024], dtype=tl.int32)
            tl.store(counter_ptr + i + o, zeros, mask=i + o < n_counters * COUNTER)


@triton.jit
def _finite(x):
    """Not x - x == 0, which a compiler that fuses makes of a product what was rounded off, and so false."""
    return tl.abs(x) < float("inf")


@triton.jit
def _select(ptrs, i):
    """Pointer number i of a tuple, whose pointers are 16 bytes apart or multiples of that."""
    UNIT: tl.constexpr = 128 // ptrs[0].dtype.element_ty.primitive_bitwidth
    anchor = ptrs[0].to(tl.int64)
    address = anchor
    for first in tl.static_range(0, len(ptrs), 8):  # the host fills tuples up to a multiple of 8
        if i // 8 == first // 8:
            for k in tl.static_range(8):
                address = tl.where(i == first + k, ptrs[first + k].to(tl.int64), address)
    return ptrs[0] + (address - anchor) // 16 * UNIT


@triton.jit
def _only(mask, condition):
    """The mask where a scalar condition holds. (The interpreter takes no mask that was `and`ed with a scalar.)"""
    return tl.where(condition, mask, mask != mask)


@triton.jit
def _load_vector(ptr, stored_ptr, o, mask, stored, MIXED: tl.constexpr):
    """Numbers of a vector in accumulation dtype; MIXED: stored vectors have another dtype."""
    if MIXED:
        x = tl.load(stored_ptr + o, mask=_only(mask, stored), other=0.0).to(ptr.dtype.element_ty)
        return x + tl.load(ptr + o, mask=_only(mask, stored == 0), other=0.0)
    else:
        return tl.load(ptr + o, mask=mask, other=0.0)


@triton.jit
def _scale_of(rp, source, double_ptr, accum: tl.constexpr):
    """What the raw vector of an earlier iteration is multiplied with; 1 for other sources."""
    scale = tl.full([], 1.0, dtype=tl.float64)
    if (source >= SCALED) & (source < SAVED):
        at = tl.load(rp + R_RESULTS) + RESULT_WIDTH * (source - SCALED)
        scale = tl.load(double_ptr + at + 1)
    return scale.to(accum)


@triton.jit
def _source_of(rp, ap, e, source, inner, p0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED: tl.constexpr):
    """Where the vector begins that a product reads: the spread of role e for an inner one, else the slab.

    Returns pointer, pointer if stored in another dtype, strides of p, q and r.
    """
    raw = (source >= RAW) & (source < SAVED)
    if inner:
        stride_p = q0 * 0
        stride_q = tl.where(raw, tl.load(rp + R_RAW_XQ), tl.load(rp + R_STORED_XQ))
        stride_r = tl.where(raw, tl.load(rp + R_RAW_XR), tl.load(rp + R_STORED_XR))
        stored_at, saved_at = tl.load(ap + A_SPREAD + 2 * e), tl.load(rp + R_SAVED_SPREAD)
        even_at, odd_at = tl.load(rp + R_SPREAD), tl.load(rp + R_SPREAD_ODD)
    else:
        stride_p = tl.where(raw, tl.load(rp + R_RAW_YP), tl.load(rp + R_STORED_YP))
        stride_q = tl.where(raw, tl.load(rp + R_RAW_YQ), tl.load(rp + R_STORED_YQ))
        stride_r = tl.where(raw, tl.load(rp + R_RAW_YR), tl.load(rp + R_STORED_YR))
        stored_at, saved_at = tl.load(ap + A_SLAB + 2 * e), tl.load(rp + R_SAVED_SLAB)
        even_at, odd_at = tl.load(rp + R_SLAB), tl.load(rp + R_SLAB_ODD)
    begin = p0 * stride_p + q0 * stride_q + r0 * stride_r
    stored_ptr, ptr = vector_ptr + stored_at + begin, saved_ptr + saved_at + begin
    if raw:
        ptr = work_ptr + tl.where((source - RAW) % 2 != 0, odd_at, even_at) + begin
    if not MIXED:
        if source == STORED:
            ptr = stored_ptr
    return ptr, stored_ptr, stride_p, stride_q, stride_r


@triton.jit
def _place(tp, lp):
    """Where a tile is: first row, rows, first column, chunks of columns, their distance and width, end; L and R."""
    row0, rows, col0 = tl.load(tp + T_ROW0).to(tl.int64), tl.load(tp + T_ROWS), tl.load(tp + T_COL0)
    chunks, step = tl.load(tp + T_CHUNKS), tl.load(tp + T_STEP)
    width, end = tl.load(tp + T_WIDTH), tl.load(tp + T_END)
    return row0, rows, col0, chunks, step, width, end, tl.load(lp + L_L).to(tl.int32), tl.load(lp + L_R).to(tl.int32)


@triton.jit
def _in_units(place, UNIT: tl.constexpr):
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
    row0, rows, col0, chunks, step, width, left, L, R = _in_units(place, UNIT)
    mask, source = tl.load(tp + T_MASK), tl.load(tp + T_SOURCE)
    L64 = L.to(tl.int64)
    q0, r0 = (col0 // R).to(tl.int64), (col0 % R).to(tl.int64)
    step_q, step_r = step // R, step % R
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLS)
    stored = source == STORED
    w_ptr += row0 * L64 + col0

    rp, on = lp + ROLES_AT, (mask & 1) != 0
    x_ptr, x_stored, _, xq, xr = _source_of(
        rp, ap, 0, source, True, row0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED
    )
    x_step = (step_q * xq + step_r * xr).to(tl.int32)
    o_x = (o_c // R) * xq.to(tl.int32) + (o_c % R) * xr.to(tl.int32)
    scale = _scale_of(rp, source, double_ptr, accum)
    if GENERAL:
        rp1, on1 = lp + ROLES_AT + ROLE_WIDTH, (mask & 2) != 0
        x1_ptr, x1_stored, _, x1q, x1r = _source_of(
            rp1, ap, 1, source, True, row0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED
        )
        x1_step = (step_q * x1q + step_r * x1r).to(tl.int32)
        o_x1 = (o_c // R) * x1q.to(tl.int32) + (o_c % R) * x1r.to(tl.int32)
        scale1 = _scale_of(rp1, source, double_ptr, accum)

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
            x = _load_vector(x_ptr + i * x_step, x_stored + i * x_step, o_x, _only(m_c, on), stored, MIXED)
            sums = tl.fma(w, (x * scale)[None, :], sums)
            if GENERAL:
                if on1:  # a branch keeps these loads, which hit L1, out of the pipeline: it would take registers
                    x1 = _load_vector(x1_ptr + i * x1_step, x1_stored + i * x1_step, o_x1, m_c, stored, MIXED)
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
    row0, rows, col0, chunks, step, width, left, L, R = _in_units(place, UNIT)
    mask, source = tl.load(tp + T_MASK), tl.load(tp + T_SOURCE)
    L64 = L.to(tl.int64)
    q0, r0 = (col0 // R).to(tl.int64), (col0 % R).to(tl.int64)
    step_q, step_r = step // R, step % R
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLS)
    stored = source == STORED
    w_ptr += row0 * L64 + col0

    rp, on = lp + ROLES_AT, (mask & 1) != 0
    y_ptr, y_stored, yp, yq, yr = _source_of(
        rp, ap, 0, source, False, row0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED
    )
    y_step, y_row = (step_q * yq + step_r * yr).to(tl.int32), yp.to(tl.int32)
    scale = _scale_of(rp, source, double_ptr, accum)
    if GENERAL:
        rp1, on1 = lp + ROLES_AT + ROLE_WIDTH, (mask & 2) != 0
        y1_ptr, y1_stored, y1p, y1q, y1r = _source_of(
            rp1, ap, 1, source, False, row0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED
        )
        y1_step, y1_row = (step_q * y1q + step_r * y1r).to(tl.int32), y1p.to(tl.int32)
        o_y1 = (o_c // R) * y1q.to(tl.int32) + (o_c % R) * y1r.to(tl.int32)
        scale1 = _scale_of(rp1, source, double_ptr, accum)

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
            y = _load_vector(y_ptr + at, y_stored + at, (i_r + o_r) * y_row, _only(m_r, on), stored, MIXED)
            sums = tl.fma(w, (y * scale)[:, None], sums)
            if GENERAL:
                if on1:
                    at1, o_y = i * y1_step, (i_r + o_r)[:, None] * y1_row + o_y1[None, :]
                    y1 = _load_vector(y1_ptr + at1, y1_stored + at1, o_y, m, stored, MIXED)
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
    x_ptr, x_stored, _, xq, xr = _source_of(
        rp, ap, 0, source, True, row0, zero, zero, vector_ptr, saved_ptr, work_ptr, MIXED
    )
    # col0 is 0, and a compiler that knew would keep what follows from columns in registers from launch to end. No
    # division of integers, of which a thread would have 32: numbers below 2^12 are exact without.
    c = (tl.load(tp + T_COL0) + tl.arange(0, 128))[None, :] + (tl.arange(0, COLS // 128) * 128)[:, None]
    q = ((c.to(tl.float32) + 0.5) * (1.0 / R.to(tl.float32))).to(tl.int32)
    o_x = q * xq.to(tl.int32) + (c - q * R) * xr.to(tl.int32)
    x = _load_vector(x_ptr, x_stored, o_x, c < L, source == STORED, MIXED) * _scale_of(rp, source, double_ptr, accum)
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
def _whole(
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


@triton.jit
def _unaligned(
    kind, e, place, tp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GENERAL: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Either product for one role, reading number by number."""
    accum: tl.constexpr = work_ptr.dtype.element_ty
    row0, rows, col0, chunks, step, width, left, L, R = _in_units(place, 1)
    source, inner = tl.load(tp + T_SOURCE), kind == INNER
    L64, rp = L.to(tl.int64), lp + ROLES_AT + e * ROLE_WIDTH
    q0, r0 = (col0 // R).to(tl.int64), (col0 % R).to(tl.int64)
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLS)
    w_ptr += row0 * L64 + col0
    y_ptr, y_stored, yp, yq, yr = _source_of(
        rp, ap, e, source, inner, row0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED
    )
    y_step = ((step // R) * yq + (step % R) * yr).to(tl.int32)
    o_y = (o_c // R) * yq.to(tl.int32) + (o_c % R) * yr.to(tl.int32)
    scale = _scale_of(rp, source, double_ptr, accum)
    row_blocks = tl.cdiv(rows, ROWS)
    for a in range(0, tl.where(inner, row_blocks, chunks)):  # inner: rows outside, chunks inside; else the other way
        sums = tl.zeros([ROWS, COLS], dtype=accum)
        for b in range(0, tl.where(inner, chunks, row_blocks)):
            i_r, i = tl.where(inner, a, b) * ROWS, tl.where(inner, b, a)
            m = (i_r + o_r < rows)[:, None] & ((o_c < width) & (o_c < left - i * step))[None, :]
            w = tl.load(w_ptr + i_r * L64 + i * step + (o_r[:, None] * L + o_c[None, :]), mask=m, other=0.0).to(accum)
            o = (i_r + o_r)[:, None] * yp.to(tl.int32) + o_y[None, :]
            y = _load_vector(y_ptr + i * y_step, y_stored + i * y_step, o, m, source == STORED, MIXED)
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
def _product(
    kind, tp, lp, ap, weight_ptr, distance, vector_ptr, saved_ptr, work_ptr, double_ptr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, GENERAL: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """An INNER or OUTER tile. Layers whose rows are not at multiples of 16 bytes are few and small: one simple path
    reads them number by number, one direction after the other.
    """
    UNIT: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    place = _place(tp, lp)
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


@triton.jit
def _total(ptr, n):
    """Sum of n float64 numbers that this launch wrote, in a fixed order."""
    o = tl.arange(0, 128)
    sums = tl.zeros([128], dtype=tl.float64)
    for i in range(0, n, 128):
        sums += tl.load(ptr + i + o, mask=i + o < n, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, axis=0)


@triton.jit
def _add_up(part_ptr, out_ptr, n, entry_stride, terms, fold, fold_stride, slot_stride):
    """out[e] = the sum of its terms in a fixed order, in float64; returns the sum of the squares."""
    o_e, o_t = tl.arange(0, 128), tl.arange(0, 16)
    squares = tl.zeros([128], dtype=tl.float64)
    for i in range(0, n, 128):
        m_e = i + o_e < n
        sums = tl.zeros([16, 128], dtype=tl.float64)
        for t in range(0, terms, 16):
            slot, f = (t + o_t) // fold, (t + o_t) % fold
            o = (slot.to(tl.int64) * slot_stride + f * fold_stride)[:, None] + ((i + o_e) * entry_stride)[None, :]
            m = (t + o_t < terms)[:, None] & m_e[None, :]
            sums += tl.load(part_ptr + o, mask=m, other=0.0, cache_modifier=".cg").to(tl.float64)
        x = tl.sum(sums, axis=0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + i + o_e, x, mask=m_e)
        squares += x.to(tl.float64) * x.to(tl.float64)
    return tl.sum(squares, axis=0)


@triton.jit
def _dot_with_slab(raw_ptr, ptr, begin, n, classes, stride_p, stride_c):
    """Sum of raw[e] * slab[e] for begin <= e < begin + n; the slab is a stored vector."""
    o = tl.arange(0, 128)
    sums = tl.zeros([128], dtype=tl.float64)
    for i in range(0, n, 128):
        e = begin + i + o
        at = e // classes * stride_p + e % classes * stride_c
        y = tl.load(ptr + at, mask=i + o < n, other=0.0).to(raw_ptr.dtype.element_ty)
        sums += (tl.load(raw_ptr + e, mask=i + o < n, other=0.0, cache_modifier=".cg") * y).to(tl.float64)
    return tl.sum(sums, axis=0)


@triton.jit
def _combine(bp, lp, ap, e, vector_ptr, work_ptr, double_ptr, FORWARD: tl.constexpr):
    """Add up what the tiles of a block left for role e; the block's share of the norm is kept."""
    rp = lp + ROLES_AT + e * ROLE_WIDTH
    odd = tl.load(bp + B_PARITY) != 0
    # Numbers of the slab that the inner tiles of a block of rows left, one term per slot.
    classes = tl.load(rp + R_RAW_YP)
    begin, n = tl.load(bp + B_START0) * classes, (tl.load(bp + B_COUNT0) * classes).to(tl.int32)
    entry_stride, terms, fold, fold_stride = 1, tl.load(rp + R_INNER_SLOTS).to(tl.int32), 1, 0
    slot_stride, segments = tl.load(rp + R_SLAB_SIZE), 1
    part, raw = tl.load(rp + R_INNER_PARTIAL), tl.where(odd, tl.load(rp + R_SLAB_ODD), tl.load(rp + R_SLAB))
    shares = tl.load(rp + R_INNER_SHARES)
    if tl.load(bp + B_KIND) == OUTER:  # or of the spread, one term per slot and column that it folds
        entry_stride, fold = tl.load(rp + R_ENTRY_STRIDE).to(tl.int32), tl.load(rp + R_FOLD).to(tl.int32)
        fold_stride = tl.load(rp + R_FOLD_STRIDE).to(tl.int32)
        begin, n, segments = tl.load(bp + B_START0).to(tl.int64), tl.load(bp + B_COUNT0), tl.load(bp + B_SEGMENTS)
        if e == 1:
            begin, n, segments = tl.load(bp + B_START1).to(tl.int64), tl.load(bp + B_COUNT1), 1
        terms, slot_stride = tl.load(rp + R_OUTER_SLOTS).to(tl.int32) * fold, tl.load(lp + L_L)
        part, raw = tl.load(rp + R_OUTER_PARTIAL), tl.where(odd, tl.load(rp + R_SPREAD_ODD), tl.load(rp + R_SPREAD))
        shares = tl.load(rp + R_OUTER_SHARES)
    part_ptr, raw_ptr = work_ptr + part + begin * entry_stride, work_ptr + raw + begin
    share = tl.full([], 0.0, dtype=tl.float64)
    for i in range(0, segments):
        o = i * tl.load(lp + L_R)
        share += _add_up(part_ptr + o, raw_ptr + o, n, entry_stride, terms, fold, fold_stride, slot_stride)
    if FORWARD:
        if tl.load(bp + B_DOT) != 0:
            tl.debug_barrier()
            stride_p = tl.load(rp + R_STORED_YP)
            stride_c = tl.load(rp + R_STORED_YQ) + tl.load(rp + R_STORED_YR)  # one of them is 0
            y_ptr = vector_ptr + tl.load(ap + A_SLAB + 2 * e)
            share = _dot_with_slab(work_ptr + raw, y_ptr, begin, n, classes, stride_p, stride_c)
        tl.store(double_ptr + shares + tl.load(bp + B_SHARE), share)


@triton.jit
def _denominator(norm, eps, adds):
    return tl.where(adds, norm + eps, tl.where(norm < eps, eps, norm))


@triton.jit
def _denominator_slope(norm, eps, adds):
    return tl.where(adds | (norm > eps), 1.0, 0.0).to(tl.float64)


@triton.jit
def _finish(bp, lp, ap, fp, gain_ptr, saved_ptr, double_ptr):
    """The end of an iteration, from the norms of its raw products; csrc/algebra.h has the same for the CPU.

    The factors of the new vectors go to the iteration's results; after the last one the layer's SCALARS are written:
    sigmas, multiplier, derivatives.
    """
    eps, adds = tl.load(fp), tl.load(lp + L_NORM_ADDS) != 0
    iterated, final = tl.load(lp + L_ITERATED) != 0, tl.load(bp + B_FINAL) != 0
    scalars_ptr = saved_ptr + tl.load(lp + L_SCALARS)
    if final:
        o = tl.arange(0, 16)
        tl.store(scalars_ptr + o, tl.zeros([16], dtype=saved_ptr.dtype.element_ty), mask=o < N_SCALARS)
        tl.debug_barrier()
    mean = tl.full([], 0.0, dtype=tl.float64)
    for e in range(0, 2):
        rp = lp + ROLES_AT + e * ROLE_WIDTH
        if tl.load(rp + R_EXISTS) != 0:
            d = tl.load(rp + R_DIRECTION)
            sigma = _total(double_ptr + tl.load(rp + R_INNER_SHARES), tl.load(rp + R_INNER_SHARE_COUNT).to(tl.int32))
            weight = tl.load(fp + 1 + d)
            slope = weight
            if iterated:
                n_shares = tl.load(rp + R_OUTER_SHARE_COUNT).to(tl.int32)
                outer = _total(double_ptr + tl.load(rp + R_OUTER_SHARES), n_shares)
                inner_first = tl.load(rp + R_INNER_FIRST) != 0
                first = tl.sqrt(tl.where(inner_first, sigma, outer))
                den_first = _denominator(first, eps, adds)
                norm = tl.sqrt(tl.where(inner_first, outer, sigma)) / den_first
                den_second = _denominator(norm, eps, adds)
                sigma = norm * (norm / den_second)
                at = double_ptr + tl.load(rp + R_RESULTS) + RESULT_WIDTH * tl.load(bp + B_PARITY)
                tl.store(at, 1.0 / den_first)
                tl.store(at + 1, 1.0 / den_first / den_second)
                tl.store(at + 2, tl.where(_finite(sigma) & (sigma != 0.0), 1.0, 0.0))
                if final & (tl.load(lp + L_THROUGH) != 0):
                    slope *= 2.0 - norm * _denominator_slope(norm, eps, adds) / den_second
                    residual = sigma * _denominator_slope(first, eps, adds) * den_first / first
                    tl.store(scalars_ptr + S_START_OUT + d, 1.0 / den_first)
                    tl.store(scalars_ptr + S_RESIDUAL_OUT + d, residual)
                slope = tl.where(sigma == 0.0, 0.0, slope)
            mean += weight * sigma
            if final:
                tl.store(scalars_ptr + S_SIGMA_OUT + d, sigma)
                tl.store(scalars_ptr + S_SLOPE_OUT + d, slope)  # its share of dm/dmean, which the mean gives
    if final:
        tl.debug_barrier()
        floor, fixed_gain = tl.load(fp + 3), tl.load(fp + 4)
        below = (floor > 0.0) & (mean <= floor)
        divisor = tl.where(below, floor, mean)
        zero = divisor == 0.0
        safe = tl.where(zero, 1.0, divisor)
        fixed = tl.where(zero, fixed_gain, fixed_gain / safe)
        multiplier = fixed
        if tl.load(lp + L_HAS_GAIN) != 0:
            multiplier = fixed * tl.load(gain_ptr + tl.load(ap + A_GAIN)).to(tl.float64)
        tl.store(scalars_ptr + S_SIGMA, mean)
        tl.store(scalars_ptr + S_MULTIPLIER, multiplier)
        tl.store(scalars_ptr + S_SLOPE_GAIN, fixed)
        for d in range(0, 2):
            share = tl.load(scalars_ptr + S_SLOPE_OUT + d).to(tl.float64)
            slope = tl.where(zero | below | (share == 0.0), 0.0, -multiplier / safe * share)
            tl.debug_barrier()
            tl.store(scalars_ptr + S_SLOPE_OUT + d, slope)


@triton.jit
def _block_of(tp, block_ptr):
    """The record of a tile's block; of any, where it has none."""
    return block_ptr + tl.maximum(tl.load(tp + T_BLOCK), 0) * BLOCK_WIDTH


@triton.jit
def _arrive(
    bp, counter, lp, ap, fp, vector_ptr, gain_ptr, saved_ptr, grad_gain_ptr, work_ptr, double_ptr, counter_ptr, k,
    FORWARD: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Count a tile; the last one of a block combines it, the last block finishes the iteration."""
    if _raise(counter_ptr, counter) == tl.load(bp + B_ARRIVALS) - 1:
        if PRODUCTS:
            for e in range(0, 2):
                if (tl.load(bp + B_MASK) >> e & 1) != 0:
                    _combine(bp, lp, ap, e, vector_ptr, work_ptr, double_ptr, FORWARD)
        if not FORWARD:
            if tl.load(bp + B_KIND) == DOT:
                dots_ptr = double_ptr + tl.load(lp + L_DOTS)
                product = _total(dots_ptr + 1, tl.load(lp + L_DOT_COUNT).to(tl.int32))
                tl.store(dots_ptr, product)
                slope = tl.load(saved_ptr + tl.load(lp + L_SCALARS) + S_SLOPE_GAIN).to(tl.float64)
                tl.store(grad_gain_ptr + k, product * slope)
        target = tl.load(bp + B_THEN_TARGET)
        if _raise(counter_ptr, tl.load(bp + B_THEN)) == target - 1:
            if FORWARD:
                _finish(bp, lp, ap, fp, gain_ptr, saved_ptr, double_ptr)
            _raise(counter_ptr, tl.load(bp + B_DONE))
            batch = tl.load(bp + B_BATCH)
            if batch >= 0:
                _raise(counter_ptr, batch)


@triton.jit
def _write_vectors(tp, vectors_ptr, address_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr):
    """New vectors into `saved`; after a zero or non-finite iteration the stored ones, or ones / sqrt(n)."""
    accum: tl.constexpr = saved_ptr.dtype.element_ty
    o = tl.arange(0, 512)
    first = tl.load(tp + T_ROW0)
    for i in range(first, first + tl.load(tp + T_ROWS)):
        vp = vectors_ptr + i * VECTOR_WIDTH
        ap = address_ptr + tl.load(vp + V_LAYER) * ADDRESS_WIDTH
        old_ptr = vector_ptr + tl.load(ap + tl.load(vp + V_ADDRESS))
        raw_ptr, to_ptr = work_ptr + tl.load(vp + V_RAW), saved_ptr + tl.load(vp + V_SAVED)
        divisor, high, low = tl.load(vp + V_DIVISOR), tl.load(vp + V_HIGH), tl.load(vp + V_LOW)
        begin, n, size = tl.load(vp + V_BEGIN), tl.load(vp + V_COUNT).to(tl.int32), tl.load(vp + V_SIZE).to(tl.int32)
        copy = tl.load(vp + V_COPY)
        scale, fallback = tl.full([], 0.0, dtype=tl.float64), tl.full([], 0.0, dtype=tl.float64)
        fresh, usable = copy == 0, copy == copy
        if copy == 0:
            scale = tl.load(double_ptr + tl.load(vp + V_SCALE))
            if tl.load(vp + V_START) == 0:
                fresh = tl.load(double_ptr + tl.load(vp + V_OK)) != 0.0
            if not fresh:
                squares = tl.zeros([512], dtype=tl.float64)
                for j in range(0, size, 512):
                    x = tl.load(old_ptr + j + o, mask=j + o < size, other=0.0).to(tl.float64)
                    squares += x * x
                norm = tl.sum(squares, axis=0)
                usable = _finite(norm) & (norm > 0.0)
                fallback = 1.0 / tl.sqrt(size.to(tl.float64))
        for j in range(0, n, 512):
            m = j + o < n
            e = begin + j + o
            at = e // divisor * high + e % divisor * low
            old = tl.load(old_ptr + at, mask=m, other=0.0).to(accum)
            new = tl.load(raw_ptr + e, mask=_only(m, fresh), other=0.0, cache_modifier=".cg").to(tl.float64) * scale
            tl.store(to_ptr + at, tl.where(fresh, new.to(accum), tl.where(usable, old, fallback.to(accum))), mask=m)


@triton.jit
def store_kernel(vectors_ptr, address_ptr, vector_ptr, saved_ptr, BLOCK: tl.constexpr):
    """The new vectors from `saved` to where they are stored; a program for each part of one."""
    vp = vectors_ptr + tl.program_id(0) * VECTOR_WIDTH
    ap = address_ptr + tl.load(vp + V_LAYER) * ADDRESS_WIDTH
    to_ptr, from_ptr = vector_ptr + tl.load(ap + tl.load(vp + V_ADDRESS)), saved_ptr + tl.load(vp + V_SAVED)
    divisor, high, low = tl.load(vp + V_DIVISOR), tl.load(vp + V_HIGH), tl.load(vp + V_LOW)
    begin, n = tl.load(vp + V_BEGIN), tl.load(vp + V_COUNT).to(tl.int32)
    for j in range(0, n, BLOCK):
        e = begin + j + tl.arange(0, BLOCK)
        at = e // divisor * high + e % divisor * low
        m = e < begin + n
        tl.store(to_ptr + at, tl.load(from_ptr + at, mask=m), mask=m)


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """By way of float32 where devices go it too, from float64 to bfloat16; the interpreter knows no other."""
    if x.dtype == tl.float64 and dtype == tl.bfloat16:
        return x.to(tl.float32).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def _scale(tp, w_ptr, out_ptr, multiplier, BLOCK: tl.constexpr):
    """W_bar = m W, flat. Both are done with: what L2 should keep is what comes next."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    accum: tl.constexpr = multiplier.dtype
    start, n = tl.load(tp + T_ROW0).to(tl.int64) * FLAT, tl.load(tp + T_ROWS)
    w_ptr += start
    out_ptr += start
    o = tl.arange(0, BLOCK)
    whole = n // 8 * 8
    for i in tl.range(0, whole, BLOCK, num_stages=1):
        m = i + o < whole
        w = tl.load(w_ptr + i + o, mask=m, other=0.0, eviction_policy="evict_first").to(accum)
        tl.store(out_ptr + i + o, _cast(w * multiplier, dtype), mask=m, eviction_policy="evict_first")
    if whole < n:
        o_t = whole + tl.arange(0, 8)
        w = tl.load(w_ptr + o_t, mask=o_t < n, other=0.0).to(accum)
        tl.store(out_ptr + o_t, _cast(w * multiplier, dtype), mask=o_t < n)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    tile_ptr, block_ptr, layer_ptr, vectors_ptr, float_ptr, address_ptr, weight_ptr, vector_ptr, gain_ptr, out_ptrs,
    saved_ptr, work_ptr, double_ptr, counter_ptr, n_tiles, n_programs, n_counters,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    WHOLE_STAGES: tl.constexpr, GENERAL: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Power iterations, sigmas, multipliers, new vectors and W_bar of all layers; see ForwardSchedule."""
    UNIT: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    ticket = _draw(counter_ptr)
    while ticket < n_tiles:
        tp = tile_ptr + ticket * TILE_WIDTH
        kind, k = tl.load(tp + T_KIND), tl.load(tp + T_LAYER)
        lp, fp = layer_ptr + k * LAYER_WIDTH, float_ptr + k * FLOAT_WIDTH
        ap = address_ptr + k * ADDRESS_WIDTH
        # What tables say is read before the wait, and so beside it.
        target, distance, bp = tl.load(tp + T_WAIT_TARGET), tl.load(ap + A_WEIGHT), _block_of(tp, block_ptr)
        counter = tl.load(bp + B_COUNTER)
        if target > 0:
            _await(counter_ptr, tl.load(tp + T_WAIT), target)
        if kind == VECTORS:
            _write_vectors(tp, vectors_ptr, address_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr)
        else:
            if kind == SCALE:
                multiplier = tl.load(saved_ptr + tl.load(lp + L_SCALARS) + S_MULTIPLIER, cache_modifier=".cg")
                out_ptr = _select(out_ptrs, k)
                if distance % UNIT == 0:
                    _scale(tp, weight_ptr + distance // UNIT * UNIT, out_ptr, multiplier, BLOCK)
                else:
                    _scale(tp, weight_ptr + distance, out_ptr, multiplier, BLOCK // 2)
            else:
                if kind == ROWS_WHOLE:
                    w_ptr = weight_ptr + distance // UNIT * UNIT
                    _whole(
                        tp, bp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr,
                        WHOLE, WHOLE_STAGES, MIXED,
                    )  # fmt: skip
                elif kind != COMBINE:
                    _product(
                        kind, tp, lp, ap, weight_ptr, distance, vector_ptr, saved_ptr, work_ptr, double_ptr,
                        ROWS, COLS, STAGES, GENERAL, MIXED,
                    )  # fmt: skip
                _arrive(
                    bp, counter, lp, ap, fp, vector_ptr, gain_ptr, saved_ptr, saved_ptr, work_ptr, double_ptr,
                    counter_ptr, k, True, True,
                )  # fmt: skip
        ticket = _draw(counter_ptr)
    _leave(counter_ptr, ticket, n_tiles, n_programs, n_counters)


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
    x = tl.load(saved_ptr + tl.load(rp + R_SAVED_SPREAD) + o_x, mask=_only(m_c, counts), other=0.0)
    other = tl.zeros_like(x)
    if THROUGH:
        start, residual = tl.load(scalars_ptr + S_START_OUT + d), tl.load(scalars_ptr + S_RESIDUAL_OUT + d)
        goes = _only(m_c, counts & (start != 0.0))
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
    m = _only(m, counts)
    y = tl.load(saved_ptr + tl.load(rp + R_SAVED_SLAB) + begin + i_r * stride + o_y, mask=m, other=0.0)
    other = tl.zeros_like(y)
    if THROUGH:
        start, residual = tl.load(scalars_ptr + S_START_OUT + d), tl.load(scalars_ptr + S_RESIDUAL_OUT + d)
        goes = _only(m, start != 0.0)
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
    row0, rows, col0, chunks, step, width, left, L, R = _in_units(place, UNIT)
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
            tl.store(d_ptr + o, _cast(total, d_ptr.dtype.element_ty), mask=m, eviction_policy="evict_first")


@triton.jit
def _update_unaligned(
    place, lp, g_ptr, d_ptr, saved_ptr, work_ptr, double_ptr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GENERAL: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """The same number by number, one direction after the other."""
    accum: tl.constexpr = saved_ptr.dtype.element_ty
    row0, rows, col0, chunks, step, width, left, L, R = _in_units(place, 1)
    L64 = L.to(tl.int64)
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLS)
    scalars_ptr = saved_ptr + tl.load(lp + L_SCALARS)
    product = tl.load(double_ptr + tl.load(lp + L_DOTS), cache_modifier=".cg")
    row_blocks = tl.cdiv(rows, ROWS)
    for block in range(0, chunks * row_blocks):
        i, i_r = block // row_blocks, block % row_blocks * ROWS
        m_c = (o_c < width) & (o_c < left - i * step)
        m = (i_r + o_r < rows)[:, None] & m_c[None, :]
        begin = col0 + i * step
        q, r = (begin // R).to(tl.int64), (begin % R).to(tl.int64)
        o = (row0 + i_r) * L64 + begin + (o_r[:, None] * L + o_c[None, :])
        total = tl.load(scalars_ptr + S_MULTIPLIER) * tl.load(g_ptr + o, mask=m, other=0.0).to(accum)
        for e in range(0, 1 + GENERAL):
            rp = lp + ROLES_AT + e * ROLE_WIDTH
            x, x0 = _rank_spread(lp, rp, q, r, R, o_c, m_c, product, scalars_ptr, saved_ptr, work_ptr, THROUGH)
            total = _plus_rank(
                total, lp, rp, i_r, row0, q, r, R, o_r, o_c, x, x0, m, scalars_ptr, saved_ptr, work_ptr,
                THROUGH, GENERAL,
            )  # fmt: skip
        tl.store(d_ptr + o, _cast(total, d_ptr.dtype.element_ty), mask=m)


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
    ticket = _draw(counter_ptr)
    while ticket < n_tiles:
        tp = tile_ptr + ticket * TILE_WIDTH
        kind, k = tl.load(tp + T_KIND), tl.load(tp + T_LAYER)
        lp = layer_ptr + k * LAYER_WIDTH
        ap = address_ptr + k * ADDRESS_WIDTH
        target, distance = tl.load(tp + T_WAIT_TARGET), tl.load(ap + A_WEIGHT)
        if target > 0:
            _await(counter_ptr, tl.load(tp + T_WAIT), target)
        if kind == UPDATE:
            g_ptr, d_ptr = _select(grad_ptrs, k), _select(out_ptrs, k)
            place = _place(tp, lp)
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
                g_ptr = _select(grad_ptrs, k)
                if distance % UNIT == 0:
                    product = _dot(tp, g_ptr, weight_ptr + distance // UNIT * UNIT, accum, BLOCK)
                else:
                    product = _dot(tp, g_ptr, weight_ptr + distance, accum, BLOCK // 2)
                tl.store(double_ptr + tl.load(lp + L_DOTS) + 1 + tl.load(tp + T_SLOT0), product)
            elif THROUGH:
                _product(
                    kind, tp, lp, ap, weight_ptr, distance, saved_ptr, saved_ptr, work_ptr, double_ptr,
                    ROWS, COLS, STAGES, GENERAL, False,
                )  # fmt: skip
            bp = _block_of(tp, block_ptr)
            _arrive(
                bp, tl.load(bp + B_COUNTER), lp, ap, double_ptr, saved_ptr, saved_ptr, saved_ptr, grad_gain_ptr,
                work_ptr, double_ptr, counter_ptr, k, False, THROUGH,
            )  # fmt: skip
        ticket = _draw(counter_ptr)
    _leave(counter_ptr, ticket, n_tiles, n_programs, n_counters)
