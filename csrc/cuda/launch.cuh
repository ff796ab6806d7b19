// From a call to a launch: one place for device, stream, shared memory and errors.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "normalize.h"
#include "vectors.cuh"

namespace bssn {
namespace cuda {

// What a kernel is compiled for, as in sm_90. From sm_100 on the compiler works on pairs of numbers, which takes more
// registers, so fewer programs get more of them there.
#if defined(__CUDA_ARCH__)
constexpr int kArch = __CUDA_ARCH__ / 10;
#else
constexpr int kArch = 0;
#endif

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and must not be found by the next call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// A kernel and the shared memory of one of its programs.
struct Kernel {
  const void* entry;
  size_t shared;
};

// Makes a kernel ready on a device, the current one from here on; how many programs of it are resident there.
inline int prepare(const Kernel& kernel, int device) {
  check(cudaSetDevice(device), "cudaSetDevice");
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(kernel.entry, device);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  check(cudaFuncSetAttribute(kernel.entry, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kernel.shared)),
        "cudaFuncSetAttribute");
  check(cudaFuncSetAttribute(kernel.entry, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute");
  int per_processor = 0, processors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel.entry, kThreads, kernel.shared),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return known[key] = std::max(1, per_processor * processors);
}

// Fills part of a table of tensors.
struct Part {
  void** to;
  int n;
  void* at[kTensors];
};
static __global__ void fill_table(const __grid_constant__ Part part) {
  for (int i = int(threadIdx.x); i < part.n; i += int(blockDim.x)) part.to[i] = part.at[i];
}

// The tensors of a call as a parameter. More than kTensors are written to call.table, on the call's stream.
inline Tensors tensors_of(const Call& call) {
  Tensors tensors{};
  const size_t n = call.tensors.size();
  if (n <= size_t(kTensors)) {
    std::copy(call.tensors.begin(), call.tensors.end(), tensors.at);
    return tensors;
  }
  check(cudaSetDevice(call.device), "cudaSetDevice");
  for (size_t first = 0; first < n; first += kTensors) {
    Part part{};
    part.to = call.table + first;
    part.n = int(std::min(n - first, size_t(kTensors)));
    std::copy_n(call.tensors.begin() + std::ptrdiff_t(first), part.n, part.at);
    void* arguments[] = {&part};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(&fill_table), dim3(1), dim3(kTensors), arguments, 0,
                           static_cast<cudaStream_t>(call.stream)),
          "cudaLaunchKernel");
  }
  tensors.table = call.table;
  return tensors;
}

constexpr const char* kLaunching = "cudaLaunchKernel (an error of earlier work on this device is told here too)";

// `arguments` point to the kernel's parameters.
inline void start(const Kernel& kernel, const Call& call, void** arguments) {
  prepare(kernel, call.device);
  check(cudaLaunchKernel(kernel.entry, dim3(unsigned(call.launch.n_programs)), dim3(kThreads), arguments,
                         kernel.shared, static_cast<cudaStream_t>(call.stream)),
        kLaunching);
}

// The kernel that `f` gives for a value of the weights' type and for whether a layer has role 1.
template <class F>
Kernel kernel_for(DType dtype, bool both, F f) {
  auto typed = [&](auto type) { return both ? f(type, std::true_type()) : f(type, std::false_type()); };
  switch (dtype) {
    case DType::f64: return typed(double());
    case DType::bf16: return typed(bf16());
    case DType::f16: return typed(f16());
    default: return typed(float());
  }
}

}  // namespace cuda
}  // namespace bssn
