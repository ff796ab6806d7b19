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

from bssn_kernels.backends._triton_kernels.backward import backward_kernel
from bssn_kernels.backends._triton_kernels.forward import forward_kernel
from bssn_kernels.backends._triton_kernels.vectors import store_kernel

__all__ = ["backward_kernel", "forward_kernel", "store_kernel"]
