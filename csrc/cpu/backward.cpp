// Backward: dL/dW and dL/dgain of the layers of a group that have a gradient.
//
// With G = dL/dW_bar and s = <G, W>:  dW = m G + s * sum over directions of slope (u v^T + start * extra), where extra
// is u0 r^T or r v0^T and stands only where the gradient goes through the iteration. One reading of G and W makes s
// (and the product in r), one reading of G and one writing make dW.

#include <numeric>

#include "algebra.h"
#include "dispatch.h"
#include "kernels.h"
#include "products.h"
#include "schedule.h"

namespace bssn {
namespace BSSN_ISA {
namespace {

constexpr int64_t kDotTile = 1 << 17;  // elements

template <class A, class G, class T>
static double dot_product(const G* g, const T* w, int64_t n) {
  constexpr int V = kLanes<A>;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    const int64_t end = std::min(begin + kFlush, n);
    Vec<A> a = {}, b = {}, c = {}, e = {};
    int64_t j = begin;
    for (; j + 4 * V <= end; j += 4 * V) {
      a += load<A>(g + j) * load<A>(w + j);
      b += load<A>(g + j + V) * load<A>(w + j + V);
      c += load<A>(g + j + 2 * V) * load<A>(w + j + 2 * V);
      e += load<A>(g + j + 3 * V) * load<A>(w + j + 3 * V);
    }
    A tail = 0;
    for (; j < end; ++j) tail += load_one<A>(g + j) * load_one<A>(w + j);
    sum += sum_lanes<A>((a + b) + (c + e)) + double(tail);
  }
  return sum;
}

// coefficient * slab x spread, one of the rank-one matrices of a direction.
template <class A>
struct Term {
  const Direction* direction;
  const A* slab;
  const A* spread;
  A coefficient;
};

// out[j] = m g[j] + sum over t of a[t] x[t][j] + sum over t of y[t][j] * pattern[t][j mod length].
template <int NX, int NY, class A, class T, class G>
static inline void update(const G* g, T* out, int64_t n, A m, const A* a, const A* const* x, const A* const* y,
                          const A* const* pattern, int64_t length, bool streaming) {
  constexpr int V = kLanes<A>;
  for (int64_t begin = 0; begin < n; begin += length) {
    const int64_t end = std::min(n - begin, length);
    int64_t j = 0;
    for (; j + V <= end; j += V) {
      Vec<A> sum = load<A>(g + begin + j) * m;
      for (int t = 0; t < NX; ++t) sum += load<A>(x[t] + begin + j) * a[t];
      for (int t = 0; t < NY; ++t) sum += load<A>(y[t] + begin + j) * load<A>(pattern[t] + j);
      if constexpr (std::is_same<A, T>::value) {
        if (streaming) {
          stream(out + begin + j, sum);
          continue;
        }
      }
      store(out + begin + j, sum);
    }
    for (; j < end; ++j) {
      A sum = load_one<A>(g + begin + j) * m;
      for (int t = 0; t < NX; ++t) sum += x[t][begin + j] * a[t];
      for (int t = 0; t < NY; ++t) sum += y[t][begin + j] * pattern[t][j];
      store_one(out + begin + j, sum);
    }
  }
}

// update with numbers of terms known at run time. A direction has one term, or two through the iteration; those of
// row axis P are of the first kind, those of a narrow one of the second, and run by run all are of the first.
template <class A, class T, class G>
static void update_any(int nx, int ny, const G* g, T* out, int64_t n, A m, const A* a, const A* const* x,
                       const A* const* y, const A* const* pattern, int64_t length, bool streaming) {
#define BSSN_CASE(i, k) \
  case 8 * i + k: return update<i, k>(g, out, n, m, a, x, y, pattern, length, streaming);
  switch (8 * nx + ny) {
    BSSN_CASE(0, 0) BSSN_CASE(0, 1) BSSN_CASE(0, 2) BSSN_CASE(1, 0) BSSN_CASE(1, 1) BSSN_CASE(2, 0) BSSN_CASE(2, 2)
    BSSN_CASE(4, 0)
  }
#undef BSSN_CASE
}

template <class A>
struct State {
  Direction direction[2];
  Tiling tiling;
  int64_t dots = 0;
  // Offsets in the workspace: u and v in memory order, the vector the last iteration started from, and r.
  int64_t spread[2], slab[2], start[2], rest[2], partial[2], vector[2];
  std::vector<Term<A>> terms;
};

template <class T>
class Backward {
  using A = Accumulation<T>;

 public:
  explicit Backward(const BackwardCall& call) : call_(call), layers_(call.layers), states_(call.layers) {}

  void run() {
    plan();
    workspace_.allocate();
    Schedule schedule(layers_);
    for (int64_t k = 0; k < layers_; ++k) {
      const int64_t l = order_[k];
      schedule.add_stage(k, 1);
      schedule.add_stage(k, row(l).through ? states_[l].tiling.row_tiles : ceil_div(elements(l), kDotTile));
      schedule.add_stage(k, states_[l].tiling.row_tiles);
    }
    schedule.run(
        threads_,
        [&](int64_t k, int stage, int64_t tile, int thread) {
          const int64_t l = order_[k];
          if (stage == 0) prepare(l);
          if (stage == 1 && !row(l).through) dot_tile(l, tile);
          if (stage == 1 && row(l).through) through_tile(l, tile, thread);
          if (stage == 2) update_tile(l, tile, thread);
        },
        [&](int64_t k, int stage, int) {
          if (stage == 1) combine(order_[k]);
        });
    workspace_.check();
  }

 private:
  const LayerRow& row(int64_t l) const { return call_.rows[call_.indices[l]]; }
  int64_t elements(int64_t l) const { return row(l).p * row(l).q * row(l).r; }
  const T* weight(int64_t l) const { return static_cast<const T*>(call_.weights[l]); }

  // <G, W> over consecutive elements.
  double dot(int64_t l, int64_t begin, int64_t n) const {
    double sum = 0;
    with_dtype(call_.grad_dtype, [&](auto type) {
      using G = typename decltype(type)::type;
      sum = dot_product<A>(static_cast<const G*>(call_.grads[l]) + begin, weight(l) + begin, n);
    });
    return sum;
  }

  const A* saved(int64_t offset) const { return static_cast<const A*>(call_.saved) + offset; }
  A scalar(int64_t l, int which) const { return saved(row(l).scalar_offset)[which]; }
  const A* vector(int64_t l, int d, int which) const {
    int64_t at = row(l).vector_offset;
    for (int e = 0; e < d; ++e) at += row(l).direction[e].rows + row(l).direction[e].cols;
    return saved(at + (which == 1 ? row(l).direction[d].rows : 0));
  }

  void plan() {
    int64_t total = 0;
    for (int64_t l = 0; l < layers_; ++l) {
      State<A>& s = states_[l];
      total += elements(l);
      s.tiling = tiling(row(l));
      s.dots = workspace_.reserve<double>(std::max(s.tiling.row_tiles, ceil_div(elements(l), kDotTile)));
      for (int d = 0; d < row(l).directions; ++d) {
        s.direction[d] = Direction(row(l), row(l).direction[d]);
        const Direction& direction = s.direction[d];
        row_length_ = std::max(row_length_, direction.L);
        scratch_length_ = std::max(scratch_length_, scratch_size<A>(direction));
        s.spread[d] = workspace_.reserve<A>(direction.L);
        s.slab[d] = workspace_.reserve<A>(direction.slab_size());
        if (!row(l).through) continue;
        s.start[d] = workspace_.reserve<A>(direction.inner_first ? direction.L : direction.slab_size());
        s.rest[d] = workspace_.reserve<A>(direction.inner_first ? direction.slab_size() : direction.L);
        if (direction.inner_first) continue;
        s.vector[d] = workspace_.reserve<A>(direction.spread_size);
        s.partial[d] = workspace_.reserve<A>(s.tiling.row_tiles * direction.spread_size);
      }
    }
    threads_ = int(std::min<int64_t>(call_.threads, 1 + total / 32768));
    streaming_ = total * int64_t(sizeof(T)) >= kStreamBytes;
    order_.resize(layers_);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return elements(a) > elements(b); });
    spread_scratch_ = workspace_.template reserve<A>(row_length_, 2 * threads_);
    scratch_ = workspace_.template reserve<A>(scratch_length_, threads_);
  }

  A* spread_scratch(int thread, int d) const { return workspace_.template at<A>(spread_scratch_, 2 * thread + d); }
  A* scratch(int thread) const { return workspace_.template at<A>(scratch_, thread); }

  static void to_spread(const Direction& d, const A* from, A* spread) {
    if (d.row_axis == 0) {
      d.each_spread([&](int64_t i, int64_t j) { spread[j] = from[i]; });
    } else {
      expand_spread(d, from, 0, d.L, spread);
    }
  }
  static void to_slab(const Direction& d, const A* from, A* slab) {
    d.each_slab([&](int64_t i, int64_t j) { slab[j] = from[i]; });
  }

  void prepare(int64_t l) {
    State<A>& s = states_[l];
    for (int d = 0; d < row(l).directions; ++d) {
      const Direction& direction = s.direction[d];
      to_spread(direction, vector(l, d, direction.spread_is_v()), workspace_.at<A>(s.spread[d]));
      to_slab(direction, vector(l, d, !direction.spread_is_v()), workspace_.at<A>(s.slab[d]));
      if (!row(l).through) continue;
      const A* start = saved(row(l).direction[d].start_offset);
      if (direction.inner_first) {
        to_spread(direction, start, workspace_.at<A>(s.start[d]));
      } else {
        to_slab(direction, start, workspace_.at<A>(s.start[d]));
      }
    }
  }

  void dot_tile(int64_t l, int64_t tile) {
    const int64_t begin = tile * kDotTile;
    workspace_.at<double>(states_[l].dots)[tile] = dot(l, begin, std::min(kDotTile, elements(l) - begin));
  }

  // The same over whole rows, and the product of W in r.
  void through_tile(int64_t l, int64_t tile, int thread) {
    State<A>& s = states_[l];
    const int64_t L = s.direction[0].L;
    const int64_t begin = tile * s.tiling.rows_per_tile, end = std::min(row(l).p, begin + s.tiling.rows_per_tile);
    for (int d = 0; d < row(l).directions; ++d)
      if (!s.direction[d].inner_first) std::fill_n(spread_scratch(thread, d), L, A(0));
    double sum = 0;
    in_fours(begin, end, [&](auto rows, int64_t p) {
      constexpr int N = decltype(rows)::value;
      const T* w = weight(l) + p * L;
      sum += dot(l, p * L, N * L);
      for (int d = 0; d < row(l).directions; ++d) {
        const Direction& direction = s.direction[d];
        const int64_t at = p * direction.classes;
        if (direction.inner_first) {
          A* rest = workspace_.at<A>(s.rest[d]) + at;
          inner_rows<N>(direction, w, workspace_.at<A>(s.spread[d]), L, scratch(thread), rest);
        } else {
          const A* slab = workspace_.at<A>(s.slab[d]) + at;
          outer_rows<N>(direction, w, slab, L, scratch(thread), spread_scratch(thread, d));
        }
      }
    });
    workspace_.at<double>(s.dots)[tile] = sum;
    for (int d = 0; d < row(l).directions; ++d) {
      if (s.direction[d].inner_first) continue;
      A* partial = workspace_.at<A>(s.partial[d]) + tile * s.direction[d].spread_size;
      fold_spread(s.direction[d], spread_scratch(thread, d), 0, L, partial);
    }
  }

  void combine(int64_t l) {
    State<A>& s = states_[l];
    const int64_t tiles = row(l).through ? s.tiling.row_tiles : ceil_div(elements(l), kDotTile);
    const double* dots = workspace_.at<double>(s.dots);
    const double sum = std::accumulate(dots, dots + tiles, 0.0);
    static_cast<A*>(call_.grad_gains)[l] = A(sum * double(scalar(l, k_slope_gain)));
    for (int d = 0; d < row(l).directions; ++d) {
      const A slope = scalar(l, k_slope_out + d);
      if (slope == 0) continue;  // nothing depends on this sigma, whatever <G, W> is
      const Direction& direction = s.direction[d];
      const double coefficient = sum * double(slope);
      const A *spread = workspace_.at<A>(s.spread[d]), *slab = workspace_.at<A>(s.slab[d]);
      s.terms.push_back({&direction, slab, spread, A(coefficient)});
      if (!row(l).through) continue;
      const A residual = scalar(l, k_residual_out + d);
      A* rest = workspace_.at<A>(s.rest[d]);
      if (direction.inner_first) {
        for (int64_t i = 0; i < direction.slab_size(); ++i) rest[i] -= residual * slab[i];
      } else {
        A* whole = workspace_.at<A>(s.vector[d]);
        add_tiles(workspace_.at<A>(s.partial[d]), s.tiling.row_tiles, direction.spread_size, whole);
        expand_spread(direction, whole, 0, direction.L, rest);
        for (int64_t j = 0; j < direction.L; ++j) rest[j] -= residual * spread[j];
      }
      const A* start = workspace_.at<A>(s.start[d]);
      const A factor = A(coefficient * double(scalar(l, k_start_out + d)));
      s.terms.push_back({&direction, direction.inner_first ? rest : start, direction.inner_first ? start : rest, factor});
    }
  }

  void update_tile(int64_t l, int64_t tile, int thread) {
    const State<A>& s = states_[l];
    const int64_t begin = tile * s.tiling.rows_per_tile, end = std::min(row(l).p, begin + s.tiling.rows_per_tile);
    bool runs = false;
    for (const Term<A>& term : s.terms) {
      const bool narrow = term.direction->row_axis == 1 && term.direction->classes < 4 * kLanes<A>;
      runs = runs || (term.direction->row_axis != 0 && !narrow);
    }
    for (int64_t p = begin; p < end; ++p) {
      if (runs) {
        update_runs(l, p, thread);
      } else {
        update_row(l, p, thread);
      }
    }
    if (streaming_) stream_fence();
  }

  // A whole row; the coefficients of a narrow in-direction repeat with a pattern.
  void update_row(int64_t l, int64_t p, int thread) {
    const State<A>& s = states_[l];
    const int64_t L = s.direction[0].L;
    int nx = 0, ny = 0;
    A a[4];
    const A *x[4], *y[2], *pattern[2];
    int64_t length = L;
    for (const Term<A>& term : s.terms) {
      if (term.direction->row_axis == 0) {
        a[nx] = term.coefficient * term.slab[p];
        x[nx++] = term.spread;
        continue;
      }
      const int64_t classes = term.direction->classes;
      length = pattern_length<A>(classes);
      A* repeated = scratch(thread) + ny * length;
      for (int64_t c = 0; c < classes; ++c) repeated[c] = term.coefficient * term.slab[p * classes + c];
      repeat(repeated, classes, length, repeated);
      pattern[ny] = repeated;
      y[ny++] = term.spread;
    }
    write(l, p * L, L, thread, nx, ny, a, x, y, pattern, length);
  }

  // Run by run of R elements, in which every term is a number times consecutive numbers.
  void update_runs(int64_t l, int64_t p, int thread) {
    const State<A>& s = states_[l];
    const int64_t Q = row(l).q, R = row(l).r;
    for (int64_t q = 0; q < Q; ++q) {
      int nx = 0;
      A a[4];
      const A* x[4];
      for (const Term<A>& term : s.terms) {
        const int axis = term.direction->row_axis;
        a[nx] = term.coefficient * (axis == 0 ? term.slab[p] : axis == 1 ? term.spread[q * R] : term.slab[p * Q + q]);
        x[nx++] = axis == 1 ? term.slab + p * R : term.spread + q * R;
      }
      write(l, (p * Q + q) * R, R, thread, nx, 0, a, x, nullptr, nullptr, R);
    }
  }

  // n consecutive elements of dW. A gradient of another dtype than the weight's is first brought to accumulation dtype.
  void write(int64_t l, int64_t at, int64_t n, int thread, int nx, int ny, const A* a, const A* const* x,
             const A* const* y, const A* const* pattern, int64_t length) {
    T* out = static_cast<T*>(call_.grad_weights[l]) + at;
    const A m = scalar(l, k_multiplier);
    // Every vector of the row must be aligned: its first, and the first of each pattern.
    const bool streaming = streaming_ && aligned(out) && (length >= n || length % kLanes<A> == 0);
    if (call_.grad_dtype == call_.weight_dtype) {
      return update_any(nx, ny, static_cast<const T*>(call_.grads[l]) + at, out, n, m, a, x, y, pattern, length, streaming);
    }
    A* g = spread_scratch(thread, 0);
    with_dtype(call_.grad_dtype, [&](auto type) {
      using G = typename decltype(type)::type;
      const G* from = static_cast<const G*>(call_.grads[l]) + at;
      int64_t i = 0;
      for (; i + kLanes<A> <= n; i += kLanes<A>) store(g + i, load<A>(from + i));
      for (; i < n; ++i) g[i] = load_one<A>(from + i);
    });
    update_any(nx, ny, static_cast<const A*>(g), out, n, m, a, x, y, pattern, length, streaming);
  }

  const BackwardCall& call_;
  const int64_t layers_;
  int threads_ = 1;
  bool streaming_ = false;
  std::vector<State<A>> states_;
  std::vector<int64_t> order_;
  Workspace workspace_;
  int64_t row_length_ = 0, scratch_length_ = 0;
  Workspace::Pieces spread_scratch_, scratch_;
};

}  // namespace

void backward(const BackwardCall& call) {
  with_dtype(call.weight_dtype, [&](auto type) { Backward<typename decltype(type)::type>(call).run(); });
}

}  // namespace BSSN_ISA
}  // namespace bssn
