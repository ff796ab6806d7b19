// The two products of a direction over some rows of a weight; see layer.h for inner, outer, spread and slab.
#pragma once

#include "layer.h"

namespace bssn {
namespace BSSN_ISA {

// Elements added in one float accumulator chain before it is flushed to double: rows of 100,000 keep their digits.
constexpr int64_t kFlush = 4096;

// Results of this size are written past the caches: they no longer stay in one until they are used. Writing 11 MB so
// took 22 to 30 % less time than through a cache with a reading of each line first, and reading them afterwards took as
// long (two cores with 2 MiB of level-two cache each); 4 MB won nothing.
constexpr int64_t kStreamBytes = int64_t(8) << 20;

// Length of a repeating pattern of class coefficients: whole vectors and whole classes. Wide classes repeat as one
// run; narrow ones as often as it takes to fill several vectors.
template <class A>
static inline int64_t pattern_length(int64_t classes) {
  if (classes >= 4 * kLanes<A>) return classes;
  int64_t length = classes;
  while (length % kLanes<A> != 0) length += classes;
  return length * ceil_div(8 * kLanes<A>, length);
}

// Rows are fetched ahead unless they are so long that a cache has lost them again by then; in bytes.
constexpr int64_t kFarthest = 1 << 20;

// sums[i] = sum over j of W[i, j] * spread[j].
template <int N, class A, class T>
static inline void inner_single(const T* w, int64_t stride, const A* spread, int64_t n, double* sums) {
  constexpr int V = kLanes<A>;
  const bool ahead = N * stride * int64_t(sizeof(T)) <= kFarthest;
  for (int i = 0; i < N; ++i) sums[i] = 0;
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    const int64_t end = std::min(begin + kFlush, n);
    Vec<A> a[N] = {}, b[N] = {};
    int64_t j = begin;
    for (; j + 2 * V <= end; j += 2 * V) {
      const Vec<A> e = load<A>(spread + j), f = load<A>(spread + j + V);
      if (ahead)
        for (int i = 0; i < N; ++i) prefetch<2 * V>(w + (N + i) * stride + j);  // the rows after these
      for (int i = 0; i < N; ++i) {
        a[i] += load<A>(w + i * stride + j) * e;
        b[i] += load<A>(w + i * stride + j + V) * f;
      }
    }
    A tail[N] = {};
    for (; j < end; ++j)
      for (int i = 0; i < N; ++i) tail[i] += load_one<A>(w + i * stride + j) * spread[j];
    for (int i = 0; i < N; ++i) sums[i] += sum_lanes<A>(a[i] + b[i]) + double(tail[i]);
  }
}

// spread[j] += sum over i of W[i, j] * slab[i].
template <int N, class A, class T>
static inline void outer_single(const T* w, int64_t stride, const A* slab, int64_t n, A* spread) {
  constexpr int V = kLanes<A>;
  int64_t j = 0;
  for (; j + V <= n; j += V) {
    Vec<A> y = load<A>(spread + j);
    for (int i = 0; i < N; ++i) y += load<A>(w + i * stride + j) * slab[i];
    store(spread + j, y);
  }
  for (; j < n; ++j)
    for (int i = 0; i < N; ++i) spread[j] += load_one<A>(w + i * stride + j) * slab[i];
}

// slab[i, j mod classes] = sum over j of W[i, j] * spread[j]; `sums` is scratch of N patterns.
template <int N, class A, class T>
static inline void inner_periodic(const T* w, int64_t stride, const A* spread, int64_t n, int64_t classes, A* sums,
                                  A* slab) {
  constexpr int V = kLanes<A>;
  const int64_t length = pattern_length<A>(classes);
  std::fill(sums, sums + N * length, A(0));
  for (int64_t begin = 0; begin < n; begin += length) {
    const int64_t m = std::min(length, n - begin);
    int64_t t = 0;
    for (; t + V <= m; t += V) {
      const Vec<A> e = load<A>(spread + begin + t);
      for (int i = 0; i < N; ++i) {
        A* s = sums + i * length + t;
        store(s, load<A>(s) + load<A>(w + i * stride + begin + t) * e);
      }
    }
    for (; t < m; ++t)
      for (int i = 0; i < N; ++i) sums[i * length + t] += load_one<A>(w + i * stride + begin + t) * spread[begin + t];
  }
  for (int i = 0; i < N; ++i) {
    A* s = sums + i * length;
    int64_t periods = length / classes;
    for (; periods % 2 == 0; periods /= 2) {
      const int64_t half = periods / 2 * classes;
      for (int64_t t = 0; t < half; ++t) s[t] += s[t + half];
    }
    for (int64_t c = 0; c < classes; ++c) {
      A sum = s[c];
      for (int64_t k = 1; k < periods; ++k) sum += s[k * classes + c];
      slab[i * classes + c] = sum;
    }
  }
}

// classes numbers, again and again over a pattern's length.
template <class A>
static inline void repeat(const A* numbers, int64_t classes, int64_t length, A* pattern) {
  if (numbers != pattern) std::copy_n(numbers, classes, pattern);
  for (int64_t done = classes; done < length; done *= 2)
    std::copy_n(pattern, std::min(done, length - done), pattern + done);
}

// spread[j] += sum over i of W[i, j] * slab[i, j mod classes]; `pattern` is scratch of N patterns.
template <int N, class A, class T>
static inline void outer_periodic(const T* w, int64_t stride, const A* slab, int64_t n, int64_t classes, A* pattern,
                                  A* spread) {
  constexpr int V = kLanes<A>;
  const int64_t length = pattern_length<A>(classes);
  for (int i = 0; i < N; ++i) repeat(slab + i * classes, classes, length, pattern + i * length);
  for (int64_t begin = 0; begin < n; begin += length) {
    const int64_t m = std::min(length, n - begin);
    int64_t t = 0;
    for (; t + V <= m; t += V) {
      Vec<A> y = load<A>(spread + begin + t);
      for (int i = 0; i < N; ++i) y += load<A>(w + i * stride + begin + t) * load<A>(pattern + i * length + t);
      store(spread + begin + t, y);
    }
    for (; t < m; ++t)
      for (int i = 0; i < N; ++i)
        spread[begin + t] += load_one<A>(w + i * stride + begin + t) * pattern[i * length + t];
  }
}

// Scratch elements that the products of a direction need for four rows.
template <class A>
static inline int64_t scratch_size(const Direction& d) {
  return d.row_axis == 1 ? 4 * pattern_length<A>(d.classes) : 0;
}

// Inner product of N rows over n columns that begin at a whole class (column 0, or a multiple of R).
template <int N, class A, class T>
static inline void inner_rows(const Direction& d, const T* w, const A* spread, int64_t n, A* scratch, A* slab) {
  double sums[N];
  if (d.row_axis == 0) {
    inner_single<N>(w, d.L, spread, n, sums);
    for (int i = 0; i < N; ++i) slab[i] = A(sums[i]);
  } else if (d.row_axis == 1) {
    inner_periodic<N>(w, d.L, spread, n, d.classes, scratch, slab);
  } else {
    for (int64_t q = 0; q < d.Q; ++q) {
      inner_single<N>(w + q * d.R, d.L, spread + q * d.R, d.R, sums);
      for (int i = 0; i < N; ++i) slab[i * d.classes + q] = A(sums[i]);
    }
  }
}

// Outer product of N rows, added to `spread`.
template <int N, class A, class T>
static inline void outer_rows(const Direction& d, const T* w, const A* slab, int64_t n, A* scratch, A* spread) {
  if (d.row_axis == 0) {
    outer_single<N>(w, d.L, slab, n, spread);
  } else if (d.row_axis == 1) {
    outer_periodic<N>(w, d.L, slab, n, d.classes, scratch, spread);
  } else {
    A column[N];
    for (int64_t q = 0; q < d.Q; ++q) {
      for (int i = 0; i < N; ++i) column[i] = slab[i * d.classes + q];
      outer_single<N>(w + q * d.R, d.L, column, d.R, spread + q * d.R);
    }
  }
}

// Calls f(integral_constant<int, 4 or 1>, first row) over rows in fours, then one by one.
template <class F>
static inline void in_fours(int64_t begin, int64_t end, const F& f) {
  int64_t p = begin;
  for (; p + 4 <= end; p += 4) f(std::integral_constant<int, 4>{}, p);
  for (; p < end; ++p) f(std::integral_constant<int, 1>{}, p);
}

// Sums of an outer product over a panel, folded from elements of a row to the vector: what a tile hands on. Elements
// [begin, end) of the row; `vector` is written for row axis P, and must be zero before for the others.
template <class A>
static inline void fold_spread(const Direction& d, const A* spread, int64_t begin, int64_t end, A* vector) {
  if (d.row_axis == 0) {
    std::copy(spread + begin, spread + end, vector + begin);
  } else if (d.row_axis == 1) {
    for (int64_t q = begin / d.R; q < end / d.R; ++q) {
      double sum = 0;
      for (int64_t r = 0; r < d.R; ++r) sum += double(spread[q * d.R + r]);
      vector[q] = A(sum);
    }
  } else {
    for (int64_t r = 0; r < d.R; ++r) {
      double sum = 0;
      for (int64_t q = 0; q < d.Q; ++q) sum += double(spread[q * d.R + r]);
      vector[r] = A(sum);
    }
  }
}

// The reverse: one number of the vector for every element of a row. In memory order: for row axis P the vector is
// already one number per element.
template <class A>
static inline void expand_spread(const Direction& d, const A* vector, int64_t begin, int64_t end, A* spread) {
  if (d.row_axis == 0) {
    if (vector != spread) std::copy(vector + begin, vector + end, spread + begin);
  } else if (d.row_axis == 1) {
    for (int64_t q = begin / d.R; q < end / d.R; ++q) std::fill_n(spread + q * d.R, d.R, vector[q]);
  } else {
    for (int64_t q = 0; q < d.Q; ++q) std::copy_n(vector, d.R, spread + q * d.R);
  }
}

// Adds what the tiles left, in their order and in double: sum[i] = sum over tiles of partial[tile, i].
template <class A>
static inline void add_tiles(const A* partial, int64_t tiles, int64_t n, A* sum) {
  constexpr int64_t block = 256;
  double sums[block];
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t m = std::min(block, n - begin);
    std::fill_n(sums, m, 0.0);
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t i = 0; i < m; ++i) sums[i] += double(partial[t * n + begin + i]);
    for (int64_t i = 0; i < m; ++i) sum[begin + i] = A(sums[i]);
  }
}

}  // namespace BSSN_ISA
}  // namespace bssn
