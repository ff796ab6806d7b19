// The tables that a launch works by, as bssn_kernels/backends/_tables.py names their columns; the loader compares names.
#pragma once

#include <cstdint>

#include "../tables.h"

#define BSSN_TILE_FIELDS(X)                                                                                       \
  X(kind) X(layer) X(row0) X(rows) X(col0) X(chunks) X(step) X(width) X(end) X(slot0) X(slot1) X(wait)            \
  X(wait_target) X(block) X(mask) X(source)
#define BSSN_BLOCK_FIELDS(X)                                                                                      \
  X(kind) X(layer) X(counter) X(arrivals) X(then) X(then_target) X(done) X(batch) X(mask) X(parity) X(start0)     \
  X(count0) X(segments) X(start1) X(count1) X(share) X(final) X(dot)
#define BSSN_SHAPE_FIELDS(X)                                                                                      \
  X(p) X(l) X(r) X(numel) X(aligned) X(scalars) X(has_gain) X(norm_adds) X(through) X(iterated) X(dots) X(dot_count)
#define BSSN_ROLE_FIELDS(X)                                                                                       \
  X(exists) X(direction) X(inner_first) X(stored_xq) X(stored_xr) X(stored_yp) X(stored_yq) X(stored_yr)          \
  X(raw_xq) X(raw_xr) X(raw_yp) X(raw_yq) X(raw_yr) X(modulus) X(fold) X(fold_stride) X(entry_stride)             \
  X(slab_size) X(inner_slots) X(inner_partial) X(outer_slots) X(outer_partial) X(slab) X(slab_odd) X(spread)      \
  X(spread_odd) X(inner_shares) X(inner_share_count) X(outer_shares) X(outer_share_count) X(results)              \
  X(saved_spread) X(saved_slab) X(saved_start)
#define BSSN_VECTOR_FIELDS(X)                                                                                     \
  X(layer) X(address) X(raw) X(scale) X(ok) X(copy) X(start) X(saved) X(divisor) X(high) X(low) X(begin) X(count) \
  X(size)
#define BSSN_ADDRESSES(X) X(weight) X(spread0) X(slab0) X(spread1) X(slab1) X(gain)

namespace bssn {
namespace cuda {

#define BSSN_FIELD(name) int32_t name;
struct alignas(16) Tile {
  BSSN_TILE_FIELDS(BSSN_FIELD)
};
struct Block {
  BSSN_BLOCK_FIELDS(BSSN_FIELD)
};
#undef BSSN_FIELD
static_assert(sizeof(Tile) == 64, "a tile is read in 16-byte pieces");

#define BSSN_FIELD(name) int64_t name;
struct Role {
  BSSN_ROLE_FIELDS(BSSN_FIELD)
};
struct Layer {
  BSSN_SHAPE_FIELDS(BSSN_FIELD)
  Role roles[2];
};
struct VectorPart {
  BSSN_VECTOR_FIELDS(BSSN_FIELD)
};
#undef BSSN_FIELD

// Where the tensors of a layer stand, as absolute addresses.
struct Address {
#define BSSN_FIELD(name) uint64_t name;
  BSSN_ADDRESSES(BSSN_FIELD)
#undef BSSN_FIELD
};

struct Floats {
  double eps, weight_out, weight_in, floor, gain;
};

enum Kind : int { kInner, kOuter, kVectors, kScale, kDot, kUpdate };
// Where a product reads its vector: as stored, a raw vector of the workspace (of one of two alternating copies), the
// same times the scale of its iteration, or the vectors in `saved`.
enum Source : int { kStored = 0, kRaw = 1, kScaled = 3, kSaved = 5 };

// What both kernels get: tables, buffers, numbers.
struct LaunchParams {
  const Tile* tiles;
  const Block* blocks;
  const Layer* layers;
  const VectorPart* vectors;
  const Floats* floats;
  const Address* addresses;
  void* saved;  // accumulation dtype, as `work` and `grad_gains`
  void* work;
  double* doubles;
  void* grad_gains;
  int* counters;
  int32_t n_tiles, n_programs, n_counters;
  int32_t ahead;  // whether the next ticket is drawn when a tile begins
  DType other_dtype, vector_dtype, gain_dtype;  // of W_bar or its gradient, of stored vectors, of gains
};

// Tensors that move from call to call are parameters of the launch: nothing is copied to the device for them. What has no
// room in the 4 KB that every launch has stands in a table, which small launches before it fill, again from parameters.
constexpr int kTensors = 448;

struct Tensors {
  void* const* table;  // of all, or null
  void* at[kTensors];
};

constexpr int kCounterStride = 8;  // counters are 32 bytes apart, or those who poll one slow those who raise its neighbour
constexpr int kFlat = 1024;        // flat tiles begin at multiples of this
constexpr int kResults = 3;        // of a direction and iteration: first_scale, second_scale, ok
constexpr int kMostChunks = 8;     // of an inner tile

}  // namespace cuda
}  // namespace bssn
