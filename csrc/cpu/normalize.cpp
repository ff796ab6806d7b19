// Forward: power iteration, sigmas, multiplier and W_bar of all layers of a group.
//
// Reads and writes of a layer: one reading per iteration for the products (two where its directions cannot share one,
// see Pass), one reading for the scale, one writing. The scale goes over the tiles of the products, each by the thread
// that read it and the last one first, and finds in that thread's cache what is still there. Nothing is normalized
// between the two products of an iteration: the second is made from the first as it is, and norms are applied to
// vectors afterwards.

#include <numeric>

#include "algebra.h"
#include "dispatch.h"
#include "kernels.h"
#include "products.h"
#include "schedule.h"

namespace bssn {
namespace BSSN_ISA {
namespace {

// In elements.
constexpr int64_t kScaleTile = 1 << 17;    // of the scale, where it has tiles of its own
constexpr int64_t kLongestTile = 1 << 20;  // of the products; no cache holds a longer one until the scale
constexpr int64_t kBlock = 1 << 13;        // the scale goes backwards in blocks of this
constexpr int64_t kAhead = 1 << 11;        // fetched ahead of a streaming write; 512 to 4,096 were alike

// One reading of a layer: in rows or in columns, which products of which direction, in which iteration.
struct Pass {
  bool columns = false;
  bool inner[2] = {}, outer[2] = {};
  int64_t iteration = 0;
};

template <class A>
struct State {
  Direction direction[2];
  Tiling tiling;
  std::vector<Pass> passes;
  // Offsets in the workspace.
  int64_t spread[2], slab[2], vector[2], partial[2], dots[2];
  // What the last iteration gave.
  DirectionResult result[2];
  A multiplier = 0;
};

// The passes that `iterations` iterations need.
std::vector<Pass> plan_passes(const LayerRow& row, const Direction* directions, const Tiling& tiling, int64_t iterations) {
  std::vector<Pass> passes;
  if (iterations == 0) {
    Pass pass;
    for (int d = 0; d < row.directions; ++d) pass.inner[d] = true;
    passes.push_back(pass);
  }
  for (int64_t i = 0; i < iterations; ++i) {
    Pass one, two;
    one.iteration = two.iteration = i;
    one.columns = tiling.col_tiles > 0;
    bool again = false;
    for (int d = 0; d < row.directions; ++d) {
      one.outer[d] = true;
      one.inner[d] = directions[d].inner_first || one.columns;
      two.inner[d] = !one.inner[d];
      again = again || two.inner[d];
    }
    passes.push_back(one);
    if (again) passes.push_back(two);
  }
  return passes;
}

template <class T>
class Forward {
  using A = Accumulation<T>;

 public:
  explicit Forward(const ForwardCall& call) : call_(call), layers_(call.layers), states_(call.layers) {}

  void run() {
    plan();
    workspace_.allocate();
    Schedule schedule(layers_);
    for (int64_t k = 0; k < layers_; ++k) {
      const int64_t l = order_[k];
      const State<A>& s = states_[l];
      schedule.add_stage(k, 1);
      for (const Pass& pass : s.passes)
        schedule.add_stage(k, pass.columns ? s.tiling.col_tiles : s.tiling.row_tiles, &pass != &s.passes.front());
      schedule.add_stage(k, ceil_div(elements(l), scale_tile(l)), scales_rows(l));
    }
    schedule.run(
        threads_, [&](int64_t k, int stage, int64_t tile, int thread) { tile_of(order_[k], stage, tile, thread); },
        [&](int64_t k, int stage, int) {
          if (stage > 0 && stage <= int(states_[order_[k]].passes.size())) combine(order_[k], stage - 1);
        });
    workspace_.check();
  }

 private:
  const LayerRow& row(int64_t l) const { return call_.rows[l]; }
  int64_t elements(int64_t l) const { return row(l).p * row(l).q * row(l).r; }
  const T* weight(int64_t l) const { return static_cast<const T*>(call_.weights[l]); }
  A* saved(int64_t offset) const { return static_cast<A*>(call_.saved) + offset; }

  // Stored u (which 0) or v (1) of a direction, and the place of the new one.
  const A* stored(int64_t l, int d, int which) const {
    return static_cast<const A*>(call_.vectors[first_vector_[l] + 2 * d + which]);
  }
  A* fresh(int64_t l, int d, int which) const {
    int64_t at = row(l).vector_offset;
    for (int e = 0; e < d; ++e) at += row(l).direction[e].rows + row(l).direction[e].cols;
    return saved(at + (which == 1 ? row(l).direction[d].rows : 0));
  }
  static int64_t size_of(const DirectionRow& d, int which) { return which == 0 ? d.rows : d.cols; }

  void plan() {
    int64_t vectors = 0, gains = 0, total = 0;
    for (int64_t l = 0; l < layers_; ++l) {
      State<A>& s = states_[l];
      first_vector_.push_back(vectors);
      gain_.push_back(row(l).has_gain ? gains++ : -1);
      vectors += 2 * row(l).directions;
      total += elements(l);
      s.tiling = tiling(row(l));
      for (int d = 0; d < row(l).directions; ++d) {
        s.direction[d] = Direction(row(l), row(l).direction[d]);
        row_length_ = std::max(row_length_, s.direction[d].L);
        if (call_.iterations[l] == 0) sums_length_ = std::max(sums_length_, 4 * s.direction[d].classes);
        scratch_length_ = std::max(scratch_length_, scratch_size<A>(s.direction[d]));
      }
      s.passes = plan_passes(row(l), s.direction, s.tiling, call_.iterations[l]);
      for (int d = 0; d < row(l).directions; ++d) reserve(s, d, call_.iterations[l] == 0);
    }
    threads_ = int(std::min<int64_t>(call_.threads, 1 + total / 32768));
    streaming_ = total * int64_t(sizeof(T)) >= kStreamBytes;
    order_.resize(layers_);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return elements(a) > elements(b); });
    spread_scratch_ = workspace_.template reserve<A>(row_length_, 2 * threads_);
    scratch_ = workspace_.template reserve<A>(scratch_length_, threads_);
    sums_ = workspace_.template reserve<A>(sums_length_, threads_);
  }

  void reserve(State<A>& s, int d, bool eval) {
    const Direction& direction = s.direction[d];
    s.spread[d] = workspace_.reserve<A>(direction.L);
    s.slab[d] = workspace_.reserve<A>(direction.slab_size());
    if (eval) {
      s.dots[d] = workspace_.reserve<double>(s.tiling.row_tiles);
      return;
    }
    s.vector[d] = workspace_.reserve<A>(direction.spread_size);
    s.partial[d] = s.tiling.col_tiles ? workspace_.reserve<A>(s.tiling.col_tiles * direction.slab_size())
                                      : workspace_.reserve<A>(s.tiling.row_tiles * direction.spread_size);
  }

  A* spread_scratch(int thread, int d) const { return workspace_.template at<A>(spread_scratch_, 2 * thread + d); }
  A* scratch(int thread) const { return workspace_.template at<A>(scratch_, thread); }
  // Inner products of four rows, which an evaluation does not keep: more numbers than a row has where channels are few.
  A* sums(int thread) const { return workspace_.template at<A>(sums_, thread); }

  void tile_of(int64_t l, int stage, int64_t tile, int thread) {
    const int passes = int(states_[l].passes.size());
    if (stage == 0) {
      prepare(l);
    } else if (stage > passes) {
      scale(l, tile);
    } else if (states_[l].passes[stage - 1].columns) {
      column_tile(l, tile, thread);
    } else {
      row_tile(l, states_[l].passes[stage - 1], tile, thread);
    }
  }

  // Brings the stored vectors into memory order.
  void prepare(int64_t l) {
    State<A>& s = states_[l];
    const int64_t iterations = call_.iterations[l];
    for (int d = 0; d < row(l).directions; ++d) {
      const Direction& direction = s.direction[d];
      const A* for_spread = stored(l, d, direction.spread_is_v());
      const A* for_slab = stored(l, d, !direction.spread_is_v());
      if (iterations == 0 || direction.inner_first) {
        A* spread = workspace_.at<A>(s.spread[d]);
        if (direction.row_axis == 0) {
          direction.each_spread([&](int64_t i, int64_t j) { spread[j] = for_spread[i]; });
        } else {
          expand_spread(direction, for_spread, 0, direction.L, spread);
        }
      }
      if (iterations == 0 || !direction.inner_first) {
        A* slab = workspace_.at<A>(s.slab[d]);
        direction.each_slab([&](int64_t i, int64_t j) { slab[j] = for_slab[i]; });
      }
      if (row(l).through && iterations <= 1) {
        const int which = row(l).direction[d].vu ? 0 : 1;
        std::copy_n(stored(l, d, which), size_of(row(l).direction[d], which), saved(row(l).direction[d].start_offset));
      }
    }
  }

  void row_tile(int64_t l, const Pass& pass, int64_t tile, int thread) {
    State<A>& s = states_[l];
    const int directions = int(row(l).directions);
    const int64_t begin = tile * s.tiling.rows_per_tile, end = std::min(row(l).p, begin + s.tiling.rows_per_tile);
    const int64_t L = s.direction[0].L;
    const bool eval = call_.iterations[l] == 0;
    double dots[2] = {};
    for (int d = 0; d < directions; ++d)
      if (pass.outer[d]) std::fill_n(spread_scratch(thread, d), L, A(0));
    in_fours(begin, end, [&](auto rows, int64_t p) {
      constexpr int N = decltype(rows)::value;
      const T* w = weight(l) + p * L;
      for (int d = 0; d < directions; ++d) {
        if (!pass.inner[d]) continue;
        const Direction& direction = s.direction[d];
        A* slab = workspace_.at<A>(s.slab[d]) + p * direction.classes;
        A* into = eval ? sums(thread) : slab;
        inner_rows<N>(direction, w, workspace_.at<A>(s.spread[d]), L, scratch(thread), into);
        if (eval)
          for (int64_t c = 0; c < N * direction.classes; ++c) dots[d] += double(into[c]) * double(slab[c]);
      }
      for (int d = 0; d < directions; ++d) {
        if (!pass.outer[d]) continue;
        const A* slab = workspace_.at<A>(s.slab[d]) + p * s.direction[d].classes;
        outer_rows<N>(s.direction[d], w, slab, L, scratch(thread), spread_scratch(thread, d));
      }
    });
    for (int d = 0; d < directions; ++d) {
      if (eval) workspace_.at<double>(s.dots[d])[tile] = dots[d];
      A* partial = workspace_.at<A>(s.partial[d]) + tile * s.direction[d].spread_size;
      if (pass.outer[d]) fold_spread(s.direction[d], spread_scratch(thread, d), 0, L, partial);
    }
  }

  void column_tile(int64_t l, int64_t tile, int thread) {
    State<A>& s = states_[l];
    const int directions = int(row(l).directions);
    const int64_t L = s.direction[0].L;
    const int64_t begin = tile * s.tiling.cols_per_tile, end = std::min(L, begin + s.tiling.cols_per_tile);
    for (int d = 0; d < directions; ++d) std::fill(spread_scratch(thread, d) + begin, spread_scratch(thread, d) + end, A(0));
    in_fours(0, row(l).p, [&](auto rows, int64_t p) {
      constexpr int N = decltype(rows)::value;
      for (int d = 0; d < directions; ++d) {
        const A* slab = workspace_.at<A>(s.slab[d]) + p * s.direction[d].classes;
        A* spread = spread_scratch(thread, d) + begin;
        outer_rows<N>(s.direction[d], weight(l) + p * L + begin, slab, end - begin, scratch(thread), spread);
      }
    });
    for (int d = 0; d < directions; ++d) {
      A* spread = spread_scratch(thread, d);
      fold_spread(s.direction[d], spread, begin, end, workspace_.at<A>(s.vector[d]));
      expand_spread(s.direction[d], workspace_.at<A>(s.vector[d]), begin, end, spread);
    }
    in_fours(0, row(l).p, [&](auto rows, int64_t p) {
      constexpr int N = decltype(rows)::value;
      for (int d = 0; d < directions; ++d) {
        const Direction& direction = s.direction[d];
        A* slab = workspace_.at<A>(s.partial[d]) + tile * direction.slab_size() + p * direction.classes;
        const A* spread = spread_scratch(thread, d) + begin;
        inner_rows<N>(direction, weight(l) + p * L + begin, spread, end - begin, scratch(thread), slab);
      }
    });
  }

  // Adds the tiles of a pass in their order; at the end of an iteration applies the norms, at the end of the last one
  // writes the state of the layer.
  void combine(int64_t l, int index) {
    State<A>& s = states_[l];
    const Pass& pass = s.passes[index];
    const int64_t iterations = call_.iterations[l];
    for (int d = 0; d < row(l).directions; ++d) {
      if (iterations == 0) {
        const double* dots = workspace_.at<double>(s.dots[d]);
        s.result[d].sigma = std::accumulate(dots, dots + s.tiling.row_tiles, 0.0);
        for (int which = 0; which < 2; ++which)
          std::copy_n(stored(l, d, which), size_of(row(l).direction[d], which), fresh(l, d, which));
        continue;
      }
      A *vector = workspace_.at<A>(s.vector[d]), *slab = workspace_.at<A>(s.slab[d]);
      const int64_t spread_size = s.direction[d].spread_size, slab_size = s.direction[d].slab_size();
      if (pass.columns) {
        add_tiles(workspace_.at<A>(s.partial[d]), s.tiling.col_tiles, slab_size, slab);
      } else if (pass.outer[d]) {
        add_tiles(workspace_.at<A>(s.partial[d]), s.tiling.row_tiles, spread_size, vector);
      }
      const bool inner_first = s.direction[d].inner_first;
      if (!pass.inner[d]) {  // the first half of an iteration that reads W twice
        expand_spread(s.direction[d], vector, 0, s.direction[d].L, workspace_.at<A>(s.spread[d]));
        continue;
      }
      const double spread_norm = std::sqrt(sum_of_squares(vector, spread_size));
      const double slab_norm = std::sqrt(sum_of_squares(slab, slab_size));
      s.result[d] = inner_first ? finish_direction(slab_norm, spread_norm, row(l))
                                : finish_direction(spread_norm, slab_norm, row(l));
      if (pass.iteration + 1 == iterations) {
        write_vectors(l, d);
      } else {
        next_iteration(l, d, pass.iteration + 2 == iterations);
      }
    }
    if (index + 1 == int(s.passes.size())) {
      const double gain = row(l).has_gain ? double(*static_cast<const A*>(call_.gains[gain_[l]])) : 1.0;
      A* scalars = saved(row(l).scalar_offset);
      finish_layer(row(l), s.result, iterations > 0, gain, scalars);
      s.multiplier = scalars[k_multiplier];
    }
  }

  // Normalizes the second product, from which the next iteration starts, and keeps it if the gradient needs it.
  void next_iteration(int64_t l, int d, bool last) {
    State<A>& s = states_[l];
    const Direction& direction = s.direction[d];
    const double scale = s.result[d].second_scale;
    A* start = row(l).through && last ? saved(row(l).direction[d].start_offset) : nullptr;
    if (direction.inner_first) {
      A* vector = workspace_.at<A>(s.vector[d]);
      for (int64_t i = 0; i < direction.spread_size; ++i) vector[i] = A(vector[i] * scale);
      expand_spread(direction, vector, 0, direction.L, workspace_.at<A>(s.spread[d]));
      if (start) direction.each_spread([&](int64_t i, int64_t j) { start[i] = vector[j]; });
    } else {
      A* slab = workspace_.at<A>(s.slab[d]);
      for (int64_t i = 0; i < direction.slab_size(); ++i) slab[i] = A(slab[i] * scale);
      if (start) direction.each_slab([&](int64_t i, int64_t j) { start[i] = slab[j]; });
    }
  }

  // The new u and v; after a zero or non-finite iteration the stored ones, or ones / sqrt(n) if those are no better.
  void write_vectors(int64_t l, int d) {
    State<A>& s = states_[l];
    const Direction& direction = s.direction[d];
    const DirectionResult& result = s.result[d];
    if (!result.usable) {
      for (int which = 0; which < 2; ++which) {
        const int64_t n = size_of(row(l).direction[d], which);
        const A* old = stored(l, d, which);
        const double norm2 = sum_of_squares(old, n);
        const bool good = norm2 > 0 && std::isfinite(norm2);
        for (int64_t i = 0; i < n; ++i) fresh(l, d, which)[i] = good ? old[i] : A(1.0 / std::sqrt(double(n)));
      }
      return;
    }
    const double spread_scale = direction.inner_first ? result.second_scale : result.first_scale;
    const double slab_scale = direction.inner_first ? result.first_scale : result.second_scale;
    const A *vector = workspace_.at<A>(s.vector[d]), *slab = workspace_.at<A>(s.slab[d]);
    A* to_spread = fresh(l, d, direction.spread_is_v());
    A* to_slab = fresh(l, d, !direction.spread_is_v());
    direction.each_spread([&](int64_t i, int64_t j) { to_spread[i] = A(vector[j] * spread_scale); });
    direction.each_slab([&](int64_t i, int64_t j) { to_slab[i] = A(slab[j] * slab_scale); });
  }

  int64_t row_tile_elements(int64_t l) const { return states_[l].tiling.rows_per_tile * states_[l].direction[0].L; }

  // Whether the scale goes over the tiles of the products again: where these are of whole rows, and not too long.
  bool scales_rows(int64_t l) const { return !states_[l].passes.back().columns && row_tile_elements(l) <= kLongestTile; }

  int64_t scale_tile(int64_t l) const { return scales_rows(l) ? row_tile_elements(l) : kScaleTile; }

  void scale(int64_t l, int64_t tile) {
    const int64_t begin = tile * scale_tile(l), end = std::min(begin + scale_tile(l), elements(l));
    with_dtype(call_.out_dtype, [&](auto type) {
      using O = typename decltype(type)::type;
      for (int64_t to = end; to > begin; to -= kBlock) {
        const int64_t from = std::max(begin, to - kBlock);
        scale_block(weight(l) + from, to - from, states_[l].multiplier, static_cast<O*>(call_.outs[l]) + from);
      }
    });
    if (streaming_) stream_fence();
  }

  template <class O>
  void scale_block(const T* w, int64_t n, A m, O* out) const {
    int64_t i = 0;
    if constexpr (std::is_same<A, O>::value) {
      if (streaming_) {
        for (; i < n && !aligned(out + i); ++i) store_one(out + i, load_one<A>(w + i) * m);
        for (; i + kLanes<A> <= n; i += kLanes<A>) {
          prefetch<kLanes<A>>(w + i + (i + kAhead < n ? kAhead : kAhead - 2 * kBlock));  // or in the block below
          stream(out + i, load<A>(w + i) * m);
        }
      }
    }
    for (; i + kLanes<A> <= n; i += kLanes<A>) store(out + i, load<A>(w + i) * m);
    for (; i < n; ++i) store_one(out + i, load_one<A>(w + i) * m);
  }

  const ForwardCall& call_;
  const int64_t layers_;
  int threads_ = 1;
  bool streaming_ = false;
  std::vector<State<A>> states_;
  std::vector<int64_t> first_vector_, gain_, order_;
  Workspace workspace_;
  int64_t row_length_ = 0, scratch_length_ = 0, sums_length_ = 0;
  Workspace::Pieces spread_scratch_, scratch_, sums_;
};

}  // namespace

void forward(const ForwardCall& call) {
  with_dtype(call.weight_dtype, [&](auto type) { Forward<typename decltype(type)::type>(call).run(); });
}

}  // namespace BSSN_ISA
}  // namespace bssn
