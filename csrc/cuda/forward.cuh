// The forward kernel: power iterations, sigmas, multipliers, new vectors and W_bar of all layers in one launch.
//
// Reads and writes of full-size arrays, by phase, of biggan128 (23 layers, 352 MB of fp32: three layers of 85 MB, one of 42):
//
//   INNER  reads W once per iteration      352 MB, from HBM where it comes first
//   OUTER  reads W once per iteration      352 MB, from L2 where it still is there
//   SCALE  reads W, evict-first            352 MB
//          writes W_bar, evict-first       352 MB
//
// Measured on an H200, with tiles of 110 KB and second products at least 15 us after the first ones: 0.42 ms against the
// 0.21 ms of a copy. HBM then gave 1,010 MB and took 330: hardly anything was found in L2, since 528 programs had 70 MB of
// tiles in hand, and 27 us passed from the first read of a row block to the first that may follow it, in which HBM moves
// twice what L2 holds. What the order of tiles did is that nobody waited meanwhile; before it did, the same kernel took
// 0.82 ms. A tile took 16 us, 6 of which are not streaming: its tables, the vectors into shared memory, and the count at
// its end. BSSN took 0.63 ms.
#pragma once

#include "../algebra.h"
#include "products.cuh"
#include "sums.cuh"

namespace bssn {
namespace cuda {

// The numbers of a layer that algebra.h asks for.
BSSN_DEVICE LayerRow layer_row(const Layer& layer, const Floats& floats) {
  LayerRow row{};
  row.norm_adds = layer.norm_adds, row.through = layer.through, row.has_gain = layer.has_gain;
  row.directions = layer.roles[0].exists + layer.roles[1].exists;
  row.eps = floats.eps, row.weight_out = floats.weight_out, row.weight_in = floats.weight_in;
  row.floor = floats.floor, row.gain = floats.gain;
  return row;
}

// The end of an iteration, from the norms of its raw products. The factors of the new vectors go to the iteration's
// results; after the last one the layer's scalars are written.
template <class T, bool kBoth>
BSSN_DEVICE_CALL void finish_iteration(const LaunchParams& launch, const Block& block, const Layer& layer,
                                  Shared<T, kBoth>& shared) {
  using A = Accum<T>;
  double inner[2] = {0, 0}, outer[2] = {0, 0};
  BSSN_UNROLL
  for (int e = 0; e < 2; ++e) {
    const Role& role = layer.roles[e];
    if (!role.exists) continue;
    inner[e] = block_total(launch.doubles + role.inner_shares, int(role.inner_share_count), shared.sums);
    if (layer.iterated)
      outer[e] = block_total(launch.doubles + role.outer_shares, int(role.outer_share_count), shared.sums);
  }
  if (thread() != 0) return;
  const LayerRow row = layer_row(layer, launch.floats[block.layer]);
  DirectionResult of_role[2];
  BSSN_UNROLL
  for (int e = 0; e < 2; ++e) {
    const Role& role = layer.roles[e];
    if (!role.exists) continue;
    if (!layer.iterated) {
      of_role[e].sigma = inner[e];
      continue;
    }
    const double first = sqrt(role.inner_first ? inner[e] : outer[e]);
    const double second = sqrt(role.inner_first ? outer[e] : inner[e]);
    of_role[e] = finish_direction(first, second, row);
    double* at = launch.doubles + role.results + kResults * block.parity;
    at[0] = of_role[e].first_scale, at[1] = of_role[e].second_scale, at[2] = of_role[e].usable ? 1.0 : 0.0;
  }
  const bool exchanged = layer.roles[0].exists ? layer.roles[0].direction == 1 : layer.roles[1].direction == 0;
  const DirectionResult results[2] = {exchanged ? of_role[1] : of_role[0], exchanged ? of_role[0] : of_role[1]};
  if (!block.final) return;
  const void* gains = reinterpret_cast<const void*>(launch.addresses[block.layer].gain);
  const double gain = layer.has_gain ? number_at<double>(gains, launch.gain_dtype, 0) : 1.0;
  finish_layer(row, results, layer.iterated != 0, gain, static_cast<A*>(launch.saved) + layer.scalars);
}

// New vectors into `saved`; after a zero or non-finite iteration the stored ones, or ones / sqrt(n).
template <class T, bool kBoth>
BSSN_DEVICE_CALL void write_vectors(const LaunchParams& launch, const Tile& tile, Shared<T, kBoth>& shared) {
  using A = Accum<T>;
  for (int i = tile.row0; i < tile.row0 + tile.rows; ++i) {
    const VectorPart& part = launch.vectors[i];
    const Address& address = launch.addresses[part.layer];
    const void* old = reinterpret_cast<const void*>(reinterpret_cast<const uint64_t*>(&address)[part.address]);
    const A* raw = static_cast<const A*>(launch.work) + part.raw;
    A* to = static_cast<A*>(launch.saved) + part.saved;
    double scale = 0, fallback = 0;
    bool fresh = false, usable = true;
    if (!part.copy) {
      scale = load_fresh(launch.doubles + part.scale);
      fresh = part.start || load_fresh(launch.doubles + part.ok) != 0;
      if (!fresh) {
        double squares = 0;
        for (int64_t j = thread(); j < part.size; j += kThreads) {
          const double x = number_at<double>(old, launch.vector_dtype, j);
          squares += x * x;
        }
        squares = block_sum(squares, shared.sums);
        usable = squares - squares == 0 && squares > 0;
        fallback = 1.0 / sqrt(double(part.size));
      }
    }
    for (int64_t e = part.begin + thread(); e < part.begin + part.count; e += kThreads) {
      const int64_t at = e / part.divisor * part.high + e % part.divisor * part.low;
      to[at] = fresh    ? A(double(load_fresh(raw + e)) * scale)
               : usable ? number_at<A>(old, launch.vector_dtype, at)
                        : A(fallback);
    }
  }
}

// A part of a new vector from `saved` to where it is stored, by the whole program.
template <class A>
BSSN_DEVICE void store_part(const VectorPart& part, const Address* addresses, const void* saved) {
  const A* from = static_cast<const A*>(saved) + part.saved;
  A* to = reinterpret_cast<A*>(reinterpret_cast<const uint64_t*>(addresses + part.layer)[part.address]);
  for (int64_t e = part.begin + thread(); e < part.begin + part.count; e += kThreads) {
    const int64_t at = e / part.divisor * part.high + e % part.divisor * part.low;
    to[at] = from[at];
  }
}

// W_bar = m W for a flat tile. Both are done with: what L2 should keep is what comes next.
template <class T, class O>
BSSN_DEVICE void scale_tile(const Tile& tile, const T* w, O* out, Bits16* memory, const Accum<T>* factor) {
  using A = Accum<T>;
  constexpr int n = kLane<T>, kEach = kPieces<T>;
  const int64_t start = int64_t(tile.row0) * kFlat;
  w += start, out += start;
  const int count = tile.rows;
  const FlatSteps<T, kEach> flat(aligned(w) ? count / n : 0);
  Ring<T, true> ring(memory);
  auto fetch = [&](int step) {
    if (step < flat.steps)
      BSSN_UNROLL
      for (int j = 0; j < kEach; ++j) ring.fetch(j, w + flat.place(step, j), flat.there(step, j));
    ring.fetched();
  };
  for (int step = 0; step < kStages<T> - 1; ++step) fetch(step);
  const A multiplier = load_fresh(factor);
  for (int step = 0; step < flat.steps; ++step) {
    ring.arrived();
    BSSN_UNROLL
    for (int j = 0; j < kEach; ++j) {
      const int at = flat.place(step, j);
      A x[n];
      ring.get(j, w + at, flat.there(step, j), x);
      BSSN_UNROLL
      for (int k = 0; k < n; ++k) x[k] *= multiplier;
      if (flat.there(step, j)) store_numbers_once<O, n>(out + at, x);
    }
    ring.read();
    fetch(step + kStages<T> - 1);
  }
  for (int i = flat.pieces * n + thread(); i < count; i += kThreads) out[i] = narrow<O>(multiplier * A(widen(w[i])));
}

// `outs`: room for W_bar of all layers.
template <class T, bool kBoth>
BSSN_DEVICE void forward_program(const LaunchParams& launch, const Tensors& outs) {
  using A = Accum<T>;
  auto& shared = *reinterpret_cast<Shared<T, kBoth>*>(shared_memory());
  every_ticket(launch, shared.tickets, [&](const Tile& tile, auto over) {
    if (tile.kind == kVectors) {
      write_vectors<T, kBoth>(launch, tile, shared);
    } else if (tile.kind == kScale) {
      const A* multiplier = static_cast<const A*>(launch.saved) + launch.layers[tile.layer].scalars + k_multiplier;
      const T* w = reinterpret_cast<const T*>(launch.addresses[tile.layer].weight);
      void* out = tensor(outs, tile.layer);
      with_type(launch.other_dtype, [&](auto type) {
        scale_tile<T>(tile, w, static_cast<decltype(type)*>(out), shared.ring, multiplier);
      });
      over();
    } else {
      const Arrival arrival(launch, tile);
      product_tile<T, kBoth>(launch, tile, shared);
      over();
      arrive<T, kBoth>(
          launch, tile, arrival, true, shared, [](const Block&, const Layer&) {},
          [&](const Block& block, const Layer& layer) { finish_iteration<T, kBoth>(launch, block, layer, shared); });
    }
  });
}

}  // namespace cuda
}  // namespace bssn
