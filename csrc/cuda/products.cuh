// The two products of a weight with vectors, tile by tile, and the sums over tiles. See _geometry.py: along a row of a
// weight in memory a direction has its spread, across rows its slab; the inner product makes a slab, the outer a spread.
#pragma once

#include "collectives.cuh"
#include "policy.cuh"

namespace bssn {
namespace cuda {

// Shared memory of a program. kBoth: a layer may have role 1.
template <class T, bool kBoth>
struct Shared {
  using A = Accum<T>;
  static constexpr int kStaged = (kBoth ? 2 : 1) * kMostChunks * kCols<T>;
  Bits16 ring[kStages<T> * kPieces<T> * kThreads];
  alignas(16) A staged[kStaged];  // the numbers of the vectors that a tile needs
  alignas(16) A scratch[kWarps * kCols<T>];
  A parts[kWarps][32];
  double sums[kWarps];
  Tickets tickets;
  int count;
};

// Where a tile is, in elements.
struct Place {
  int64_t row0, l;
  int rows, col0, chunks, step, width, left, r;

  BSSN_DEVICE Place(const Tile& tile, const Layer& layer)
      : row0(tile.row0), l(layer.l), rows(tile.rows), col0(tile.col0), chunks(tile.chunks), step(tile.step),
        width(tile.width), left(tile.end - tile.col0), r(int(layer.r)) {}

  // How many of n numbers from column b of a chunk on are there.
  BSSN_DEVICE int there(int chunk, int b) const {
    const int within = width - b, before_end = left - chunk * step - b;
    return within < before_end ? within : before_end;
  }
};

// (column / r, column % r) of columns below 2^23, without a division of integers.
struct Divider {
  int r;
  float inverse;
  BSSN_DEVICE explicit Divider(int r) : r(r), inverse(1.0f / float(r)) {}
  BSSN_DEVICE int divide(int column, int& rest) const {
    int q = int(float(column) * inverse);
    rest = column - q * r;
    if (rest < 0) {
      --q;
      rest += r;
    } else if (rest >= r) {
      ++q;
      rest -= r;
    }
    return q;
  }
};

// The vector of role e that a product reads: its spread or its slab, with what it is to be multiplied with.
template <class A>
struct SourceVector {
  const void* base;
  DType dtype;
  int64_t p, q, r;  // strides
  bool fresh;       // written by this launch
  A scale;

  BSSN_DEVICE SourceVector(const LaunchParams& launch, const Role& role, const Address& address, int e, int source,
                           bool spread) {
    const bool raw = source >= kRaw && source < kSaved;
    p = spread ? 0 : raw ? role.raw_yp : role.stored_yp;
    q = spread ? (raw ? role.raw_xq : role.stored_xq) : (raw ? role.raw_yq : role.stored_yq);
    r = spread ? (raw ? role.raw_xr : role.stored_xr) : (raw ? role.raw_yr : role.stored_yr);
    fresh = raw;
    scale = A(1);
    dtype = sizeof(A) == 8 ? DType::f64 : DType::f32;
    if (raw) {
      const bool odd = ((source - kRaw) & 1) != 0;
      const int64_t at = spread ? (odd ? role.spread_odd : role.spread) : (odd ? role.slab_odd : role.slab);
      base = static_cast<const A*>(launch.work) + at;
      if (source >= kScaled) scale = A(load_fresh(launch.doubles + role.results + kResults * (source - kScaled) + 1));
    } else if (source == kSaved) {
      base = static_cast<const A*>(launch.saved) + (spread ? role.saved_spread : role.saved_slab);
    } else {
      const uint64_t at = e == 0 ? (spread ? address.spread0 : address.slab0) : (spread ? address.spread1 : address.slab1);
      base = reinterpret_cast<const void*>(at);
      dtype = launch.vector_dtype;
    }
  }

  BSSN_DEVICE A at(int64_t i) const {
    if (fresh) return scale * load_fresh(static_cast<const A*>(base) + i);
    return scale * number_at<A>(base, dtype, i);
  }
};

// The spread of role e over all columns of a tile into shared memory: number chunk * kCols + b for column b of a chunk,
// 0 where there is none, or where the product is not wanted.
template <class T>
BSSN_DEVICE void stage_spread(const SourceVector<Accum<T>>& source, const Place& place, bool wanted, Accum<T>* staged) {
  const Divider divider(place.r);
  for (int i = thread(); i < place.chunks * kCols<T>; i += kThreads) {
    const int chunk = i / kCols<T>, b = i % kCols<T>;
    Accum<T> x = 0;
    if (wanted && place.there(chunk, b) > 0) {
      int r;
      const int q = divider.divide(place.col0 + chunk * place.step + b, r);
      x = source.at(q * source.q + r * source.r);
    }
    staged[i] = x;
  }
}

// How the slab of a role is kept in shared memory: a number for each row, chunk (where those differ) and class.
struct SlabLayout {
  bool on, by_chunk;
  int classes;

  BSSN_DEVICE SlabLayout(const Role& role, const Place& place, bool wanted) : on(wanted) {
    by_chunk = role.raw_yq != 0;  // row axis R: the slab has a number per q
    classes = role.raw_yr == 0 ? 1 : role.modulus ? int(role.modulus) : place.width;  // row axis Q: a number per r
  }
  BSSN_DEVICE int per_row(int chunks) const { return on ? (by_chunk ? chunks : 1) * classes : 0; }
  BSSN_DEVICE int class_of(int b) const { return classes == 1 ? 0 : b % classes; }
};

// Rows and chunks of a tile whose slabs are in shared memory at once: all, or some rows of one chunk.
struct SlabParts {
  int rows, chunks;

  // kStep: rows are a multiple of it. arrays: how many slabs a role has there; room: for how many numbers.
  template <int kStep, int kRoles>
  BSSN_DEVICE static SlabParts of(const SlabLayout (&layouts)[2], int arrays, const Place& place, int room) {
    int all = 0, one = 0;
    BSSN_UNROLL
    for (int e = 0; e < kRoles; ++e) {
      all += layouts[e].per_row(place.chunks) * arrays;
      one += layouts[e].per_row(1) * arrays;
    }
    if (int64_t(all) * place.rows <= room) return {place.rows, place.chunks};
    return {room / one / kStep * kStep, 1};
  }
};

// The slab of a role for some rows and chunks of a tile into shared memory. number(p, q, r) gives one of its numbers.
template <class A, class Number>
BSSN_DEVICE void stage_slab(const SlabLayout& layout, const Place& place, int row0, int rows, int chunk0, int chunks,
                            A* staged, Number number) {
  if (!layout.on) return;
  const int parts = layout.by_chunk ? chunks : 1, each = parts * layout.classes;
  const Divider divider(place.r);
  for (int i = thread(); i < rows * each; i += kThreads) {
    const int row = i / each, rest = i - row * each;
    const int part = rest / layout.classes, c = rest - part * layout.classes;
    int r;
    const int q = divider.divide(place.col0 + (chunk0 + part) * place.step, r);
    staged[i] = number(place.row0 + row0 + row, q, layout.classes == 1 ? r : r + c);
  }
}

// ---- Inner products: a warp has two rows at a time, its lanes go along them

// Partial sums of a row of role 1, by class: lanes add up the columns of a class in parts, then the parts.
template <class A>
BSSN_DEVICE void store_classes(const A* columns, int width, int modulus, A* scratch, A* out) {
  if (modulus == 0) {
    for (int b = lane(); b < width; b += 32) out[b] = columns[b];
    return;
  }
  const int parts = modulus < 32 ? 32 / modulus : 1;
  for (int first = 0; first < modulus; first += 32) {
    const int c = modulus < 32 ? lane() % modulus : first + lane(), part = modulus < 32 ? lane() / modulus : 0;
    A sum = 0;
    if (c < modulus && part < parts)
      for (int b = c + part * modulus; b < width; b += parts * modulus) sum += columns[b];
    if (parts > 1) {
      warp_barrier();
      scratch[lane()] = sum;
      warp_barrier();
      if (part == 0)
        for (int i = 1; i < parts; ++i) sum += scratch[i * modulus + c];
    }
    if (c < modulus && part == 0) out[c] = sum;
  }
}

// Where the partial slab of a tile begins for one of its rows.
template <class A>
BSSN_DEVICE A* inner_partial(const LaunchParams& launch, const Tile& tile, const Role& role, int e, const Place& place,
                             int row) {
  int r;
  const int q = Divider(place.r).divide(place.col0, r);
  const int64_t slot = e == 0 ? tile.slot0 : tile.slot1;
  return static_cast<A*>(launch.work) + role.inner_partial + slot * role.slab_size +
         (place.row0 + row) * role.raw_yp + q * role.raw_yq + r * role.raw_yr;
}

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

  await(launch.counters, tile.wait, tile.wait_target);
  const bool on0 = (tile.mask & 1) != 0, on1 = kBoth && (tile.mask & 2) != 0;
  A* const staged0 = shared.staged;
  A* const staged1 = shared.staged + kMostChunks * kCols<T>;
  {
    const SourceVector<A> source(launch, layer.roles[0], address, 0, tile.source, true);
    stage_spread<T>(source, place, on0, staged0);
  }
  if (kBoth) {
    const SourceVector<A> source(launch, layer.roles[1], address, 1, tile.source, true);
    stage_spread<T>(source, place, on1, staged1);
  }
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

// Where the partial spread of a tile begins for a chunk.
template <class A>
BSSN_DEVICE A* outer_partial(const LaunchParams& launch, const Tile& tile, const Role& role, int e, const Place& place,
                             int chunk) {
  const int64_t slot = e == 0 ? tile.slot0 : tile.slot1;
  return static_cast<A*>(launch.work) + role.outer_partial + slot * place.l + (place.col0 + chunk * place.step);
}

template <class T, bool kBoth>
BSSN_DEVICE void outer_tile(const LaunchParams& launch, const Tile& tile, const Layer& layer, const Address& address,
                            Shared<T, kBoth>& shared) {
  using A = Accum<T>;
  constexpr int n = kLane<T>, kRoles = kBoth ? 2 : 1;
  const Place place(tile, layer);
  const T* w = reinterpret_cast<const T*>(address.weight) + place.row0 * place.l + place.col0;
  Walk<T, false, true> walk(place, w, shared.ring);
  await(launch.counters, tile.wait, tile.wait_target);

  const bool on[2] = {(tile.mask & 1) != 0, kBoth && (tile.mask & 2) != 0};
  const SlabLayout layouts[2] = {SlabLayout(layer.roles[0], place, on[0]), SlabLayout(layer.roles[1], place, on[1])};
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
        for (int e = 0; e < kRoles; ++e) {
          const SourceVector<A> source(launch, layer.roles[e], address, e, tile.source, false);
          stage_slab(layouts[e], place, staged_row0, rows, staged_chunk0, parts.chunks, e ? staged1 : staged0,
                     [&](int64_t p, int q, int r) { return source.at(p * source.p + q * source.q + r * source.r); });
        }
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

// ---- Layers whose rows are not at multiples of 16 bytes, few and small: number by number, one role after the other

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

// ---- Sums over tiles

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
