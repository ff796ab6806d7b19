// Products of layers whose rows are not at multiples of 16 bytes, few and small: number by number, one role after the other.
#pragma once

#include "partials.cuh"

namespace bssn {
namespace cuda {

template <class T, bool kBoth>
BSSN_DEVICE void inner_by_number(const LaunchParams& launch, const Tile& tile, const Role& role, int e,
                                 const Address& address, const Place& place, const T* w, Shared<T, kBoth>& shared) {
  using A = Accum<T>;
  SourceVector<A> source(launch, role, address, e, tile.source, true);
  source.ready();
  barrier();
  stage_spread<T>(source, place, true, shared.staged);
  barrier();
  // Several rows at once, whose numbers are on their way together.
  constexpr int kAtOnce = 4;
  A* const sums = shared.scratch + warp() * kCols<T>;
  for (int first = warp(); first < place.rows; first += kAtOnce * kWarps) {
    A totals[kAtOnce] = {};
    auto sums_of = [&](int b, A* of_rows) {
      for (int chunk = 0; chunk < place.chunks; ++chunk) {
        if (place.there(chunk, b) <= 0) continue;
        const A x = shared.staged[chunk * kCols<T> + b];
        BSSN_UNROLL
        for (int j = 0; j < kAtOnce; ++j) {
          const int row = first + j * kWarps < place.rows ? first + j * kWarps : first;
          of_rows[j] += A(widen(w[row * place.l + (chunk * place.step + b)])) * x;
        }
      }
    };
    if (role.modulus == 1) {
      for (int b = lane(); b < place.width; b += 32) sums_of(b, totals);
      BSSN_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        const A total = warp_sum(totals[j]);
        const int row = first + j * kWarps;
        if (lane() == 0 && row < place.rows) *inner_partial<A>(launch, tile, role, e, place, row) = total;
      }
      continue;
    }
    for (int j = 0; j < kAtOnce; ++j) {
      const int row = first + j * kWarps;
      if (row >= place.rows) break;
      warp_barrier();
      for (int b = lane(); b < place.width; b += 32) {
        A sum = 0;
        BSSN_UNROLL_BY_4
        for (int chunk = 0; chunk < place.chunks; ++chunk)
          if (place.there(chunk, b) > 0)
            sum += A(widen(w[row * place.l + (chunk * place.step + b)])) * shared.staged[chunk * kCols<T> + b];
        sums[b] = sum;
      }
      warp_barrier();
      store_classes(sums, place.width, int(role.modulus), shared.parts[warp()],
                    inner_partial<A>(launch, tile, role, e, place, row));
    }
  }
}

template <class T, bool kBoth>
BSSN_DEVICE void outer_by_number(const LaunchParams& launch, const Tile& tile, const Role& role, int e,
                                 const Address& address, const Place& place, const T* w, Shared<T, kBoth>& shared) {
  using A = Accum<T>;
  constexpr int kColumns = kCols<T> / kThreads;  // of a chunk, for each thread
  SourceVector<A> source(launch, role, address, e, tile.source, false);
  source.ready();
  const SlabLayout layout(role, place, true);
  const int at_once = Shared<T, kBoth>::kStaged / layout.classes;
  for (int chunk = 0; chunk < place.chunks; ++chunk) {
    A sums[kColumns] = {};
    for (int row0 = 0; row0 < place.rows; row0 += at_once) {
      const int rows = place.rows - row0 < at_once ? place.rows - row0 : at_once;
      barrier();
      stage_source(layout, place, row0, rows, chunk, 1, shared.staged, source);
      barrier();
      BSSN_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        const int b = thread() + i * kThreads, c = layout.class_of(b);
        if (place.there(chunk, b) > 0)
          BSSN_UNROLL_BY_8
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
