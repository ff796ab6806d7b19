#include "forward.cuh"

#include "launch.cuh"

namespace bssn {
namespace cuda {

// As many programs an SM as shared memory lets reside on sm_90.
template <class T, bool kBoth, int kTensors>
__global__ void __launch_bounds__(kThreads, kBoth ? 3 : 4)
    forward_kernel(const __grid_constant__ LaunchParams launch, const __grid_constant__ Pointers<kTensors> outs) {
  forward_program<T, kBoth, kTensors>(launch, outs);
}

void forward(const Call& call) {
  with_kernel(call.weight_dtype, call.both, call.tensors.size(), [&](auto type, auto both, auto room) {
    using T = decltype(type);
    LaunchParams launch = call.launch;
    auto outs = pointers<decltype(room)::value>(call.tensors);
    void* arguments[] = {&launch, &outs};
    start(reinterpret_cast<const void*>(&forward_kernel<T, decltype(both)::value, decltype(room)::value>),
          sizeof(Shared<T, decltype(both)::value>), call, arguments);
  });
}

int resident_forward(DType dtype, bool both, int tensors, int device) {
  int programs = 0;
  with_kernel(dtype, both, size_t(tensors), [&](auto type, auto both, auto room) {
    using T = decltype(type);
    check(cudaSetDevice(device), "cudaSetDevice");
    programs = prepare(reinterpret_cast<const void*>(&forward_kernel<T, decltype(both)::value, decltype(room)::value>),
                       sizeof(Shared<T, decltype(both)::value>), device);
  });
  return programs;
}

int resident_backward(DType dtype, bool both, int tensors, int device);

int resident_programs(bool forward, DType dtype, bool both, int tensors, int device) {
  return forward ? resident_forward(dtype, both, tensors, device) : resident_backward(dtype, both, tensors, device);
}

std::string missing_code(int device) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&attributes,
                                  reinterpret_cast<const void*>(&forward_kernel<float, false, kFewTensors>));
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace bssn
