"""What the kernels ask of a device: tickets, counters, pointers by number, masks."""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_kernels.backends._triton_kernels.records import COUNTER


@triton.jit
def draw(counter_ptr):
    """The next ticket."""
    return tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def publish(counter_ptr, i):
    """Publish what this program wrote, and count it; returns the count before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr + i * COUNTER, 1, sem="acq_rel", scope="gpu")


@triton.jit
def await_counter(counter_ptr, i, target):
    """Mostly it is there already. Else polls with reads: an acquire each time would hold up those who count, and empty
    L1 for the programs beside."""
    ptr = counter_ptr + i * COUNTER
    while tl.atomic_add(ptr, 0, sem="acquire", scope="gpu") < target:
        while tl.load(ptr, volatile=True) < target:
            pass


@triton.jit
def leave(counter_ptr, ticket, n_tiles, n_programs, n_counters):
    """Who draws the last ticket clears the counters for the next launch."""
    if ticket == n_tiles + n_programs - 1:
        o = tl.arange(0, 1024)
        for i in range(0, n_counters, 1024):
            tl.store(counter_ptr + (i + o) * COUNTER, tl.zeros([1024], dtype=tl.int32), mask=i + o < n_counters)


@triton.jit
def finite(x):
    """Not x - x == 0, which a compiler that fuses makes of a product what was rounded off, and so false."""
    return tl.abs(x) < float("inf")


@triton.jit
def select(ptrs, i):
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
def only(mask, condition):
    """The mask where a scalar condition holds. (The interpreter takes no mask that was `and`ed with a scalar.)"""
    return tl.where(condition, mask, mask != mask)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """By way of float32 where devices go it too, from float64 to bfloat16; the interpreter knows no other."""
    if x.dtype == tl.float64:
        if dtype == tl.bfloat16:  # apart: types have no `and` in Triton 3.3
            return x.to(tl.float32).to(dtype)
        else:
            return x.to(dtype)
    else:
        return x.to(dtype)
