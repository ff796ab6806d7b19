#include "backward.cuh"

#include "launch.cuh"

namespace bssn {
namespace cuda {

template <class T, bool kBoth, int kTensors>
__global__ void __launch_bounds__(kThreads, kBoth ? 3 : 4)
    backward_kernel(const __grid_constant__ LaunchParams launch, const __grid_constant__ Pointers<kTensors> tensors,
                    const int n_layers) {
  backward_program<T, kBoth, kTensors>(launch, tensors, n_layers);
}

void backward(const Call& call) {
  with_kernel(call.weight_dtype, call.both, call.tensors.size(), [&](auto type, auto both, auto room) {
    using T = decltype(type);
    LaunchParams launch = call.launch;
    auto tensors = pointers<decltype(room)::value>(call.tensors);
    int n_layers = int(call.tensors.size() / 2);
    void* arguments[] = {&launch, &tensors, &n_layers};
    start(reinterpret_cast<const void*>(&backward_kernel<T, decltype(both)::value, decltype(room)::value>),
          sizeof(Shared<T, decltype(both)::value>), call, arguments);
  });
}

int resident_backward(DType dtype, bool both, int tensors, int device) {
  int programs = 0;
  with_kernel(dtype, both, size_t(tensors), [&](auto type, auto both, auto room) {
    using T = decltype(type);
    check(cudaSetDevice(device), "cudaSetDevice");
    programs = prepare(reinterpret_cast<const void*>(&backward_kernel<T, decltype(both)::value, decltype(room)::value>),
                       sizeof(Shared<T, decltype(both)::value>), device);
  });
  return programs;
}

}  // namespace cuda
}  // namespace bssn
