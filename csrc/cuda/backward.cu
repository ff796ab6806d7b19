#include "backward.cuh"

#include "launch.cuh"

namespace bssn {
namespace cuda {

// Programs an SM for which registers are handed out: as many as shared memory lets reside on sm_90, where
// registers do for so many.
template <class T, bool kBoth>
constexpr int kResident = kArch >= 100 ? 2 : kBoth || kArch != 90 || sizeof(T) == 8 ? 3 : 4;

template <class T, bool kBoth>
__global__ void __launch_bounds__(kThreads, kResident<T, kBoth>)
    backward_kernel(const __grid_constant__ LaunchParams launch, const __grid_constant__ Tensors tensors,
                    const int n_layers) {
  backward_program<T, kBoth>(launch, tensors, n_layers);
}

Kernel backward_for(DType dtype, bool both) {
  return kernel_for(dtype, both, [](auto type, auto flag) {
    using T = decltype(type);
    return Kernel{reinterpret_cast<const void*>(&backward_kernel<T, decltype(flag)::value>),
                  sizeof(Shared<T, decltype(flag)::value>)};
  });
}

void backward(const Call& call) {
  LaunchParams launch = call.launch;
  Tensors tensors = tensors_of(call);
  int n_layers = int(call.tensors.size() / 2);
  void* arguments[] = {&launch, &tensors, &n_layers};
  start(backward_for(call.weight_dtype, call.both), call, arguments);
}

}  // namespace cuda
}  // namespace bssn
