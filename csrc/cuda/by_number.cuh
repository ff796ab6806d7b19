// Products of layers whose rows are not at multiples of 16 bytes, few and small: number by number, one role after the other.
#pragma once

#include "partials.cuh"

namespace bssn {
namespace cuda {

template <class T, bool kBoth>
BSSN_DEVICE void inner_by_number(const LaunchParams& launch, const Tile& tile, const Role& role, int e,
                                 const Address& address, const Place& place, const T* w, Shared<T, kBoth>& shared) {
  using A = Accum<T>;
  const SourceVector<A> source(launch, role, address, e, tile.source, true);
  barrier();
  stage_spread<T>(source, place, true, shared.staged);
  barrier();
  A* const sums = shared.scratch + warp() * kCols<T>;
  for (int row = warp(); row < place.rows; row += kWarps) {
    A total = 0;
    warp_barrier();
    for (int b = lane(); b < place.width; b += 32) {
      A sum = 0;
      for (int chunk = 0; chunk < place.chunks; ++chunk)
        if (place.there(chunk, b) > 0)
          sum += A(widen(w[row * place.l + (chunk * place.step + b)])) * shared.staged[chunk * kCols<T> + b];
      sums[b] = sum;
      total += sum;
    }
    warp_barrier();
    A* const out = inner_partial<A>(launch, tile, role, e, place, row);
    total = warp_sum(total);
    if (role.modulus != 1)
      store_classes(sums, place.width, int(role.modulus), shared.parts[warp()], out);
    else if (lane() == 0)
      *out = total;
  }
}

template <class T, bool kBoth>
BSSN_DEVICE void outer_by_number(const LaunchParams& launch, const Tile& tile, const Role& role, int e,
                                 const Address& address, const Place& place, const T* w, Shared<T, kBoth>& shared) {
  using A = Accum<T>;
  constexpr int kColumns = kCols<T> / kThreads;  // of a chunk, for each thread
  const SourceVector<A> source(launch, role, address, e, tile.source, false);
  const SlabLayout layout(role, place, true);
  const int at_once = Shared<T, kBoth>::kStaged / layout.classes;
  for (int chunk = 0; chunk < place.chunks; ++chunk) {
    A sums[kColumns] = {};
    for (int row0 = 0; row0 < place.rows; row0 += at_once) {
      const int rows = place.rows - row0 < at_once ? place.rows - row0 : at_once;
      barrier();
      stage_slab(layout, place, row0, rows, chunk, 1, shared.staged,
                 [&](int64_t p, int q, int r) { return source.at(p * source.p + q * source.q + r * source.r); });
      barrier();
      BSSN_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        const int b = thread() + i * kThreads, c = layout.class_of(b);
        if (place.there(chunk, b) > 0)
          for (int row = 0; row < rows; ++row)
            sums[i] += A(widen(w[(row0 + row) * place.l + (chunk * place.step + b)])) *
                       shared.staged[row * layout.classes + c];
      }
    }
    A* const out = outer_partial<A>(launch, tile, role, e, place, chunk);
    BSSN_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      const int b = thread() + i * kThreads;
      if (place.there(chunk, b) > 0) out[b] = sums[i];
    }
  }
}

template <class T, bool kBoth>
BSSN_DEVICE_CALL void product_by_number(const LaunchParams& launch, const Tile& tile, const Layer& layer,
                                        const Address& address, Shared<T, kBoth>& shared) {
  const Place place(tile, layer);
  const T* w = reinterpret_cast<const T*>(address.weight) + place.row0 * place.l + place.col0;
  await(launch.counters, tile.wait, tile.wait_target);
  for (int e = 0; e < (kBoth ? 2 : 1); ++e) {
    if (!(tile.mask >> e & 1)) continue;
    if (tile.kind == kInner)
      inner_by_number(launch, tile, layer.roles[e], e, address, place, w, shared);
    else
      outer_by_number(launch, tile, layer.roles[e], e, address, place, w, shared);
  }
}

}  // namespace cuda
}  // namespace bssn
