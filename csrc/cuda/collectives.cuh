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

// Tickets, in the program that drew them. One that has to wait is held, and another one is drawn and worked on meanwhile.
// A program waits for nothing but the smallest ticket that it has: the smallest one of all that are not done waits only for
// what is done, so its program goes on, however many run at once.
struct Tickets {
  alignas(16) Tile tiles[3];  // of the tile at work, of the one that is held, and of the next one
  int ticket;
  bool over;  // whether a wait is
};

// Which of the three tiles is which, in one register, as every thread keeps it.
class Places {
 public:
  static constexpr int kNone = 3, kDrawn = 64, kFetched = 128;  // no place; flags of the next ticket
  BSSN_DEVICE int next() const { return bits_ & 3; }
  BSSN_DEVICE int held() const { return bits_ >> 2 & 3; }
  BSSN_DEVICE int busy() const { return bits_ >> 4 & 3; }
  BSSN_DEVICE bool is(int flag) const { return (bits_ & flag) != 0; }
  BSSN_DEVICE void set(int flag) { bits_ |= flag; }
  BSSN_DEVICE void hold(int place) { bits_ = (bits_ & ~12) | place << 2; }
  BSSN_DEVICE void work_at(int place) { bits_ = (bits_ & ~48) | place << 4; }
  // One that is neither held nor at work.
  BSSN_DEVICE void choose_next() {
    int place = 0;
    while (place == held() || place == busy()) ++place;
    bits_ = (bits_ & ~3) | place;
  }
  BSSN_DEVICE int take_next() {
    bits_ &= ~(kDrawn | kFetched);
    return next();
  }
  BSSN_DEVICE int take_held() {
    const int place = held();
    hold(kNone);
    return place;
  }

 private:
  int bits_ = kNone << 2 | kNone << 4;
};

// By one thread; what was published before the count is there after it.
BSSN_DEVICE bool is_over(const int* counters, const Tile& tile) {
  return tile.wait_target <= 0 || load_acquire(counters + tile.wait * kCounterStride) >= tile.wait_target;
}

BSSN_DEVICE void await(const int* counters, const Tile& tile) {
  if (thread() == 0) {
    while (load_relaxed(counters + tile.wait * kCounterStride) < tile.wait_target) pause();
    is_over(counters, tile);  // counters only grow: it still is
  }
  barrier();
}

template <class Params>
BSSN_DEVICE int draw(const Params& launch) {
  return add_relaxed(launch.counters, 1);
}

// The tile of a ticket on its way; by the thread that drew it.
template <class Params>
BSSN_DEVICE void fetch_tile(const Params& launch, int ticket, Tile* to) {
  if (ticket >= launch.n_tiles) return;
  constexpr int kPieces = int(sizeof(Tile)) / 16;
  const Bits16* from = reinterpret_cast<const Bits16*>(launch.tiles + ticket);
  BSSN_UNROLL
  for (int i = 0; i < kPieces; ++i) {
    if (kAsync)
      copy_async(reinterpret_cast<Bits16*>(to) + i, from + i, true);
    else
      reinterpret_cast<Bits16*>(to)[i] = from[i];
  }
  commit_copies();
}

// The last program to leave clears the counters for the next launch: by then nobody draws or waits any more. The count
// of those who left stands beside the ticket.
template <class Params>
BSSN_DEVICE void leave(const Params& launch, Tickets& tickets) {
  barrier();
  if (thread() == 0) tickets.ticket = add_acquire_release(launch.counters + 1, 1);
  barrier();
  if (tickets.ticket != launch.n_programs - 1) return;
  for (int i = thread(); i < launch.n_counters; i += kThreads) launch.counters[i * kCounterStride] = 0;
  if (thread() == 0) launch.counters[1] = 0;
}

// Every ticket of a launch, with `work` for the tile of each, whose wait is over. With many tiles the next ticket is drawn
// when a tile begins, and its tile fetched when `work` says that its own reads are over, which hides the ways to memory and
// back; with few it would keep tiles from programs that have none.
template <class Params, class Work>
BSSN_DEVICE void every_ticket(const Params& launch, Tickets& tickets, Work work) {
  int ticket = 0;  // the next one, known to the thread that draws
  Places places;
  auto draw_next = [&] {
    if (thread() == 0) ticket = draw(launch);
    places.set(Places::kDrawn);
  };
  auto fetch_next = [&] {
    if (!places.is(Places::kDrawn) || places.is(Places::kFetched)) return;
    places.choose_next();
    if (thread() == 0) fetch_tile(launch, ticket, tickets.tiles + places.next());
    places.set(Places::kFetched);
  };
  while (true) {
    int place = Places::kNone;
    if (places.held() != Places::kNone) {
      if (thread() == 0) tickets.over = is_over(launch.counters, tickets.tiles[places.held()]);
      barrier();
      if (tickets.over) place = places.take_held();
      barrier();
    }
    if (place == Places::kNone) {
      if (!places.is(Places::kDrawn)) draw_next();
      fetch_next();
      if (thread() == 0) {
        wait_copies<0>();
        tickets.ticket = ticket;
        tickets.over = ticket < launch.n_tiles && is_over(launch.counters, tickets.tiles[places.next()]);
      }
      barrier();
      const bool none = tickets.ticket >= launch.n_tiles, over = tickets.over;
      barrier();
      if (over) {
        place = places.take_next();
      } else if (places.held() != Places::kNone) {
        await(launch.counters, tickets.tiles[places.held()]);
        place = places.take_held();
      } else if (none) {
        break;
      } else {
        places.hold(places.take_next());
        continue;
      }
    }
    places.work_at(place);
    if (launch.ahead && !places.is(Places::kDrawn)) draw_next();
    work(tickets.tiles[place], fetch_next);
    places.work_at(Places::kNone);
    barrier();  // whoever still reads this tile
  }
  leave(launch, tickets);
}

}  // namespace cuda
}  // namespace bssn
