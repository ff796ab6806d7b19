// The forward kernel: power iterations, sigmas, multipliers, new vectors and W_bar of all layers in one launch.
//
// Reads and writes of full-size arrays, by phase. Numbers for biggan128 (23 layers, 352 MB of fp32: three layers of 85 MB,
// one of 42), at 4.3 TB/s from HBM and 8 TB/s from L2, of which 34 MB are counted on; a copy takes 164 us.
//
//   INNER  reads W once per iteration      352 MB, from HBM where it comes first           82 us
//   OUTER  reads W once per iteration      352 MB, from L2: 6 MB after INNER of its rows    44 us
//   SCALE  reads W, evict-first            352 MB, for three layers of 85 MB mostly HBM    60 us (34 MB of each from L2)
//          writes W_bar, evict-first       352 MB                                          82 us
//
// L2 and HBM traffic overlap, so HBM decides: W 1.6 to 1.7 times and W_bar once, 2.6 to 2.7 sets of weights against the
// copy's 2, that is 1.3 to 1.35 times the copy where nothing else counts; 1.0 to 1.15 for sets whose layers fit L2. About
// 10,000 tiles of 128 KB, each with five barriers or so and two atomics, and one dependency (0.9 us, and the sums of its
// block) per group of rows and two per layer. With 4 programs an SM 67 MB of tiles are in hand at once, so an OUTER tile,
// 6 MB behind its INNER, finds that one at work and waits for it; half of the programs then still have 6 MB on their way
// (24 KB each), twice what HBM's latency asks for. Whether smaller tiles or a longer way between the two do better is the
// first thing to measure. BSSN reads the same: its in-direction runs in the opposite order.
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

// W_bar = m W for a flat tile. Both are done with: what L2 should keep is what comes next.
template <class T, class O>
BSSN_DEVICE void scale_tile(const Tile& tile, const T* w, O* out, Accum<T> multiplier) {
  using A = Accum<T>;
  constexpr int n = 16 / int(sizeof(T) > sizeof(O) ? sizeof(T) : sizeof(O)), kAtOnce = 4;
  const int64_t start = int64_t(tile.row0) * kFlat;
  w += start, out += start;
  const int count = tile.rows, pieces = aligned(w) ? count / n : 0;
  for (int i = thread(); i < pieces; i += kAtOnce * kThreads) {
    A x[kAtOnce][n];
    BSSN_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      if (i + j * kThreads < pieces) load_numbers_once<T, n>(w + (i + j * kThreads) * n, x[j]);
    BSSN_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      if (i + j * kThreads < pieces) {
        BSSN_UNROLL
        for (int k = 0; k < n; ++k) x[j][k] *= multiplier;
        store_numbers_once<O, n>(out + (i + j * kThreads) * n, x[j]);
      }
  }
  for (int i = pieces * n + thread(); i < count; i += kThreads) out[i] = narrow<O>(multiplier * A(widen(w[i])));
}

// `outs`: room for W_bar of all layers.
template <class T, bool kBoth>
BSSN_DEVICE void forward_program(const LaunchParams& launch, const Tensors& outs) {
  using A = Accum<T>;
  auto& shared = *reinterpret_cast<Shared<T, kBoth>*>(shared_memory());
  every_ticket(launch, shared.tickets, [&](const Tile& tile) {
    if (tile.kind == kVectors) {
      await(launch.counters, tile.wait, tile.wait_target);
      write_vectors<T, kBoth>(launch, tile, shared);
    } else if (tile.kind == kScale) {
      await(launch.counters, tile.wait, tile.wait_target);
      const A multiplier = load_fresh(static_cast<const A*>(launch.saved) + launch.layers[tile.layer].scalars + k_multiplier);
      const T* w = reinterpret_cast<const T*>(launch.addresses[tile.layer].weight);
      void* out = tensor(outs, tile.layer);
      with_type(launch.other_dtype,
                [&](auto type) { scale_tile<T, decltype(type)>(tile, w, static_cast<decltype(type)*>(out), multiplier); });
    } else {
      product_tile<T, kBoth>(launch, tile, shared);
      arrive<T, kBoth>(
          launch, tile, true, shared, [](const Block&, const Layer&) {},
          [&](const Block& block, const Layer& layer) { finish_iteration<T, kBoth>(launch, block, layer, shared); });
    }
  });
}

}  // namespace cuda
}  // namespace bssn
