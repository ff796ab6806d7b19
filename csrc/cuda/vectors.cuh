// The vectors that a tile needs, brought to shared memory once per tile: every index into them is worked out there, and
// the loops over the weight know rows and columns alone. See _geometry.py: along a row of a weight in memory a direction
// has its spread, across rows its slab.
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

}  // namespace cuda
}  // namespace bssn
