// One layer as the CPU reads it: its directions in memory order, its tiles, its place in the workspace.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "tables.h"
#include "vec.h"

namespace bssn {
namespace BSSN_ISA {

// A weight [P, Q, R] is P rows of L = Q R consecutive numbers. Each direction has one vector along a row, one number
// per element of it (`spread`), and one across rows, `classes` numbers per row (`slab`):
//
//   row axis P: spread = v, slab = u,        1 class      (element j meets slab[p])
//   row axis Q: spread = u, slab = v [P, R]  R classes    (slab[p, j mod R];  u[j div R])
//   row axis R: spread = u, slab = v [P, Q]  Q classes    (slab[p, j div R];  u[j mod R])
//
// The `inner` product slab = sum over a row of W * spread is complete when the row is read; the `outer` product
// spread = sum over rows of W * slab when all rows are. A direction that starts from its spread vector needs one
// reading of W for both products; one that starts from the slab, one too if W is read in blocks of columns.
struct Direction {
  int row_axis = 0;
  int64_t P = 0, Q = 0, R = 0, L = 0;
  int64_t classes = 1;
  bool inner_first = true;
  bool order_vu = false;
  int64_t outer_stride = 0, inner_stride = 0;
  int64_t spread_size = 0;  // length of the vector whose expansion to a row is `spread`

  Direction() = default;
  Direction(const LayerRow& row, const DirectionRow& d)
      : row_axis(int(d.row_axis)), P(row.p), Q(row.q), R(row.r), L(row.q * row.r), order_vu(d.vu),
        outer_stride(d.outer), inner_stride(d.inner) {
    classes = row_axis == 0 ? 1 : row_axis == 1 ? R : Q;
    spread_size = row_axis == 0 ? L : row_axis == 1 ? Q : R;
    inner_first = row_axis == 0 ? !order_vu : order_vu;
  }

  int64_t slab_size() const { return P * classes; }
  bool spread_is_v() const { return row_axis == 0; }

  // Calls f(index in the vector, index in memory order) for every element of the spread vector.
  template <class F>
  void each_spread(const F& f) const {
    if (row_axis != 0) {
      for (int64_t i = 0; i < spread_size; ++i) f(i, i);
    } else {
      for (int64_t q = 0, j = 0; q < Q; ++q)
        for (int64_t r = 0; r < R; ++r, ++j) f(q * outer_stride + r * inner_stride, j);
    }
  }

  // Calls f(index in the vector, index in the slab) for every element of the slab.
  template <class F>
  void each_slab(const F& f) const {
    if (row_axis == 0) {
      for (int64_t p = 0; p < P; ++p) f(p, p);
    } else {
      for (int64_t p = 0; p < P; ++p)
        for (int64_t c = 0; c < classes; ++c) f(p * outer_stride + c * inner_stride, p * classes + c);
    }
  }
};

// How a layer is read: in panels of whole rows, or of columns.
constexpr int64_t kColumnPanel = 1 << 18;  // elements

struct Tiling {
  int64_t rows_per_tile = 0, row_tiles = 0;
  int64_t cols_per_tile = 0, col_tiles = 0;  // 0: this layer is never read in columns
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Depends on the shape alone, so that the order of sums does. Row panels have at least 96 rows, which keeps their
// partial sums near 1 % of the layer, and 64 Ki elements, which keeps the price of a ticket near nothing, unless that
// would add more than 512 rows in float.
// Column panels fit a 1 MiB share of a level-two cache where rows are long enough to be worth it.
static inline Tiling tiling(const LayerRow& row) {
  const int64_t L = row.q * row.r;
  Tiling t;
  const int64_t most = std::max<int64_t>(96, std::min<int64_t>(512, ceil_div(65536, L)));
  t.rows_per_tile = std::min(row.p, round_up(ceil_div(row.p, ceil_div(row.p, most)), 4));
  t.row_tiles = ceil_div(row.p, t.rows_per_tile);
  int64_t classes = 1;
  bool possible = true;
  for (int d = 0; d < row.directions; ++d) {
    const Direction direction(row, row.direction[d]);
    possible = possible && !direction.inner_first && direction.row_axis != 2;
    if (direction.row_axis == 1) classes = row.r;
  }
  const int64_t width = round_up(std::max({int64_t(128), 64 * classes, ceil_div(kColumnPanel, row.p)}), 32 * classes);
  if (possible && L >= 4 * width && row.p * width <= (1 << 21)) {
    t.cols_per_tile = width;
    t.col_tiles = ceil_div(L, width);
  }
  return t;
}

template <class A>
static inline double sum_of_squares(const A* x, int64_t n) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) sums[k] += double(x[i + k]) * double(x[i + k]);
  for (; i < n; ++i) sums[0] += double(x[i]) * double(x[i]);
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

// Memory of one call, cut into pieces of whole cache lines. With BSSN_GUARD, for tests, a line that nobody may write to
// follows each piece.
class Workspace {
 public:
  // Pieces of one size.
  struct Pieces {
    int64_t at = 0, bytes = 0;
  };

  template <class T>
  int64_t reserve(int64_t n) {
    const int64_t at = bytes_;
    bytes_ += round_up(n * int64_t(sizeof(T)), 64);
#if defined(BSSN_GUARD)
    guards_.push_back(bytes_);
    bytes_ += 64;
#endif
    return at;
  }
  template <class T>
  Pieces reserve(int64_t n, int64_t pieces) {
    Pieces found{bytes_, 0};
    for (int64_t i = 0; i < pieces; ++i) reserve<T>(n);
    if (pieces) found.bytes = (bytes_ - found.at) / pieces;
    return found;
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }
  template <class T>
  T* at(const Pieces& pieces, int64_t i) const {
    return at<T>(pieces.at + i * pieces.bytes);
  }
  // Kept by the calling thread for its next call: fresh pages would cost more than the arithmetic of a small group.
  void allocate() {
    static thread_local std::vector<char> memory;
    if (int64_t(memory.size()) < bytes_ + 64) {
      memory.clear();
      memory.shrink_to_fit();
      memory.resize(bytes_ + 64);
    }
    base_ = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
#if defined(BSSN_GUARD)
    for (int64_t guard : guards_) std::fill_n(base_ + guard, 64, char(0xA5));
#endif
  }
  // At the end of a call.
  void check() const {
#if defined(BSSN_GUARD)
    for (int64_t guard : guards_)
      if (std::count(base_ + guard, base_ + guard + 64, char(0xA5)) != 64)
        throw std::logic_error("something was written behind the piece of the workspace that ends at byte " +
                               std::to_string(guard));
#endif
  }

 private:
  int64_t bytes_ = 0;
  char* base_ = nullptr;
#if defined(BSSN_GUARD)
  std::vector<int64_t> guards_;
#endif
};

}  // namespace BSSN_ISA
}  // namespace bssn
