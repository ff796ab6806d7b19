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
  // A step of an update may need two slabs of both roles: 2 (1 + kCols) numbers of each of its rows.
  static constexpr int kStaged = (kBoth ? 2 : 1) * kMostChunks * (kCols<T> + 1);
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
    const int off = rest < 0 ? -1 : rest >= r ? 1 : 0;
    rest -= off * r;
    return q + off;
  }
};

// The vector of role e that a product reads: its spread or its slab, with what it is to be multiplied with. Where it
// stands is known before it is there; `ready` is for when it is.
template <class A>
struct SourceVector {
  const void* base;
  const double* factor;  // of a raw vector, made by this launch
  int64_t p;             // strides
  int q, r;
  DType dtype;
  A scale;

  BSSN_DEVICE SourceVector(const LaunchParams& launch, const Role& role, const Address& address, int e, int source,
                           bool spread) {
    const bool raw = source >= kRaw && source < kSaved;
    p = spread ? 0 : raw ? role.raw_yp : role.stored_yp;
    q = int(spread ? (raw ? role.raw_xq : role.stored_xq) : (raw ? role.raw_yq : role.stored_yq));
    r = int(spread ? (raw ? role.raw_xr : role.stored_xr) : (raw ? role.raw_yr : role.stored_yr));
    factor = nullptr;
    dtype = Code<A>::value;
    if (raw) {
      const bool odd = ((source - kRaw) & 1) != 0;
      const int64_t at = spread ? (odd ? role.spread_odd : role.spread) : (odd ? role.slab_odd : role.slab);
      base = static_cast<const A*>(launch.work) + at;
      if (source >= kScaled && role.exists) factor = launch.doubles + role.results + kResults * (source - kScaled) + 1;
    } else if (source == kSaved) {
      base = static_cast<const A*>(launch.saved) + (spread ? role.saved_spread : role.saved_slab);
    } else {
      const uint64_t at = e == 0 ? (spread ? address.spread0 : address.slab0) : (spread ? address.spread1 : address.slab1);
      base = reinterpret_cast<const void*>(at);
      dtype = launch.vector_dtype;
    }
  }

  BSSN_DEVICE void ready() { scale = factor ? A(load_fresh(factor)) : A(1); }
  // Whether its numbers have the type that sums are made in, as nearly always.
  BSSN_DEVICE bool own() const { return dtype == Code<A>::value; }
  // A number without its factor. kOwn: it is known that they have. L1 is of no use: a number is read once, and what this
  // launch wrote is not there.
  template <bool kOwn>
  BSSN_DEVICE A at(int64_t i) const {
    return kOwn ? load_fresh(static_cast<const A*>(base) + i) : number_at<A>(base, dtype, i);
  }
};

// The spread of role e over all columns of a tile into shared memory: number chunk * kCols + b for column b of a chunk,
// 0 where there is none, or where the product is not wanted. Everybody waits for this, so many loads are on their way at
// once, none of them in a branch, and where the numbers stand as the columns do they are read 16 bytes at a time.
template <class T, bool kOwn>
BSSN_DEVICE void stage_by_number(const SourceVector<Accum<T>>& source, const Place& place, Accum<T>* staged) {
  using A = Accum<T>;
  constexpr int kAtOnce = 8;
  const Divider divider(place.r);
  const int total = place.chunks * kCols<T>;
  for (int first = thread(); first < total; first += kAtOnce * kThreads) {
    A x[kAtOnce];
    BSSN_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * kThreads, chunk = i / kCols<T>, b = i % kCols<T>;
      const bool there = i < total && place.there(chunk, b) > 0;
      int r;
      const int q = divider.divide(there ? place.col0 + chunk * place.step + b : place.col0, r);
      x[j] = source.template at<kOwn>(q * source.q + r * source.r);
    }
    BSSN_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * kThreads, chunk = i / kCols<T>, b = i % kCols<T>;
      if (i < total) staged[i] = place.there(chunk, b) > 0 ? source.scale * x[j] : A(0);
    }
  }
}

template <class T>
BSSN_DEVICE void stage_in_order(const SourceVector<Accum<T>>& source, const Place& place, Accum<T>* staged) {
  using A = Accum<T>;
  constexpr int n = kLane<A>, kAtOnce = 8, kPerChunk = kCols<T> / n;
  const A* from = static_cast<const A*>(source.base) + place.col0;
  const int pieces = place.chunks * kPerChunk;
  for (int first = thread(); first < pieces; first += kAtOnce * kThreads) {
    Pack<A, n> x[kAtOnce];
    BSSN_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * kThreads, chunk = i / kPerChunk, b = i % kPerChunk * n;
      const int there = i < pieces ? place.there(chunk, b) : 0;
      const A* p = from + (chunk * place.step + b);
      x[j].bits[0] = Bits16{0, 0, 0, 0};
      if (there >= n)
        x[j].bits[0] = load_fresh(reinterpret_cast<const Bits16*>(p));
      else
        BSSN_UNROLL
        for (int k = 0; k < n - 1; ++k)
          if (k < there) x[j].numbers[k] = load_fresh(p + k);
    }
    BSSN_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j * kThreads >= pieces) continue;
      BSSN_UNROLL
      for (int k = 0; k < n; ++k) x[j].numbers[k] *= source.scale;
      reinterpret_cast<Bits16*>(staged)[first + j * kThreads] = x[j].bits[0];
    }
  }
}

template <class T>
BSSN_DEVICE void stage_spread(const SourceVector<Accum<T>>& source, const Place& place, bool wanted, Accum<T>* staged) {
  using A = Accum<T>;
  const bool in_order = place.r == 1 ? source.q == 1 : source.r == 1 && source.q == place.r;
  if (!wanted)  // and maybe there is no such vector
    for (int i = thread(); i < place.chunks * kCols<T>; i += kThreads) staged[i] = 0;
  else if (!source.own())
    stage_by_number<T, false>(source, place, staged);
  else if (in_order && place.step % kLane<A> == 0 && aligned(static_cast<const A*>(source.base) + place.col0))
    stage_in_order<T>(source, place, staged);
  else
    stage_by_number<T, true>(source, place, staged);
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

// The slab of a role for some rows and chunks of a tile into shared memory. number(p, q, r) gives one of its numbers, and
// `factor` is what they are multiplied with. kAtOnce: loads of a thread on their way.
template <int kAtOnce, class A, class Number>
BSSN_DEVICE void stage_slab(const SlabLayout& layout, const Place& place, int row0, int rows, int chunk0, int chunks,
                            A* staged, A factor, Number number) {
  if (!layout.on) return;
  const int parts = layout.by_chunk ? chunks : 1, each = parts * layout.classes, total = rows * each;
  const Divider divider(place.r);
  for (int first = thread(); first < total; first += kAtOnce * kThreads) {
    A x[kAtOnce];
    BSSN_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * kThreads < total ? first + j * kThreads : first;
      int row = i, part = 0, c = 0, r;
      if (each > 1) {
        row = i / each;
        const int rest = i - row * each;
        part = rest / layout.classes, c = rest - part * layout.classes;
      }
      const int q = divider.divide(place.col0 + (chunk0 + part) * place.step, r);
      x[j] = number(place.row0 + row0 + row, q, r + c);
    }
    BSSN_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      if (first + j * kThreads < total) staged[first + j * kThreads] = factor * x[j];
  }
}

// The same from the vector that a product reads.
template <class A>
BSSN_DEVICE void stage_source(const SlabLayout& layout, const Place& place, int row0, int rows, int chunk0, int chunks,
                              A* staged, const SourceVector<A>& source) {
  auto place_of = [&](int64_t p, int q, int r) { return p * source.p + q * source.q + r * source.r; };
  if (source.own())
    stage_slab<4>(layout, place, row0, rows, chunk0, chunks, staged, source.scale,
               [&](int64_t p, int q, int r) { return source.template at<true>(place_of(p, q, r)); });
  else
    stage_slab<4>(layout, place, row0, rows, chunk0, chunks, staged, source.scale,
               [&](int64_t p, int q, int r) { return source.template at<false>(place_of(p, q, r)); });
}

}  // namespace cuda
}  // namespace bssn
