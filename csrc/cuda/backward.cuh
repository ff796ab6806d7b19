// The backward kernel: dW and dgain of some layers in one launch.
//
// Reads and writes of full-size arrays, per layer: DOT reads G and W (W evict-first, G stays for UPDATE), UPDATE reads G
// again (from L2 where the layer fits) and writes dW, both evict-first; through the iteration INNER or OUTER read W once
// more, just after DOT. One dependency per layer. Measured on an H200, biggan128, 352 MB of fp32: 0.37 ms against the
// 0.24 ms of a three-stream op; HBM gives 1,030 MB and takes 326, so that G comes from there twice.
#pragma once

#include "products.cuh"
#include "sums.cuh"

namespace bssn {
namespace cuda {

// <G, W> of a flat tile, this thread's share. G is read again soon, W is not.
template <class T>
BSSN_DEVICE double dot_tile(const Tile& tile, const T* g, const T* w, Bits16* memory) {
  using A = Accum<T>;
  constexpr int n = kLane<T>, kEach = kPieces<T> / 2;
  const int64_t start = int64_t(tile.row0) * kFlat;
  g += start, w += start;
  const int count = tile.rows;
  const FlatSteps<T, kEach> flat(aligned(w) ? count / n : 0);
  Ring<T, true, kEach> of_w(memory);
  Ring<T, false, kEach> of_g(memory + Ring<T, true, kEach>::kSize);
  auto fetch = [&](int step) {
    if (step < flat.steps)
      BSSN_UNROLL
      for (int j = 0; j < kEach; ++j) {
        of_w.fetch(j, w + flat.place(step, j), flat.there(step, j));
        of_g.fetch(j, g + flat.place(step, j), flat.there(step, j));
      }
    of_w.next();
    of_g.fetched();
  };
  for (int step = 0; step < kStages<T> - 1; ++step) fetch(step);
  A sums[n] = {};
  for (int step = 0; step < flat.steps; ++step) {
    of_g.arrived();
    BSSN_UNROLL
    for (int j = 0; j < kEach; ++j) {
      const int at = flat.place(step, j);
      A x[n], y[n];
      of_w.get(j, w + at, flat.there(step, j), x);
      of_g.get(j, g + at, flat.there(step, j), y);
      BSSN_UNROLL
      for (int k = 0; k < n; ++k) sums[k] += x[k] * y[k];
    }
    of_w.read();
    of_g.read();
    fetch(step + kStages<T> - 1);
  }
  double sum = 0;
  BSSN_UNROLL
  for (int k = 0; k < n; ++k) sum += double(sums[k]);
  for (int i = flat.pieces * n + thread(); i < count; i += kThreads) sum += double(A(widen(w[i]))) * double(A(widen(g[i])));
  return sum;
}

// The same for float32 W and G in half precision, as under autocast.
template <class G>
BSSN_DEVICE double dot_tile_of_half(const Tile& tile, const G* g, const float* w) {
  constexpr int n = kLane<float>, kAtOnce = 4;
  const int64_t start = int64_t(tile.row0) * kFlat;
  g += start, w += start;
  const int count = tile.rows, pieces = aligned(w) ? count / n : 0;
  float sums[n] = {};
  for (int i = thread(); i < pieces; i += kAtOnce * kThreads) {
    float x[kAtOnce][n], y[kAtOnce][n];
    BSSN_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      if (i + j * kThreads < pieces) {
        load_numbers_once<float, n>(w + (i + j * kThreads) * n, x[j]);
        load_numbers<G, n>(g + (i + j * kThreads) * n, y[j]);
      }
    BSSN_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      if (i + j * kThreads < pieces)
        BSSN_UNROLL
        for (int k = 0; k < n; ++k) sums[k] += x[j][k] * y[j][k];
  }
  double sum = 0;
  BSSN_UNROLL
  for (int k = 0; k < n; ++k) sum += double(sums[k]);
  for (int i = pieces * n + thread(); i < count; i += kThreads) sum += double(w[i]) * double(widen(g[i]));
  return sum;
}

template <class T>
BSSN_DEVICE double dot_by_number(const Tile& tile, const void* g, DType dtype, const T* w) {
  const int64_t start = int64_t(tile.row0) * kFlat;
  double sum = 0;
  for (int i = thread(); i < tile.rows; i += kThreads)
    sum += double(widen(w[start + i])) * number_at<double>(g, dtype, start + i);
  return sum;
}

// What dW's rank terms need of a role: k (u v^T + start r^T), where r is its raw product less residual times its vector.
template <class A>
struct RankTerm {
  bool on, other;    // whether there is such a term, and its second half
  bool from_spread;  // the iteration started from the spread, so r is a slab; else the other way round
  A factor, start, residual;
  const A *spread, *slab, *start_vector, *raw;

  BSSN_DEVICE RankTerm(const LaunchParams& launch, const Layer& layer, const Role& role, double product) {
    const A* saved = static_cast<const A*>(launch.saved);
    const A* scalars = saved + layer.scalars;
    const A slope = scalars[k_slope_out + role.direction];
    on = role.exists && slope != A(0);
    factor = on ? A(product * double(slope)) : A(0);
    start = scalars[k_start_out + role.direction], residual = scalars[k_residual_out + role.direction];
    other = on && layer.through && start != A(0);
    from_spread = role.inner_first;
    spread = saved + role.saved_spread, slab = saved + role.saved_slab, start_vector = saved + role.saved_start;
    raw = static_cast<const A*>(launch.work) + (from_spread ? role.slab : role.spread);
  }

  // Of the spread side, at column (q, r): k times its vector, and what stands beside r or start across the rows.
  BSSN_DEVICE void of_spread(const Role& role, int q, int r, A& x, A& beside) const {
    const int64_t at = q * role.stored_xq + r * role.stored_xr;
    const A own = spread[at];
    x = factor * own;
    beside = 0;
    if (other)
      beside = factor * start *
               (from_spread ? start_vector[at] : load_fresh(raw + q * role.raw_xq + r * role.raw_xr) - residual * own);
  }
  BSSN_DEVICE A of_slab(const Role& role, int64_t p, int q, int r) const {
    return slab[p * role.stored_yp + q * role.stored_yq + r * role.stored_yr];
  }
  BSSN_DEVICE A beside_slab(const Role& role, int64_t p, int q, int r) const {
    const int64_t at = p * role.stored_yp + q * role.stored_yq + r * role.stored_yr;
    if (!from_spread) return start_vector[at];
    return load_fresh(raw + p * role.raw_yp + q * role.raw_yq + r * role.raw_yr) - residual * slab[at];
  }
};

// dW = m G + the rank terms, for some rows and chunks of columns. kSame: G has the type of W; otherwise it is in half
// precision, as under autocast, and is read when it is needed.
template <class T, bool kBoth, bool kSame>
BSSN_DEVICE void update_tile(const LaunchParams& launch, const Tile& tile, const void* grad, T* grad_weight,
                             Shared<T, kBoth>& shared) {
  using A = Accum<T>;
  constexpr int n = kLane<T>, kRoles = kBoth ? 2 : 1;
  const Layer& layer = launch.layers[tile.layer];
  const Place place(tile, layer);
  const int64_t base = place.row0 * place.l + place.col0;
  Walk<T, true, kSame> walk(place, static_cast<const T*>(grad) + base, shared.ring);

  const double product = load_fresh(launch.doubles + layer.dots);
  const A multiplier = static_cast<const A*>(launch.saved)[layer.scalars + k_multiplier];
  const RankTerm<A> terms[2] = {RankTerm<A>(launch, layer, layer.roles[0], product),
                                RankTerm<A>(launch, layer, layer.roles[kRoles - 1], product)};
  const bool on1 = kBoth && terms[1].on, both = terms[0].other || (kBoth && terms[1].other);
  const SlabLayout layouts[2] = {SlabLayout(layer.roles[0], place, terms[0].on),
                                 SlabLayout(layer.roles[1], place, on1)};
  static_assert(Shared<T, kBoth>::kStaged >= kStepRows<T> * 2 * (kBoth ? 1 + kCols<T> : 1), "room for a step");
  const SlabParts parts =
      SlabParts::of<kStepRows<T>, kRoles>(layouts, both ? 2 : 1, place, Shared<T, kBoth>::kStaged);
  A* staged[2][2];  // of each role: its slab, and what stands beside it
  const int sizes[2] = {layouts[0].per_row(parts.chunks) * parts.rows, layouts[1].per_row(parts.chunks) * parts.rows};
  staged[0][0] = shared.staged;
  staged[1][0] = staged[0][0] + sizes[0];
  staged[0][1] = staged[1][0] + sizes[1];
  staged[1][1] = staged[0][1] + sizes[0];
  int classes[n];
  if (kBoth) {
    BSSN_UNROLL
    for (int i = 0; i < n; ++i) classes[i] = layouts[1].class_of(walk.b + i);
  }
  const Divider divider(place.r);

  for (int chunk = 0; chunk < place.chunks; ++chunk) {
    A x[kRoles][n], beside[kRoles][n];
    BSSN_UNROLL
    for (int e = 0; e < kRoles; ++e)
      BSSN_UNROLL
      for (int i = 0; i < n; ++i) {
        x[e][i] = beside[e][i] = 0;
        if (terms[e].on && place.there(chunk, walk.b + i) > 0) {
          int r;
          const int q = divider.divide(place.col0 + chunk * place.step + walk.b + i, r);
          terms[e].of_spread(layer.roles[e], q, r, x[e][i], beside[e][i]);
        }
      }
    int staged_row0 = 0;
    const int staged_chunk0 = parts.chunks == 1 ? chunk : 0;
    for (int step = 0; step < walk.steps; ++step) {
      if (step * kStepRows<T> % parts.rows == 0 && (step > 0 || chunk == staged_chunk0)) {
        staged_row0 = step * kStepRows<T>;
        const int rows = place.rows - staged_row0 < parts.rows ? place.rows - staged_row0 : parts.rows;
        barrier();
        BSSN_UNROLL
        for (int e = 0; e < kRoles; ++e) {
          const Role& role = layer.roles[e];
          stage_slab<2>(layouts[e], place, staged_row0, rows, staged_chunk0, parts.chunks, staged[e][0], A(1),
                     [&](int64_t p, int q, int r) { return terms[e].of_slab(role, p, q, r); });
          if (both)
            stage_slab<2>(layouts[e], place, staged_row0, rows, staged_chunk0, parts.chunks, staged[e][1], A(1),
                       [&](int64_t p, int q, int r) { return terms[e].other ? terms[e].beside_slab(role, p, q, r) : A(0); });
        }
        barrier();
      }
      walk.ring.arrived();
      A all[kPieces<T>][n];
      if (kSame) {
        BSSN_UNROLL
        for (int j = 0; j < kPieces<T>; ++j) {
          const int row = walk.row_of(step, j);
          walk.ring.get(j, walk.base + walk.offset(row, chunk), walk.there(row, chunk), all[j]);
        }
      } else {
        with_half(launch.other_dtype, [&](auto type) {
          BSSN_UNROLL
          for (int j = 0; j < kPieces<T>; ++j) {
            const int row = walk.row_of(step, j);
            const auto* p = static_cast<const decltype(type)*>(grad) + base + walk.offset(row, chunk);
            if (walk.there(row, chunk)) load_numbers_once<decltype(type), n>(p, all[j]);
          }
        });
      }
      BSSN_UNROLL
      for (int j = 0; j < kPieces<T>; ++j) {
        const int row = walk.row_of(step, j);
        if (!walk.there(row, chunk)) continue;
        A* const g = all[j];
        BSSN_UNROLL
        for (int i = 0; i < n; ++i) g[i] = multiply(multiplier, g[i]);
        BSSN_UNROLL
        for (int e = 0; e < kRoles; ++e) {
          if (!(e ? on1 : terms[0].on)) continue;
          const int row_at = row - staged_row0;
          const int y_at = (layouts[e].by_chunk ? row_at * parts.chunks + chunk - staged_chunk0 : row_at) * layouts[e].classes;
          BSSN_UNROLL
          for (int i = 0; i < n; ++i) g[i] += x[e][i] * staged[e][0][y_at + (e ? classes[i] : 0)];
          if (both) {
            BSSN_UNROLL
            for (int i = 0; i < n; ++i) g[i] += beside[e][i] * staged[e][1][y_at + (e ? classes[i] : 0)];
          }
        }
        store_numbers_once<T, n>(grad_weight + base + walk.offset(row, chunk), g);
      }
      walk.ring.read();
      walk.fetch();
    }
  }
}

// The same number by number, for layers whose rows are not at multiples of 16 bytes and rare pairs of types.
template <class T, bool kBoth>
BSSN_DEVICE_CALL void update_by_number(const LaunchParams& launch, const Tile& tile, const void* grad, T* grad_weight) {
  using A = Accum<T>;
  const Layer& layer = launch.layers[tile.layer];
  const Place place(tile, layer);
  const double product = load_fresh(launch.doubles + layer.dots);
  const A multiplier = static_cast<const A*>(launch.saved)[layer.scalars + k_multiplier];
  const Divider divider(place.r);
  for (int chunk = 0; chunk < place.chunks; ++chunk)
    for (int i = thread(); i < place.rows * kCols<T>; i += kThreads) {
      const int row = i / kCols<T>, b = i % kCols<T>;
      if (place.there(chunk, b) <= 0) continue;
      const int column = place.col0 + chunk * place.step + b;
      const int64_t p = place.row0 + row, at = p * place.l + column;
      A sum = multiply(multiplier, number_at<A>(grad, launch.other_dtype, at));
      for (int e = 0; e < (kBoth ? 2 : 1); ++e) {
        const Role& role = layer.roles[e];
        const RankTerm<A> term(launch, layer, role, product);
        if (!term.on) continue;
        int r;
        const int q = divider.divide(column, r);
        A x, beside;
        term.of_spread(role, q, r, x, beside);
        sum += x * term.of_slab(role, p, q, r);
        if (term.other) sum += beside * term.beside_slab(role, p, q, r);
      }
      grad_weight[at] = narrow<T>(sum);
    }
}

// `tensors`: the gradients of all layers, then room for their dW.
template <class T, bool kBoth>
BSSN_DEVICE void backward_program(const LaunchParams& launch, const Tensors& tensors, int n_layers) {
  using A = Accum<T>;
  auto& shared = *reinterpret_cast<Shared<T, kBoth>*>(shared_memory());
  every_ticket(launch, shared.tickets, [&](const Tile& tile, auto over) {
    const Layer& layer = launch.layers[tile.layer];
    const void* grad = tensor(tensors, tile.layer);
    if (tile.kind == kUpdate) {
      T* out = static_cast<T*>(tensor(tensors, n_layers + tile.layer));
      if (layer.aligned && launch.other_dtype == Code<T>::value)
        update_tile<T, kBoth, true>(launch, tile, grad, out, shared);
      else if (layer.aligned && half_of<T>(launch.other_dtype))
        update_tile<T, kBoth, Code<T>::value != DType::f32>(launch, tile, grad, out, shared);
      else
        update_by_number<T, kBoth>(launch, tile, grad, out);
      over();
      return;
    }
    const Arrival arrival(launch, tile);
    if (tile.kind == kDot) {
      const T* w = reinterpret_cast<const T*>(launch.addresses[tile.layer].weight);
      double share = 0;
      if (launch.other_dtype == Code<T>::value)
        share = dot_tile(tile, static_cast<const T*>(grad), w, shared.ring);
      else if (half_of<T>(launch.other_dtype))
        with_half(launch.other_dtype, [&](auto type) {
          share = dot_tile_of_half(tile, static_cast<const decltype(type)*>(grad), reinterpret_cast<const float*>(w));
        });
      else
        share = dot_by_number<T>(tile, grad, launch.other_dtype, w);
      share = block_sum(share, shared.sums);
      if (thread() == 0) launch.doubles[layer.dots + 1 + tile.slot0] = share;
    } else {
      product_tile<T, kBoth>(launch, tile, shared);
    }
    over();
    arrive<T, kBoth>(
        launch, tile, arrival, false, shared,
        [&](const Block& block, const Layer& layer) {
          if (block.kind != kDot) return;
          const double product = block_total(launch.doubles + layer.dots + 1, int(layer.dot_count), shared.sums);
          if (thread() != 0) return;
          launch.doubles[layer.dots] = product;
          const double slope = static_cast<const A*>(launch.saved)[layer.scalars + k_slope_gain];
          static_cast<A*>(launch.grad_gains)[tile.layer] = A(product * slope);
        },
        [](const Block&, const Layer&) {});
  });
}

}  // namespace cuda
}  // namespace bssn
