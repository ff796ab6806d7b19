// From a call to a launch: one place for device, stream, shared memory and errors.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "normalize.h"
#include "products.cuh"

namespace bssn {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and must not be found by the next call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// Makes a kernel ready on the current device; how many programs of it are resident there.
inline int prepare(const void* kernel, size_t shared, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(kernel, device);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
        "cudaFuncSetAttribute");
  int per_processor = 0, processors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, shared),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return known[key] = std::max(1, per_processor * processors);
}

template <int n>
Pointers<n> pointers(const std::vector<void*>& tensors) {
  if (tensors.size() > size_t(n))
    throw std::runtime_error("expected at most " + std::to_string(n) + " tensors, got " + std::to_string(tensors.size()));
  Pointers<n> all{};
  std::copy(tensors.begin(), tensors.end(), all.at);
  return all;
}

// `arguments` point to the kernel's parameters.
inline void start(const void* kernel, size_t shared, const Call& call, void** arguments) {
  check(cudaSetDevice(call.device), "cudaSetDevice");
  prepare(kernel, shared, call.device);
  check(cudaLaunchKernel(kernel, dim3(unsigned(call.launch.n_programs)), dim3(kThreads), arguments, shared,
                         static_cast<cudaStream_t>(call.stream)),
        "cudaLaunchKernel");
}

// Does `f` with a value of the weights' type, with whether a layer has role 1, and with room for the tensors.
template <int n>
struct Room {
  static constexpr int value = n;
};
template <bool b>
struct Flag {
  static constexpr bool value = b;
};
template <class F>
void with_kernel(DType dtype, bool both, size_t tensors, F f) {
  auto typed = [&](auto type) {
    if (tensors > size_t(kFewTensors))
      f(type, Flag<true>(), Room<kManyTensors>());  // rare, so not in every version
    else if (both)
      f(type, Flag<true>(), Room<kFewTensors>());
    else
      f(type, Flag<false>(), Room<kFewTensors>());
  };
  switch (dtype) {
    case DType::f64: return typed(double());
    case DType::bf16: return typed(bf16());
    case DType::f16: return typed(f16());
    default: return typed(float());
  }
}

}  // namespace cuda
}  // namespace bssn
