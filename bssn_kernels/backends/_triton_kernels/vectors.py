"""The vectors that a product reads, and the new ones that a forward writes and stores."""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_kernels.backends._tables import ADDRESSES, ROLE_FIELDS, TILE_FIELDS, VECTOR_FIELDS
from bssn_kernels.backends._triton_kernels.device import finite, only
from bssn_kernels.backends._triton_kernels.records import (
    ADDRESS_WIDTH,
    RAW,
    RESULT_WIDTH,
    SAVED,
    SCALED,
    STORED,
    VECTOR_WIDTH,
    at,
)

T_ROW0, T_ROWS = at(TILE_FIELDS, "row0", "rows")
R_STORED_XQ, R_STORED_XR, R_STORED_YP = at(ROLE_FIELDS, "stored_xq", "stored_xr", "stored_yp")
R_STORED_YQ, R_STORED_YR, R_RAW_XQ, R_RAW_XR = at(ROLE_FIELDS, "stored_yq", "stored_yr", "raw_xq", "raw_xr")
R_RAW_YP, R_RAW_YQ, R_RAW_YR, R_SLAB, R_SLAB_ODD = at(ROLE_FIELDS, "raw_yp", "raw_yq", "raw_yr", "slab", "slab_odd")
R_SPREAD, R_SPREAD_ODD, R_RESULTS, R_SAVED_SPREAD = at(ROLE_FIELDS, "spread", "spread_odd", "results", "saved_spread")
R_SAVED_SLAB = at(ROLE_FIELDS, "saved_slab")
V_LAYER, V_ADDRESS, V_RAW, V_SCALE, V_OK, V_COPY = at(VECTOR_FIELDS, "layer", "address", "raw", "scale", "ok", "copy")
V_START, V_SAVED, V_DIVISOR, V_HIGH, V_LOW = at(VECTOR_FIELDS, "start", "saved", "divisor", "high", "low")
V_BEGIN, V_COUNT, V_SIZE = at(VECTOR_FIELDS, "begin", "count", "size")
A_SPREAD, A_SLAB = at(ADDRESSES, "spread0", "slab0")


@triton.jit
def load_vector(ptr, stored_ptr, o, mask, stored, MIXED: tl.constexpr):
    """Numbers of a vector in accumulation dtype; MIXED: stored vectors have another dtype."""
    if MIXED:
        x = tl.load(stored_ptr + o, mask=only(mask, stored), other=0.0).to(ptr.dtype.element_ty)
        return x + tl.load(ptr + o, mask=only(mask, stored == 0), other=0.0)
    else:
        return tl.load(ptr + o, mask=mask, other=0.0)


@triton.jit
def scale_of(rp, source, double_ptr, accum: tl.constexpr):
    """What the raw vector of an earlier iteration is multiplied with; 1 for other sources."""
    scale = tl.full([], 1.0, dtype=tl.float64)
    if (source >= SCALED) & (source < SAVED):
        at = tl.load(rp + R_RESULTS) + RESULT_WIDTH * (source - SCALED)
        scale = tl.load(double_ptr + at + 1)
    return scale.to(accum)


@triton.jit
def source_of(rp, ap, e, source, inner, p0, q0, r0, vector_ptr, saved_ptr, work_ptr, MIXED: tl.constexpr):
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
def _part_of(vp):
    """Part of a vector: its first number and how many; where number e stands: e // divisor * high + e % divisor * low.
    No vector has 2^31 numbers, and divisions of 64 bits are calls.
    """
    begin, n, divisor = tl.load(vp + V_BEGIN), tl.load(vp + V_COUNT), tl.load(vp + V_DIVISOR)
    high, low = tl.load(vp + V_HIGH).to(tl.int32), tl.load(vp + V_LOW).to(tl.int32)
    return begin.to(tl.int32), n.to(tl.int32), divisor.to(tl.int32), high, low


@triton.jit
def write_vectors(tp, vectors_ptr, address_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr):
    """New vectors into `saved`; after a zero or non-finite iteration the stored ones, or ones / sqrt(n)."""
    accum: tl.constexpr = saved_ptr.dtype.element_ty
    o = tl.arange(0, 512)
    first = tl.load(tp + T_ROW0)
    for i in range(first, first + tl.load(tp + T_ROWS)):
        vp = vectors_ptr + i * VECTOR_WIDTH
        ap = address_ptr + tl.load(vp + V_LAYER) * ADDRESS_WIDTH
        old_ptr = vector_ptr + tl.load(ap + tl.load(vp + V_ADDRESS))
        raw_ptr, to_ptr = work_ptr + tl.load(vp + V_RAW), saved_ptr + tl.load(vp + V_SAVED)
        begin, n, divisor, high, low = _part_of(vp)
        size = tl.load(vp + V_SIZE).to(tl.int32)
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
                usable = finite(norm) & (norm > 0.0)
                fallback = 1.0 / tl.sqrt(size.to(tl.float64))
        for j in range(0, n, 512):
            m = j + o < n
            e = begin + j + o
            at = e // divisor * high + e % divisor * low
            old = tl.load(old_ptr + at, mask=m, other=0.0).to(accum)
            new = tl.load(raw_ptr + e, mask=only(m, fresh), other=0.0, cache_modifier=".cg").to(tl.float64) * scale
            tl.store(to_ptr + at, tl.where(fresh, new.to(accum), tl.where(usable, old, fallback.to(accum))), mask=m)


@triton.jit
def store_kernel(vectors_ptr, address_ptr, vector_ptr, saved_ptr, BLOCK: tl.constexpr):
    """The new vectors from `saved` to where they are stored; a program for each part of one."""
    vp = vectors_ptr + tl.program_id(0) * VECTOR_WIDTH
    ap = address_ptr + tl.load(vp + V_LAYER) * ADDRESS_WIDTH
    to_ptr, from_ptr = vector_ptr + tl.load(ap + tl.load(vp + V_ADDRESS)), saved_ptr + tl.load(vp + V_SAVED)
    begin, n, divisor, high, low = _part_of(vp)
    for j in range(0, n, BLOCK):
        e = begin + j + tl.arange(0, BLOCK)
        at = e // divisor * high + e % divisor * low
        m = e < begin + n
        tl.store(to_ptr + at, tl.load(from_ptr + at, mask=m), mask=m)
