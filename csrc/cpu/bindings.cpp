// The Python module: addresses in, nothing out. The caller keeps every tensor alive over the call.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace py = pybind11;

namespace bssn {
namespace {

struct Isa {
  const char* name;
  void (*forward)(const ForwardCall&);
  void (*backward)(const BackwardCall&);
};

// Instruction sets that this build has and this processor knows, the best first.
const std::vector<Isa>& usable_isas() {
  static const std::vector<Isa> usable = [] {
    std::vector<Isa> isas;
#if defined(BSSN_HAVE_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      isas.push_back({"avx512", avx512::forward, avx512::backward});
#endif
#if defined(BSSN_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      isas.push_back({"avx2", avx2::forward, avx2::backward});
#endif
    isas.push_back({"plain", plain::forward, plain::backward});
    return isas;
  }();
  return usable;
}

using Addresses = std::vector<uintptr_t>;

template <class P>
P* as(Addresses& addresses) {
  static_assert(sizeof(P) == sizeof(uintptr_t), "an address is a pointer");
  return reinterpret_cast<P*>(addresses.data());
}

void forward(size_t isa, uintptr_t rows, Addresses weights, Addresses vectors, Addresses gains,
             const std::vector<int64_t>& iterations, Addresses outs, uintptr_t saved, int weight_dtype, int out_dtype,
             int threads) {
  const Isa& chosen = usable_isas().at(isa);
  ForwardCall call;
  call.rows = reinterpret_cast<const LayerRow*>(rows);
  call.layers = int64_t(weights.size());
  call.weights = as<const void*>(weights);
  call.vectors = as<const void*>(vectors);
  call.gains = as<const void*>(gains);
  call.iterations = iterations.data();
  call.outs = as<void*>(outs);
  call.saved = reinterpret_cast<void*>(saved);
  call.weight_dtype = DType(weight_dtype);
  call.out_dtype = DType(out_dtype);
  call.threads = threads;
  py::gil_scoped_release release;
  chosen.forward(call);
}

void backward(size_t isa, uintptr_t rows, const std::vector<int64_t>& indices, Addresses grads,
              Addresses weights, uintptr_t saved, Addresses grad_weights, uintptr_t grad_gains, int weight_dtype,
              int grad_dtype, int threads) {
  const Isa& chosen = usable_isas().at(isa);
  BackwardCall call;
  call.rows = reinterpret_cast<const LayerRow*>(rows);
  call.layers = int64_t(indices.size());
  call.indices = indices.data();
  call.grads = as<const void*>(grads);
  call.weights = as<const void*>(weights);
  call.saved = reinterpret_cast<const void*>(saved);
  call.grad_weights = as<void*>(grad_weights);
  call.grad_gains = reinterpret_cast<void*>(grad_gains);
  call.weight_dtype = DType(weight_dtype);
  call.grad_dtype = DType(grad_dtype);
  call.threads = threads;
  py::gil_scoped_release release;
  chosen.backward(call);
}

// The vectors that a forward left in `saved`, layer by layer, to where they are stored.
void store(uintptr_t rows, uintptr_t saved, size_t itemsize, const Addresses& stored) {
  const LayerRow* row = reinterpret_cast<const LayerRow*>(rows);
  const char* from = reinterpret_cast<const char*>(saved);
  for (size_t i = 0; i < stored.size(); ++row) {
    for (int d = 0; d < row->directions; ++d) {
      for (const int64_t n : {row->direction[d].rows, row->direction[d].cols}) {
        std::memcpy(reinterpret_cast<void*>(stored.at(i++)), from, size_t(n) * itemsize);
        from += size_t(n) * itemsize;
      }
    }
  }
}

// Asks for huge pages under fresh memory: first touching it costs more than all arithmetic.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = (address + page - 1) & ~(page - 1), end = (address + bytes) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : usable_isas()) names.push_back(isa.name);
  return names;
}

std::vector<std::string> field_names() {
  std::vector<std::string> names;
#define BSSN_NAME(name) names.push_back(#name);
  BSSN_LAYER_FIELDS(BSSN_NAME)
#undef BSSN_NAME
#define BSSN_NAME(name) names.push_back(std::string(#name) + side);
  for (const char* side : {"_out", "_in"}) {
    BSSN_DIRECTION_FIELDS(BSSN_NAME)
  }
#undef BSSN_NAME
#define BSSN_NAME(name) names.push_back(#name);
  BSSN_FLOAT_FIELDS(BSSN_NAME)
  return names;
}

std::vector<std::string> scalar_names() {
  std::vector<std::string> names;
  BSSN_SCALARS(BSSN_NAME)
#undef BSSN_NAME
  return names;
}

}  // namespace
}  // namespace bssn

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "Fused spectral normalization on the CPU; import torch first, whose OpenMP runtime it uses.";
  m.def("forward", &bssn::forward, "The instruction set is an index into isas().");
  m.def("backward", &bssn::backward);
  m.def("store", &bssn::store, "Of a group in which every layer stores its vectors.");
  m.def("advise_huge_pages", &bssn::advise_huge_pages);
  m.def("isas", &bssn::isa_names, "Instruction sets this build has and this processor knows, the best first.");
  m.def("fields", &bssn::field_names, "Columns of the layer table.");
  m.def("scalars", &bssn::scalar_names, "Per-layer numbers at the end of `saved`.");
}
