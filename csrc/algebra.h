// The mathematics of one layer once its products are known, in double: norms to sigmas, sigmas to the multiplier and
// its derivatives. The counterpart of bssn_kernels/algebra.py; host and device share it.
#pragma once

#include <cmath>

#include "tables.h"

#if defined(__CUDACC__)
#define BSSN_HOST_DEVICE __host__ __device__
#else
#define BSSN_HOST_DEVICE
#endif

namespace bssn {

// What a product of this norm is divided by.
BSSN_HOST_DEVICE static inline double denominator(double norm, const LayerRow& row) {
  return row.norm_adds ? norm + row.eps : (norm < row.eps ? row.eps : norm);
}

BSSN_HOST_DEVICE static inline double denominator_slope(double norm, const LayerRow& row) {
  return row.norm_adds || norm > row.eps ? 1.0 : 0.0;
}

// One direction after its last iteration. `first` and `second` are the norms of its two products, the second one
// made from the first one unnormalized.
struct DirectionResult {
  double sigma = 0;          // u^T M v
  double first_scale = 0;    // raw first product -> unit vector
  double second_scale = 0;   // raw second product -> unit vector
  double alpha = 1;          // d sigma = alpha (u v^T + start r^T), r = M^T u - residual v (order vu; uv mirrors it)
  double start = 0;
  double residual = 0;
  bool usable = false;       // neither zero nor non-finite: the new vectors may be stored
};

BSSN_HOST_DEVICE static inline DirectionResult finish_direction(double first, double second, const LayerRow& row) {
  DirectionResult result;
  const double den_first = denominator(first, row);
  const double norm = second / den_first;
  const double den_second = denominator(norm, row);
  result.sigma = norm * (norm / den_second);
  result.first_scale = 1.0 / den_first;
  result.second_scale = 1.0 / den_first / den_second;
  if (row.through) {
    result.alpha = 2.0 - norm * denominator_slope(norm, row) / den_second;
    result.start = 1.0 / den_first;
    result.residual = result.sigma * denominator_slope(first, row) * den_first / first;
  }
  result.usable = std::isfinite(result.sigma) && result.sigma != 0.0;
  return result;
}

// Fills the SCALARS of a layer. Without an iteration (`iterated` false) a zero sigma keeps its slope: it is a product
// of stored vectors, not a collapsed iteration.
template <class A>
BSSN_HOST_DEVICE static inline void finish_layer(const LayerRow& row, const DirectionResult* directions, bool iterated,
                                                 double learnable_gain, A* scalars) {
  const double weights[2] = {row.weight_out, row.weight_in};
  double mean = 0;
  // Loops to a constant are unrolled, and a device keeps the directions in registers.
  for (int d = 0; d < 2; ++d)
    if (d < row.directions) mean += weights[d] * directions[d].sigma;
  const bool below = row.floor > 0 && mean <= row.floor;
  const double divisor = below ? row.floor : mean;
  const bool zero = divisor == 0;
  const double fixed = zero ? row.gain : row.gain / divisor;
  const double multiplier = row.has_gain ? fixed * learnable_gain : fixed;
  const double slope = zero || below ? 0.0 : -multiplier / divisor;
  for (int i = 0; i < kScalars; ++i) scalars[i] = A(0);
  scalars[k_sigma] = A(mean);
  scalars[k_multiplier] = A(multiplier);
  scalars[k_slope_gain] = A(fixed);
  for (int d = 0; d < 2; ++d) {
    if (d >= row.directions) break;
    const DirectionResult& one = directions[d];
    scalars[k_sigma_out + d] = A(one.sigma);
    scalars[k_slope_out + d] = A(iterated && one.sigma == 0 ? 0.0 : slope * weights[d] * one.alpha);
    scalars[k_start_out + d] = A(one.start);
    scalars[k_residual_out + d] = A(one.residual);
  }
}

}  // namespace bssn
