// What crosses from Python: the layer table, dtypes, and where things stand in `saved`. bssn_kernels/plan.py has the
// same names in the same order; a test asks the compiled library for its names and compares.
#pragma once

#include <cstdint>

#define BSSN_LAYER_FIELDS(X) \
  X(axis) X(p) X(q) X(r) X(directions) X(has_gain) X(norm_adds) X(through) X(vector_offset) X(scalar_offset)
#define BSSN_DIRECTION_FIELDS(X) X(row_axis) X(vu) X(rows) X(cols) X(outer) X(inner) X(start_offset)
#define BSSN_FLOAT_FIELDS(X) X(eps) X(weight_out) X(weight_in) X(floor) X(gain)
#define BSSN_SCALARS(X)                                                                                       \
  X(sigma) X(sigma_out) X(sigma_in) X(multiplier) X(slope_out) X(slope_in) X(slope_gain) X(start_out) X(start_in) \
  X(residual_out) X(residual_in)

namespace bssn {

// One direction of a layer. The weight is an array [p, q, r] in memory order; the rows of the direction's matrix are
// axis row_axis of it, and element (x, y) of the two other axes is column x * outer + y * inner.
struct DirectionRow {
#define BSSN_FIELD(name) int64_t name;
  BSSN_DIRECTION_FIELDS(BSSN_FIELD)
};

struct LayerRow {
  BSSN_LAYER_FIELDS(BSSN_FIELD)
#undef BSSN_FIELD
  DirectionRow direction[2];
#define BSSN_FIELD(name) double name;
  BSSN_FLOAT_FIELDS(BSSN_FIELD)
#undef BSSN_FIELD
};
static_assert(sizeof(LayerRow) == (10 + 2 * 7 + 5) * 8, "a row is a row of the table: eight bytes a field");

// Numbers of a layer at the end of `saved`, in this order.
enum Scalar : int {
#define BSSN_FIELD(name) k_##name,
  BSSN_SCALARS(BSSN_FIELD)
#undef BSSN_FIELD
  kScalars
};

enum class DType : int { f32, f64, bf16, f16 };

}  // namespace bssn
