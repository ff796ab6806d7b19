// Sums over tiles, by whoever comes last, and always in the same order.
#pragma once

#include "vectors.cuh"

namespace bssn {
namespace cuda {

// Where the terms of a sum stand: for number e, slot and f at e * entry + slot * slot_stride + f * fold_stride.
struct Terms {
  int slots, fold, entry, fold_stride;
  int64_t slot_stride;
};

// out[e] = the sum of its terms in a fixed order, in float64; returns this thread's share of the sum of their squares.
// This is what others wait for, so many loads are on their way at once: of two numbers per thread and eight terms of each,
// or, where there are few numbers, of several parts of the terms.
template <class A>
BSSN_DEVICE double add_up(const A* parts, A* out, int n, const Terms& terms, A* scratch) {
  constexpr int kNumbers = 2, kTerms = 8;
  const int count = terms.slots * terms.fold;
  double squares = 0;
  if (n > kThreads / 2) {
    for (int first = thread(); first < n; first += kNumbers * kThreads) {
      double sums[kNumbers] = {};
      const A* p = parts + int64_t(first) * terms.entry;
      const int64_t next_slot = terms.slot_stride - int64_t(terms.fold - 1) * terms.fold_stride;
      const int64_t second = int64_t(kThreads) * terms.entry;
      const bool two = first + kThreads < n;
      int f = 0;
      for (int t = 0; t < count; t += kTerms) {
        A x[kTerms][kNumbers];
        BSSN_UNROLL
        for (int i = 0; i < kTerms; ++i) {
          const bool there = t + i < count;
          x[i][0] = there ? load_fresh(p) : A(0);
          x[i][1] = there && two ? load_fresh(p + second) : A(0);
          const bool last = ++f == terms.fold;
          p += last ? next_slot : terms.fold_stride;
          f = last ? 0 : f;
        }
        BSSN_UNROLL
        for (int i = 0; i < kTerms; ++i)
          BSSN_UNROLL
          for (int j = 0; j < kNumbers; ++j) sums[j] += double(x[i][j]);
      }
      BSSN_UNROLL
      for (int j = 0; j < kNumbers; ++j)
        if (first + j * kThreads < n) {
          const A x = A(sums[j]);
          out[first + j * kThreads] = x;
          squares += double(x) * double(x);
        }
    }
    return squares;
  }
  int width = 1;  // a power of two
  while (width < n) width *= 2;
  const int shares = kThreads / width, e = thread() & (width - 1), share = thread() / width;
  double sum = 0;
  if (e < n) {
    BSSN_UNROLL_BY_4
    for (int t = share; t < count; t += shares) {
      const int slot = t / terms.fold, f = t - slot * terms.fold;
      sum += double(load_fresh(parts + slot * terms.slot_stride + f * terms.fold_stride + int64_t(e) * terms.entry));
    }
  }
  double* const sums = reinterpret_cast<double*>(scratch);
  barrier();
  sums[thread()] = sum;
  barrier();
  if (thread() < n) {
    sum = 0;
    for (int i = 0; i < shares; ++i) sum += sums[i * width + thread()];
    const A x = A(sum);
    out[thread()] = x;
    squares = double(x) * double(x);
  }
  return squares;
}

// Add up what the tiles of a block left for role e; the block's share of the norm is kept.
template <class T, bool kBoth>
BSSN_DEVICE_CALL void combine(const LaunchParams& launch, const Block& block, const Layer& layer, int e, bool forward,
                         Shared<T, kBoth>& shared) {
  using A = Accum<T>;
  const Role& role = layer.roles[e];
  A* const work = static_cast<A*>(launch.work);
  const bool odd = block.parity != 0, outer = block.kind == kOuter;
  int64_t begin, part, raw, shares;
  int count, segments = 1;
  Terms terms;
  if (outer) {  // numbers of the spread, one term per slot and column that it folds
    begin = e ? block.start1 : block.start0;
    count = e ? block.count1 : block.count0;
    if (e == 0) segments = block.segments;
    terms = {int(role.outer_slots), int(role.fold), int(role.entry_stride), int(role.fold_stride), layer.l};
    part = role.outer_partial, raw = odd ? role.spread_odd : role.spread, shares = role.outer_shares;
  } else {  // or of the slab, one term per slot
    begin = block.start0 * role.raw_yp;
    count = int(block.count0 * role.raw_yp);
    terms = {int(role.inner_slots), 1, 1, 0, role.slab_size};
    part = role.inner_partial, raw = odd ? role.slab_odd : role.slab, shares = role.inner_shares;
  }
  double share = 0;
  for (int i = 0; i < segments; ++i) {
    const int64_t o = begin + i * layer.r;
    share += add_up(work + part + (begin * terms.entry + i * layer.r), work + raw + o, count, terms, shared.scratch);
  }
  if (!forward) return;
  if (block.dot) {  // without an iteration: the dot product with the stored slab
    barrier();
    const Address& address = launch.addresses[block.layer];
    const void* slab = reinterpret_cast<const void*>(e ? address.slab1 : address.slab0);
    const int64_t classes = role.raw_yp, stride_c = role.stored_yq + role.stored_yr;  // one of them is 0
    share = 0;
    for (int i = thread(); i < count; i += kThreads) {
      const int64_t k = begin + i, at = k / classes * role.stored_yp + k % classes * stride_c;
      share += double(load_fresh(work + raw + k)) * double(number_at<A>(slab, launch.vector_dtype, at));
    }
  }
  share = block_sum(share, shared.sums);
  if (thread() == 0) launch.doubles[shares + block.share] = share;
}

// Where a tile is counted, read before its work so that nobody waits for it afterwards.
struct Arrival {
  int counter, arrivals;
  BSSN_DEVICE Arrival(const LaunchParams& launch, const Tile& tile)
      : counter(launch.blocks[tile.block].counter), arrivals(launch.blocks[tile.block].arrivals) {}
};

// Count a tile. The last one of a block combines it, the last block does `finish`, and then who waits may go on.
template <class T, bool kBoth, class Special, class Finish>
BSSN_DEVICE void arrive(const LaunchParams& launch, const Tile& tile, const Arrival& arrival, bool forward,
                        Shared<T, kBoth>& shared, Special special, Finish finish) {
  if (raise(launch.counters, arrival.counter, &shared.count) != arrival.arrivals - 1) return;
  const Block& block = launch.blocks[tile.block];
  const Layer& layer = launch.layers[tile.layer];
  for (int e = 0; e < (kBoth ? 2 : 1); ++e)
    if (block.mask >> e & 1) combine<T, kBoth>(launch, block, layer, e, forward, shared);
  special(block, layer);
  if (raise(launch.counters, block.then, &shared.count) != block.then_target - 1) return;
  finish(block, layer);
  raise(launch.counters, block.done, &shared.count);
  if (block.batch >= 0) raise(launch.counters, block.batch, &shared.count);
}

}  // namespace cuda
}  // namespace bssn
