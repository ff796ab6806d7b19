// What the bindings ask of the kernels. No CUDA header, so that a host compiler reads it.
#pragma once

#include <string>
#include <vector>

#include "records.h"

namespace bssn {
namespace cuda {

struct Call {
  LaunchParams launch;
  std::vector<void*> tensors;  // forward: W_bar of all layers; backward: all gradients, then all dW
  void** table;                // room for more than kTensors of them on the device
  DType weight_dtype;
  bool both;  // whether a layer has role 1
  int device;
  void* stream;
};

// The new vectors of a forward, from `saved` to where they are stored, in accumulation dtype.
struct StoreCall {
  const VectorPart* parts;  // those of the forward, without the starts of iterations
  int n;
  const Address* addresses;
  const void* saved;
  bool wide;  // float64
  int device;
  void* stream;
};

// One launch each. Errors are std::runtime_error, in the words of CUDA.
void forward(const Call& call);
void backward(const Call& call);
void store(const StoreCall& call);

// How many programs are resident at once: what launch.n_programs should be at most.
int resident_programs(bool forward, DType weight_dtype, bool both, int device);

// Why there is no code that this device and its driver take; empty where there is.
std::string missing_code(int device);

}  // namespace cuda
}  // namespace bssn
