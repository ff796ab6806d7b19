// Where tiles leave their partial sums, and how those of classes are told apart.
#pragma once

#include "vectors.cuh"

namespace bssn {
namespace cuda {

// Where the partial slab of a tile begins for one of its rows.
template <class A>
BSSN_DEVICE A* inner_partial(const LaunchParams& launch, const Tile& tile, const Role& role, int e, const Place& place,
                             int row) {
  int r;
  const int q = Divider(place.r).divide(place.col0, r);
  const int64_t slot = e == 0 ? tile.slot0 : tile.slot1;
  return static_cast<A*>(launch.work) + role.inner_partial + slot * role.slab_size +
         (place.row0 + row) * role.raw_yp + q * role.raw_yq + r * role.raw_yr;
}

// Where the partial spread of a tile begins for a chunk.
template <class A>
BSSN_DEVICE A* outer_partial(const LaunchParams& launch, const Tile& tile, const Role& role, int e, const Place& place,
                             int chunk) {
  const int64_t slot = e == 0 ? tile.slot0 : tile.slot1;
  return static_cast<A*>(launch.work) + role.outer_partial + slot * place.l + (place.col0 + chunk * place.step);
}

// Partial sums of a row of role 1, by class: lanes add up the columns of a class in parts, then the parts.
template <class A>
BSSN_DEVICE void store_classes(const A* columns, int width, int modulus, A* scratch, A* out) {
  if (modulus == 0) {
    for (int b = lane(); b < width; b += 32) out[b] = columns[b];
    return;
  }
  const int parts = modulus < 32 ? 32 / modulus : 1;
  for (int first = 0; first < modulus; first += 32) {
    const int c = modulus < 32 ? lane() % modulus : first + lane(), part = modulus < 32 ? lane() / modulus : 0;
    A sum = 0;
    if (c < modulus && part < parts)
      for (int b = c + part * modulus; b < width; b += parts * modulus) sum += columns[b];
    if (parts > 1) {
      warp_barrier();
      scratch[lane()] = sum;
      warp_barrier();
      if (part == 0)
        for (int i = 1; i < parts; ++i) sum += scratch[i * modulus + c];
    }
    if (c < modulus && part == 0) out[c] = sum;
  }
}

}  // namespace cuda
}  // namespace bssn
