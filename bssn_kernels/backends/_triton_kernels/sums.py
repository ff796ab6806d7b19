"""Sums over tiles, by whoever comes last, and always in the same order; what follows from them."""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_kernels.backends._tables import ADDRESSES, BLOCK_FIELDS, LAYER_FIELDS, ROLE_FIELDS, TILE_FIELDS
from bssn_kernels.backends._triton_kernels.device import finite, publish
from bssn_kernels.backends._triton_kernels.records import (
    BLOCK_WIDTH,
    DOT,
    N_SCALARS,
    OUTER,
    RESULT_WIDTH,
    ROLE_WIDTH,
    ROLES_AT,
    at,
)
from bssn_kernels.plan import SCALARS

T_BLOCK = at(TILE_FIELDS, "block")
B_KIND, B_ARRIVALS, B_THEN, B_THEN_TARGET = at(BLOCK_FIELDS, "kind", "arrivals", "then", "then_target")
B_DONE, B_BATCH, B_MASK, B_PARITY, B_START0 = at(BLOCK_FIELDS, "done", "batch", "mask", "parity", "start0")
B_COUNT0, B_SEGMENTS, B_START1, B_COUNT1 = at(BLOCK_FIELDS, "count0", "segments", "start1", "count1")
B_SHARE, B_FINAL, B_DOT = at(BLOCK_FIELDS, "share", "final", "dot")
L_L, L_R, L_SCALARS, L_HAS_GAIN, L_NORM_ADDS = at(LAYER_FIELDS, "l", "r", "scalars", "has_gain", "norm_adds")
L_THROUGH, L_ITERATED, L_DOTS, L_DOT_COUNT = at(LAYER_FIELDS, "through", "iterated", "dots", "dot_count")
R_EXISTS, R_DIRECTION, R_INNER_FIRST, R_STORED_YP = at(ROLE_FIELDS, "exists", "direction", "inner_first", "stored_yp")
R_STORED_YQ, R_STORED_YR, R_RAW_YP, R_FOLD = at(ROLE_FIELDS, "stored_yq", "stored_yr", "raw_yp", "fold")
R_FOLD_STRIDE, R_ENTRY_STRIDE, R_SLAB_SIZE = at(ROLE_FIELDS, "fold_stride", "entry_stride", "slab_size")
R_INNER_SLOTS, R_INNER_PARTIAL, R_OUTER_SLOTS = at(ROLE_FIELDS, "inner_slots", "inner_partial", "outer_slots")
R_OUTER_PARTIAL, R_SLAB, R_SLAB_ODD, R_SPREAD = at(ROLE_FIELDS, "outer_partial", "slab", "slab_odd", "spread")
R_SPREAD_ODD, R_INNER_SHARES, R_INNER_SHARE_COUNT = at(ROLE_FIELDS, "spread_odd", "inner_shares", "inner_share_count")
R_OUTER_SHARES, R_OUTER_SHARE_COUNT, R_RESULTS = at(ROLE_FIELDS, "outer_shares", "outer_share_count", "results")
A_SLAB, A_GAIN = at(ADDRESSES, "slab0", "gain")
S_SIGMA, S_SIGMA_OUT, S_MULTIPLIER, S_SLOPE_OUT = at(SCALARS, "sigma", "sigma_out", "multiplier", "slope_out")
S_SLOPE_GAIN, S_START_OUT, S_RESIDUAL_OUT = at(SCALARS, "slope_gain", "start_out", "residual_out")


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
                tl.store(at + 2, tl.where(finite(sigma) & (sigma != 0.0), 1.0, 0.0))
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
def block_of(tp, block_ptr):
    """The record of a tile's block; of any, where it has none."""
    return block_ptr + tl.maximum(tl.load(tp + T_BLOCK), 0) * BLOCK_WIDTH


@triton.jit
def arrive(
    bp, counter, lp, ap, fp, vector_ptr, gain_ptr, saved_ptr, grad_gain_ptr, work_ptr, double_ptr, counter_ptr, k,
    FORWARD: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Count a tile; the last one of a block combines it, the last block finishes the iteration."""
    if publish(counter_ptr, counter) == tl.load(bp + B_ARRIVALS) - 1:
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
        if publish(counter_ptr, tl.load(bp + B_THEN)) == target - 1:
            if FORWARD:
                _finish(bp, lp, ap, fp, gain_ptr, saved_ptr, double_ptr)
            # Assigned, since Triton 3.3 takes a call alone for something that may return, which no loop may.
            _ = publish(counter_ptr, tl.load(bp + B_DONE))
            batch = tl.load(bp + B_BATCH)
            if batch >= 0:
                _ = publish(counter_ptr, batch)
