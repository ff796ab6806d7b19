// What the threads of a program do together, and how programs wait for each other.
//
// Data, then a barrier of the program, then one releasing atomic; who reads acquires first, and a barrier follows. A tile
// waits only on counters that smaller tickets raise, and a program takes its tickets in increasing order, so nothing
// depends on how many programs run at once.
#pragma once

#include <cuda/device.cuh>

#include "records.h"

namespace bssn {
namespace cuda {

BSSN_DEVICE int lane() { return thread() & 31; }
BSSN_DEVICE int warp() { return thread() >> 5; }

// The same bits in every lane: a butterfly adds in pairs, and a + b is b + a.
template <class A>
BSSN_DEVICE A warp_sum(A x) {
  BSSN_UNROLL
  for (int mask = 16; mask > 0; mask >>= 1) x += shuffle_xor(x, mask);
  return x;
}

// Sum over all threads, for all of them; `scratch` holds a number per warp.
BSSN_DEVICE double block_sum(double x, double* scratch) {
  x = warp_sum(x);
  barrier();  // whoever still reads the last sum
  if (lane() == 0) scratch[warp()] = x;
  barrier();
  double sum = 0;
  BSSN_UNROLL
  for (int i = 0; i < kWarps; ++i) sum += scratch[i];
  return sum;
}

// Sum of n numbers that this launch wrote, in a fixed order.
BSSN_DEVICE double block_total(const double* p, int n, double* scratch) {
  double sum = 0;
  for (int i = thread(); i < n; i += kThreads) sum += load_fresh(p + i);
  return block_sum(sum, scratch);
}

// Publish what this program wrote, and count it; the count before, for all threads.
BSSN_DEVICE int raise(int* counters, int i, int* shared) {
  barrier();
  if (thread() == 0) *shared = add_acquire_release(counters + i * kCounterStride, 1);
  barrier();
  return *shared;
}

BSSN_DEVICE void await(const int* counters, int i, int target) {
  if (target <= 0) return;
  if (thread() == 0) {
    const int* counter = counters + i * kCounterStride;
    while (load_relaxed(counter) < target) pause();
    load_acquire(counter);  // counters only grow: it reads no less, and what was published before is there after it
  }
  barrier();
}

// Tickets, and the tile that the current one stands for. A program may hold the next ticket while it works, as long as
// it finishes the tile of this one before it waits for anything that the next one needs.
struct Tickets {
  Tile tile;
  int ticket;
};

template <class Params>
BSSN_DEVICE int draw(const Params& launch) {
  return add_relaxed(launch.counters, 1);
}

// Make `ticket` (known to thread 0) the current one.
template <class Params>
BSSN_DEVICE void take(const Params& launch, int ticket, Tickets& tickets) {
  barrier();  // whoever still reads the last tile
  if (thread() == 0) {
    tickets.ticket = ticket;
    if (ticket < launch.n_tiles) tickets.tile = launch.tiles[ticket];
  }
  barrier();
}

// The last program to leave clears the counters for the next launch: by then nobody draws or waits any more. The count
// of those who left stands beside the ticket.
template <class Params>
BSSN_DEVICE void leave(const Params& launch, Tickets& tickets) {
  barrier();
  if (thread() == 0) tickets.ticket = add_acquire_release(launch.counters + 1, 1);
  barrier();
  if (tickets.ticket == launch.n_programs - 1)
    for (int i = thread(); i < launch.n_counters * kCounterStride; i += kThreads) launch.counters[i] = 0;
}

// Every ticket of a launch, with `work` for the tile of each. With many tiles the next ticket is drawn when a tile
// begins, which hides the way to memory and back; with few it would keep tiles from programs that have none.
template <class Params, class Work>
BSSN_DEVICE void every_ticket(const Params& launch, Tickets& tickets, Work work) {
  int next = thread() == 0 ? draw(launch) : 0;
  for (take(launch, next, tickets); tickets.ticket < launch.n_tiles; take(launch, next, tickets)) {
    if (launch.ahead && thread() == 0) next = draw(launch);
    work(tickets.tile);
    if (!launch.ahead && thread() == 0) next = draw(launch);
  }
  leave(launch, tickets);
}

}  // namespace cuda
}  // namespace bssn
