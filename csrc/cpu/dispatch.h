// From dtypes known at run time to types.
#pragma once

#include "vec.h"
#include "tables.h"

namespace bssn {
namespace BSSN_ISA {

template <class T>
struct Type {
  using type = T;
};

template <class F>
static inline void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(Type<float>{});
    case DType::f64: return f(Type<double>{});
    case DType::bf16: return f(Type<bf16>{});
    case DType::f16: return f(Type<f16>{});
  }
}

// Products, sums and state: double for double weights, else float.
template <class T>
using Accumulation = std::conditional_t<std::is_same<T, double>::value, double, float>;

}  // namespace BSSN_ISA
}  // namespace bssn
