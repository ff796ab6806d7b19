#include "forward.cuh"

#include "launch.cuh"

namespace bssn {
namespace cuda {

// Programs an SM for which registers are handed out: as many as shared memory lets reside on sm_90, where registers do for
// so many. (On sm_120 shared memory has room for two at most.)
template <class T, bool kBoth>
constexpr int kResident = kArch >= 120 && sizeof(T) == 2 ? 2 : kArch != 90 || (kBoth && sizeof(T) == 8) ? 3 : 4;

template <class T, bool kBoth>
__global__ void __launch_bounds__(kThreads, kResident<T, kBoth>)
    forward_kernel(const __grid_constant__ LaunchParams launch, const __grid_constant__ Tensors outs) {
  forward_program<T, kBoth>(launch, outs);
}

static Kernel forward_for(DType dtype, bool both) {
  return kernel_for(dtype, both, [](auto type, auto flag) {
    using T = decltype(type);
    return Kernel{reinterpret_cast<const void*>(&forward_kernel<T, decltype(flag)::value>),
                  sizeof(Shared<T, decltype(flag)::value>)};
  });
}

void forward(const Call& call) {
  LaunchParams launch = call.launch;
  Tensors tensors = tensors_of(call);
  void* arguments[] = {&launch, &tensors};
  start(forward_for(call.weight_dtype, call.both), call, arguments);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    store_kernel(const VectorPart* parts, const Address* addresses, const void* saved) {
  store_part<A>(parts[blockIdx.x], addresses, saved);
}

void store(const StoreCall& call) {
  check(cudaSetDevice(call.device), "cudaSetDevice");
  const auto entry = call.wide ? &store_kernel<double> : &store_kernel<float>;
  StoreCall copy = call;
  void* arguments[] = {&copy.parts, &copy.addresses, &copy.saved};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(entry), dim3(unsigned(call.n)), dim3(kThreads), arguments, 0,
                         static_cast<cudaStream_t>(call.stream)),
        kLaunching);
}

Kernel backward_for(DType dtype, bool both);  // of backward.cu

int resident_programs(bool forward, DType dtype, bool both, int device) {
  const int programs = prepare(forward ? forward_for(dtype, both) : backward_for(dtype, both), device);
  // Kernels are loaded when they are used first, or asked for their attributes; a capture is no time for that.
  cudaFuncAttributes attributes;
  for (const void* entry : {reinterpret_cast<const void*>(&store_kernel<float>),
                            reinterpret_cast<const void*>(&store_kernel<double>)})
    check(cudaFuncGetAttributes(&attributes, entry), "cudaFuncGetAttributes");
  return programs;
}

std::string missing_code(int device) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&forward_kernel<float, false>));
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInsufficientDriver:
      cudaGetLastError();
      return std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
    default:
      check(error, "cudaFuncGetAttributes");
      return "";
  }
}

}  // namespace cuda
}  // namespace bssn
