// The two products of a weight with vectors, tile by tile: the inner one makes a slab from the spread, the outer one a
// spread from the slab. Partial sums have a place per tile; sums.cuh adds them.
#pragma once

#include "by_number.cuh"
#include "partials.cuh"
#include "vectors.cuh"

namespace bssn {
namespace cuda {

// ---- Inner products: a warp has two rows at a time, its lanes go along them

template <class T, bool kBoth>
BSSN_DEVICE void inner_tile(const LaunchParams& launch, const Tile& tile, const Layer& layer, const Address& address,
                            Shared<T, kBoth>& shared) {
  using A = Accum<T>;
  constexpr int n = kLane<T>, kPerRow = kPieces<T> / 2, kSums = n < 4 ? n : 4;
  const Place place(tile, layer);
  const T* w = reinterpret_cast<const T*>(address.weight) + place.row0 * place.l + place.col0;
  const int sets = (place.rows + 2 * kWarps - 1) / (2 * kWarps);
  Ring<T, false> ring(shared.ring);

  // Row j of two in a set, piece a of a row: the weight's place there.
  auto row_of = [&](int set, int j) { return (set * kWarps + warp()) * 2 + j; };
  auto column_of = [&](int a) { return (a * 32 + lane()) * n; };
  auto place_of = [&](int row, int chunk, int b) { return w + row * place.l + (chunk * place.step + b); };
  int fetch_set = 0, fetch_chunk = 0;
  auto fetch = [&] {
    if (fetch_set < sets) {
      BSSN_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int row = row_of(fetch_set, j);
        BSSN_UNROLL
        for (int a = 0; a < kPerRow; ++a) {
          const int b = column_of(a);
          const bool there = row < place.rows && place.there(fetch_chunk, b) > 0;
          ring.fetch(j * kPerRow + a, place_of(row, fetch_chunk, b), there);
        }
      }
      if (++fetch_chunk == place.chunks) fetch_chunk = 0, ++fetch_set;
    }
    ring.fetched();
  };
  for (int i = 0; i < kStages<T> - 1; ++i) fetch();

  SourceVector<A> source0(launch, layer.roles[0], address, 0, tile.source, true);
  SourceVector<A> source1(launch, layer.roles[kBoth ? 1 : 0], address, kBoth ? 1 : 0, tile.source, true);
  const bool on0 = (tile.mask & 1) != 0, on1 = kBoth && (tile.mask & 2) != 0;
  A* const staged0 = shared.staged;
  A* const staged1 = shared.staged + kMostChunks * kCols<T>;
  source0.ready();
  if (kBoth) source1.ready();
  stage_spread<T>(source0, place, on0, staged0);
  if (kBoth) stage_spread<T>(source1, place, on1, staged1);
  barrier();

  auto out_of = [&](int e, int row) { return inner_partial<A>(launch, tile, layer.roles[e], e, place, row); };
  A* const scratch = shared.scratch + warp() * kCols<T>;
  for (int set = 0; set < sets; ++set) {
    A sums0[2][kSums] = {}, sums1[2][kPerRow][n] = {};
    for (int chunk = 0; chunk < place.chunks; ++chunk) {
      ring.arrived();
      BSSN_UNROLL
      for (int a = 0; a < kPerRow; ++a) {
        const int b = column_of(a);
        A x0[n], x1[n];
        load_numbers<A, n>(staged0 + chunk * kCols<T> + b, x0);
        if (kBoth) load_numbers<A, n>(staged1 + chunk * kCols<T> + b, x1);
        BSSN_UNROLL
        for (int j = 0; j < 2; ++j) {
          const int row = row_of(set, j);
          A x[n];
          ring.get(j * kPerRow + a, place_of(row, chunk, b), row < place.rows && place.there(chunk, b) > 0, x);
          BSSN_UNROLL
          for (int i = 0; i < n; ++i) {
            sums0[j][i % kSums] += x[i] * x0[i];
            if (kBoth) sums1[j][a][i] += x[i] * x1[i];
          }
        }
      }
      ring.read();
      fetch();
    }
    BSSN_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int row = row_of(set, j);
      A sum = 0;
      BSSN_UNROLL
      for (int i = 0; i < kSums; ++i) sum += sums0[j][i];
      sum = warp_sum(sum);
      if (on0 && lane() == 0 && row < place.rows) *out_of(0, row) = sum;
      if (kBoth && on1) {
        warp_barrier();
        BSSN_UNROLL
        for (int a = 0; a < kPerRow; ++a)
          BSSN_UNROLL
          for (int i = 0; i < n; ++i) scratch[column_of(a) + i] = sums1[j][a][i];
        warp_barrier();
        if (row < place.rows)
          store_classes(scratch, place.width, int(layer.roles[1].modulus), shared.parts[warp()], out_of(1, row));
      }
    }
  }
}

// ---- Outer products: a thread has 16 bytes of columns and every kPhases-th row

template <class T>
constexpr int kPhases = kThreads / kGroups<T>;
template <class T>
constexpr int kStepRows = kPhases<T> * kPieces<T>;

// Walks over a tile, chunk by chunk and kStepRows rows at a time: how outer products and updates see it. kFetch: and has
// the numbers at `base` on their way.
template <class T, bool kOnce, bool kFetch>
struct Walk {
  const Place& place;
  const T* base;
  Ring<T, kOnce> ring;
  int b, phase, steps, fetch_chunk = 0, fetch_step = 0;

  BSSN_DEVICE Walk(const Place& place, const T* base, Bits16* memory)
      : place(place), base(base), ring(memory), b(thread() % kGroups<T> * kLane<T>), phase(thread() / kGroups<T>),
        steps((place.rows + kStepRows<T> - 1) / kStepRows<T>) {
    for (int i = 0; i < kStages<T> - 1; ++i) fetch();
  }
  BSSN_DEVICE int row_of(int step, int j) const { return step * kStepRows<T> + j * kPhases<T> + phase; }
  BSSN_DEVICE int64_t offset(int row, int chunk) const { return row * place.l + (chunk * place.step + b); }
  BSSN_DEVICE bool there(int row, int chunk) const { return row < place.rows && place.there(chunk, b) > 0; }
  BSSN_DEVICE void fetch() {
    if (!kFetch) return;
    if (fetch_chunk < place.chunks) {
      BSSN_UNROLL
      for (int j = 0; j < kPieces<T>; ++j) {
        const int row = row_of(fetch_step, j);
        ring.fetch(j, base + offset(row, fetch_chunk), there(row, fetch_chunk));
      }
      if (++fetch_step == steps) fetch_step = 0, ++fetch_chunk;
    }
    ring.fetched();
  }
};

template <class T, bool kBoth>
BSSN_DEVICE void outer_tile(const LaunchParams& launch, const Tile& tile, const Layer& layer, const Address& address,
                            Shared<T, kBoth>& shared) {
  using A = Accum<T>;
  constexpr int n = kLane<T>, kRoles = kBoth ? 2 : 1;
  const Place place(tile, layer);
  const T* w = reinterpret_cast<const T*>(address.weight) + place.row0 * place.l + place.col0;
  Walk<T, false, true> walk(place, w, shared.ring);
  SourceVector<A> sources[2] = {{launch, layer.roles[0], address, 0, tile.source, false},
                                {launch, layer.roles[kRoles - 1], address, kRoles - 1, tile.source, false}};
  sources[0].ready();
  if (kBoth) sources[1].ready();

  const bool on[2] = {(tile.mask & 1) != 0, kBoth && (tile.mask & 2) != 0};
  const SlabLayout layouts[2] = {SlabLayout(layer.roles[0], place, on[0]), SlabLayout(layer.roles[1], place, on[1])};
  static_assert(Shared<T, kBoth>::kStaged >= kStepRows<T> * (kBoth ? 1 + kCols<T> : 1), "room for a step");
  const SlabParts parts = SlabParts::of<kStepRows<T>, kRoles>(layouts, 1, place, Shared<T, kBoth>::kStaged);
  A* const staged0 = shared.staged;
  A* const staged1 = staged0 + layouts[0].per_row(parts.chunks) * parts.rows;
  int classes[n];
  if (kBoth) {
    BSSN_UNROLL
    for (int i = 0; i < n; ++i) classes[i] = layouts[1].class_of(walk.b + i);
  }

  for (int chunk = 0; chunk < place.chunks; ++chunk) {
    A sums0[n] = {}, sums1[n] = {};
    int staged_row0 = 0;
    const int staged_chunk0 = parts.chunks == 1 ? chunk : 0;
    for (int step = 0; step < walk.steps; ++step) {
      if (step * kStepRows<T> % parts.rows == 0 && (step > 0 || chunk == staged_chunk0)) {
        staged_row0 = step * kStepRows<T>;
        const int rows = place.rows - staged_row0 < parts.rows ? place.rows - staged_row0 : parts.rows;
        barrier();
        BSSN_UNROLL
        for (int e = 0; e < kRoles; ++e)
          stage_source(layouts[e], place, staged_row0, rows, staged_chunk0, parts.chunks, e ? staged1 : staged0, sources[e]);
        barrier();
      }
      walk.ring.arrived();
      BSSN_UNROLL
      for (int j = 0; j < kPieces<T>; ++j) {
        const int row = walk.row_of(step, j);
        const bool there = walk.there(row, chunk);
        A x[n];
        walk.ring.get(j, w + walk.offset(row, chunk), there, x);
        if (!there) continue;
        const int staged_row = row - staged_row0, part = chunk - staged_chunk0;
        if (on[0]) {
          const A y = staged0[layouts[0].by_chunk ? staged_row * parts.chunks + part : staged_row];
          BSSN_UNROLL
          for (int i = 0; i < n; ++i) sums0[i] += x[i] * y;
        }
        if (kBoth && on[1]) {
          const A* y = staged1 + (layouts[1].by_chunk ? staged_row * parts.chunks + part : staged_row) * layouts[1].classes;
          BSSN_UNROLL
          for (int i = 0; i < n; ++i) sums1[i] += x[i] * y[classes[i]];
        }
      }
      walk.ring.read();
      walk.fetch();
    }
    BSSN_UNROLL
    for (int e = 0; e < kRoles; ++e) {
      if (!on[e]) continue;
      const Role& role = layer.roles[e];
      A* const mine = shared.scratch + thread() * n;
      barrier();
      BSSN_UNROLL
      for (int i = 0; i < n; ++i) mine[i] = e ? sums1[i] : sums0[i];
      barrier();
      if (walk.phase == 0) {
        A* const out = outer_partial<A>(launch, tile, role, e, place, chunk) + walk.b;
        const bool there = place.there(chunk, walk.b) > 0;
        BSSN_UNROLL
        for (int i = 0; i < n; ++i) {
          A sum = 0;
          BSSN_UNROLL
          for (int k = 0; k < kPhases<T>; ++k) sum += mine[k * kCols<T> + i];
          if (there) out[i] = sum;
        }
      }
    }
  }
}

// An inner or outer tile.
template <class T, bool kBoth>
BSSN_DEVICE void product_tile(const LaunchParams& launch, const Tile& tile, Shared<T, kBoth>& shared) {
  const Layer& layer = launch.layers[tile.layer];
  const Address& address = launch.addresses[tile.layer];
  if (!layer.aligned || address.weight % 16 != 0)
    product_by_number<T, kBoth>(launch, tile, layer, address, shared);
  else if (tile.kind == kInner)
    inner_tile<T, kBoth>(launch, tile, layer, address, shared);
  else
    outer_tile<T, kBoth>(launch, tile, layer, address, shared);
}

}  // namespace cuda
}  // namespace bssn
