"""The forward kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_kernels.backends._tables import ADDRESSES, BLOCK_FIELDS, LAYER_FIELDS, TILE_FIELDS
from bssn_kernels.backends._triton_kernels.device import await_counter, cast, draw, leave, select
from bssn_kernels.backends._triton_kernels.products import product_tile
from bssn_kernels.backends._triton_kernels.records import (
    ADDRESS_WIDTH,
    COMBINE,
    FLAT,
    FLOAT_WIDTH,
    LAYER_WIDTH,
    ROWS_WHOLE,
    SCALE,
    SIZES,
    TILE_WIDTH,
    VECTORS,
    at,
)
from bssn_kernels.backends._triton_kernels.sums import arrive, block_of
from bssn_kernels.backends._triton_kernels.vectors import write_vectors
from bssn_kernels.backends._triton_kernels.whole_rows import whole_tile
from bssn_kernels.plan import SCALARS

T_KIND, T_LAYER, T_ROW0, T_ROWS, T_WAIT = at(TILE_FIELDS, "kind", "layer", "row0", "rows", "wait")
T_WAIT_TARGET = at(TILE_FIELDS, "wait_target")
B_COUNTER = at(BLOCK_FIELDS, "counter")
L_SCALARS = at(LAYER_FIELDS, "scalars")
A_WEIGHT = at(ADDRESSES, "weight")
S_MULTIPLIER = at(SCALARS, "multiplier")


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
        tl.store(out_ptr + i + o, cast(w * multiplier, dtype), mask=m, eviction_policy="evict_first")
    if whole < n:
        o_t = whole + tl.arange(0, 8)
        w = tl.load(w_ptr + o_t, mask=o_t < n, other=0.0).to(accum)
        tl.store(out_ptr + o_t, cast(w * multiplier, dtype), mask=o_t < n)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    tile_ptr, block_ptr, layer_ptr, vectors_ptr, float_ptr, address_ptr, weight_ptr, vector_ptr, gain_ptr, out_ptrs,
    saved_ptr, work_ptr, double_ptr, counter_ptr, n_tiles, n_programs, n_counters,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    WHOLE_STAGES: tl.constexpr, GENERAL: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Power iterations, sigmas, multipliers, new vectors and W_bar of all layers; see ForwardSchedule."""
    UNIT: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    ticket = draw(counter_ptr)
    while ticket < n_tiles:
        tp = tile_ptr + ticket * TILE_WIDTH
        kind, k = tl.load(tp + T_KIND), tl.load(tp + T_LAYER)
        lp, fp = layer_ptr + k * LAYER_WIDTH, float_ptr + k * FLOAT_WIDTH
        ap = address_ptr + k * ADDRESS_WIDTH
        # What tables say is read before the wait, and so beside it.
        target, distance, bp = tl.load(tp + T_WAIT_TARGET), tl.load(ap + A_WEIGHT), block_of(tp, block_ptr)
        counter = tl.load(bp + B_COUNTER)
        if target > 0:
            await_counter(counter_ptr, tl.load(tp + T_WAIT), target)
        if kind == VECTORS:
            write_vectors(tp, vectors_ptr, address_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr)
        else:
            if kind == SCALE:
                multiplier = tl.load(saved_ptr + tl.load(lp + L_SCALARS) + S_MULTIPLIER, cache_modifier=".cg")
                out_ptr = select(out_ptrs, k)
                if distance % UNIT == 0:
                    _scale(tp, weight_ptr + distance // UNIT * UNIT, out_ptr, multiplier, BLOCK)
                else:
                    _scale(tp, weight_ptr + distance, out_ptr, multiplier, BLOCK // 2)
            else:
                if kind == ROWS_WHOLE:
                    w_ptr = weight_ptr + distance // UNIT * UNIT
                    whole_tile(
                        tp, bp, lp, ap, w_ptr, vector_ptr, saved_ptr, work_ptr, double_ptr,
                        WHOLE, WHOLE_STAGES, MIXED,
                    )  # fmt: skip
                elif kind != COMBINE:
                    product_tile(
                        kind, tp, lp, ap, weight_ptr, distance, vector_ptr, saved_ptr, work_ptr, double_ptr,
                        ROWS, COLS, STAGES, GENERAL, MIXED,
                    )  # fmt: skip
                arrive(
                    bp, counter, lp, ap, fp, vector_ptr, gain_ptr, saved_ptr, saved_ptr, work_ptr, double_ptr,
                    counter_ptr, k, True, True,
                )  # fmt: skip
        ticket = draw(counter_ptr)
    leave(counter_ptr, ticket, n_tiles, n_programs, n_counters)
