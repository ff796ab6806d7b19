#include "backward.cuh"

#include "launch.cuh"

namespace bssn {
namespace cuda {

// Programs an SM for which registers are handed out. Each has 24 KB on its way, so two keep an SM's share of HBM busy.
template <bool kBoth>
constexpr int kResident = kBoth || kArch >= 100 ? 2 : 3;

template <class T, bool kBoth>
__global__ void __launch_bounds__(kThreads, kResident<kBoth>)
    backward_kernel(const __grid_constant__ LaunchParams launch, const __grid_constant__ Tensors tensors,
                    const int n_layers) {
  backward_program<T, kBoth>(launch, tensors, n_layers);
}

void backward(const Call& call) {
  with_kernel(call.weight_dtype, call.both, [&](auto type, auto both) {
    using T = decltype(type);
    LaunchParams launch = call.launch;
    Tensors tensors = tensors_of(call);
    int n_layers = int(call.tensors.size() / 2);
    void* arguments[] = {&launch, &tensors, &n_layers};
    start(reinterpret_cast<const void*>(&backward_kernel<T, decltype(both)::value>),
          sizeof(Shared<T, decltype(both)::value>), call, arguments);
  });
}

int resident_backward(DType dtype, bool both, int device) {
  int programs = 0;
  with_kernel(dtype, both, [&](auto type, auto flag) {
    using T = decltype(type);
    check(cudaSetDevice(device), "cudaSetDevice");
    programs = prepare(reinterpret_cast<const void*>(&backward_kernel<T, decltype(flag)::value>),
                       sizeof(Shared<T, decltype(flag)::value>), device);
  });
  return programs;
}

}  // namespace cuda
}  // namespace bssn
