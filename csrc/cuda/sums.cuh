// Sums over tiles, by whoever comes last, and always in the same order.
#pragma once

#include "vectors.cuh"

namespace bssn {
namespace cuda {

// out[e] = the sum of its terms in a fixed order, in float64; returns this thread's share of the sum of their squares.
// A warp has 32 numbers at a time, the warps share the terms.
template <class A>
BSSN_DEVICE double add_up(const A* parts, A* out, int n, int entry_stride, int terms, int fold, int fold_stride,
                          int64_t slot_stride, A* scratch) {
  double squares = 0;
  double* const sums = reinterpret_cast<double*>(scratch);
  for (int first = 0; first < n; first += 32) {
    const int e = first + lane();
    double sum = 0;
    if (e < n)
      for (int t = warp(); t < terms; t += kWarps) {
        const int slot = t / fold, f = t - slot * fold;
        sum += double(load_fresh(parts + slot * slot_stride + f * fold_stride + int64_t(e) * entry_stride));
      }
    barrier();
    sums[thread()] = sum;
    barrier();
    if (warp() == 0 && e < n) {
      sum = 0;
      BSSN_UNROLL
      for (int i = 0; i < kWarps; ++i) sum += sums[i * 32 + lane()];
      const A x = A(sum);
      out[e] = x;
      squares += double(x) * double(x);
    }
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
  int64_t begin, slot_stride, part, raw, shares;
  int count, entry_stride = 1, terms, fold = 1, fold_stride = 0, segments = 1;
  if (outer) {  // numbers of the spread, one term per slot and column that it folds
    begin = e ? block.start1 : block.start0;
    count = e ? block.count1 : block.count0;
    if (e == 0) segments = block.segments;
    entry_stride = int(role.entry_stride), fold = int(role.fold), fold_stride = int(role.fold_stride);
    terms = int(role.outer_slots) * fold;
    slot_stride = layer.l;
    part = role.outer_partial, raw = odd ? role.spread_odd : role.spread, shares = role.outer_shares;
  } else {  // or of the slab, one term per slot
    begin = block.start0 * role.raw_yp;
    count = int(block.count0 * role.raw_yp);
    terms = int(role.inner_slots);
    slot_stride = role.slab_size;
    part = role.inner_partial, raw = odd ? role.slab_odd : role.slab, shares = role.inner_shares;
  }
  double share = 0;
  for (int i = 0; i < segments; ++i) {
    const int64_t o = begin + i * layer.r;
    share += add_up(work + part + (begin * entry_stride + i * layer.r), work + raw + o, count, entry_stride, terms, fold,
                    fold_stride, slot_stride, shared.scratch);
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

// Count a tile. The last one of a block combines it, the last block does `finish`, and then who waits may go on.
template <class T, bool kBoth, class Special, class Finish>
BSSN_DEVICE void arrive(const LaunchParams& launch, const Tile& tile, bool forward, Shared<T, kBoth>& shared,
                        Special special, Finish finish) {
  const Block& block = launch.blocks[tile.block];
  const Layer& layer = launch.layers[tile.layer];
  if (raise(launch.counters, block.counter, &shared.count) != block.arrivals - 1) return;
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
