// The bridge: what bindings.cpp calls. Each instruction set has its own copy in a namespace of its name.
#pragma once

#include "tables.h"

namespace bssn {

// Pointers are to the first element of dense tensors; vectors, gains and saved are in accumulation dtype (double for
// double weights, else float). See ops.py for the meaning.
struct ForwardCall {
  const LayerRow* rows;
  int64_t layers;
  const void* const* weights;
  const void* const* vectors;  // two per direction, flat
  const void* const* gains;    // of the layers that have one
  const int64_t* iterations;
  void* const* outs;
  void* saved;
  DType weight_dtype, out_dtype;
  int threads;
};

struct BackwardCall {
  const LayerRow* rows;
  int64_t layers;            // how many layers get a gradient
  const int64_t* indices;    // which they are
  const void* const* grads;  // and so on, of these layers only
  const void* const* weights;
  const void* saved;
  void* const* grad_weights;
  void* grad_gains;
  DType weight_dtype, grad_dtype;
  int threads;
};

#define BSSN_DECLARE(isa)             \
  namespace isa {                     \
  void forward(const ForwardCall&);   \
  void backward(const BackwardCall&); \
  }
BSSN_DECLARE(plain)
BSSN_DECLARE(avx2)
BSSN_DECLARE(avx512)
#undef BSSN_DECLARE

}  // namespace bssn
