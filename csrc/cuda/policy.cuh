// How full-size arrays are read and written: 16 bytes at a time, several accesses on their way at once.
#pragma once

#include <cuda/device.cuh>

#include "../tables.h"
#include "records.h"

namespace bssn {
namespace cuda {

template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using Accum = typename Accumulation<T>::type;

template <class T>
struct Code;
template <>
struct Code<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct Code<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct Code<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct Code<f16> {
  static constexpr DType value = DType::f16;
};

// The shapes that _geometry.py cuts layers for.
template <class T>
constexpr int kLane = 16 / int(sizeof(T));  // numbers in 16 bytes
template <class T>
constexpr int kCols = sizeof(T) == 8 ? 128 : 256;  // of a chunk, at most
template <class T>
constexpr int kGroups = kCols<T> / kLane<T>;  // 16-byte pieces of a row of a chunk
template <class T>
constexpr int kPieces = 2 * kGroups<T> / 32;  // that a thread reads in one step
template <class T>
constexpr int kStages = 16 / kPieces<T>;  // 192 bytes a thread on their way, and 64 that are being read

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<16> {
  using type = Bits16;
};
template <>
struct BitsOf<8> {
  using type = Bits8;
};
template <>
struct BitsOf<4> {
  using type = Bits4;
};

// n numbers of type T as bits and back.
template <class T, int n>
union Pack {
  static constexpr int kBytes = n * int(sizeof(T)) < 16 ? n * int(sizeof(T)) : 16;
  static constexpr int kParts = n * int(sizeof(T)) / kBytes;
  using Bits = typename BitsOf<kBytes>::type;
  Bits bits[kParts];
  T numbers[n];
  BSSN_DEVICE Pack() {}
};

template <class T, int n, class A>
BSSN_DEVICE void widen_pack(const Pack<T, n>& pack, A* numbers) {
  BSSN_UNROLL
  for (int i = 0; i < n; ++i) numbers[i] = A(widen(pack.numbers[i]));
}

template <class T, int n, class A>
BSSN_DEVICE void load_numbers_once(const T* p, A* numbers) {
  Pack<T, n> pack;
  BSSN_UNROLL
  for (int i = 0; i < Pack<T, n>::kParts; ++i)
    pack.bits[i] = load_once(reinterpret_cast<const typename Pack<T, n>::Bits*>(p) + i);
  widen_pack(pack, numbers);
}

template <class T, int n, class A>
BSSN_DEVICE void load_numbers(const T* p, A* numbers) {
  Pack<T, n> pack;
  BSSN_UNROLL
  for (int i = 0; i < Pack<T, n>::kParts; ++i)
    pack.bits[i] = reinterpret_cast<const typename Pack<T, n>::Bits*>(p)[i];
  widen_pack(pack, numbers);
}

template <class T, int n, class A>
BSSN_DEVICE void store_numbers_once(T* p, const A* numbers) {
  Pack<T, n> pack;
  BSSN_UNROLL
  for (int i = 0; i < n; ++i) pack.numbers[i] = narrow<T>(numbers[i]);
  BSSN_UNROLL
  for (int i = 0; i < Pack<T, n>::kParts; ++i)
    store_once(reinterpret_cast<typename Pack<T, n>::Bits*>(p) + i, pack.bits[i]);
}

// One number of an array whose type is known when the program runs.
template <class A>
BSSN_DEVICE A number_at(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return A(static_cast<const double*>(p)[i]);
    case DType::bf16: return A(widen(static_cast<const bf16*>(p)[i]));
    case DType::f16: return A(widen(static_cast<const f16*>(p)[i]));
    default: return A(static_cast<const float*>(p)[i]);
  }
}

// Does `f` with a value of the array's type.
template <class F>
BSSN_DEVICE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f64: return f(double());
    case DType::bf16: return f(bf16());
    case DType::f16: return f(f16());
    default: return f(float());
  }
}

// float32 weights with results and gradients in half precision, as under autocast.
template <class T>
BSSN_DEVICE bool half_of(DType dtype) {
  return Code<T>::value == DType::f32 && (dtype == DType::bf16 || dtype == DType::f16);
}
template <class F>
BSSN_DEVICE void with_half(DType dtype, F f) {
  if (dtype == DType::bf16)
    f(bf16());
  else
    f(f16());
}

// Tensor i of a launch.
BSSN_DEVICE void* tensor(const Tensors& tensors, int i) { return tensors.table ? tensors.table[i] : tensors.at[i]; }

BSSN_DEVICE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Pieces of an array on their way to a thread, kStages steps of kEach each: every thread copies what it will read
// itself, so no barrier stands in a loop. On devices without asynchronous copies `get` reads them when they are needed.
//
// kOnce: of an array that this launch does not need again.
template <class T, bool kOnce, int kEach = kPieces<T>>
struct Ring {
  static constexpr int kSize = kStages<T> * kEach * kThreads;
  Bits16* slots;
  int writing = 0, reading = 0;

  BSSN_DEVICE explicit Ring(Bits16* memory) : slots(memory + thread()) {}

  BSSN_DEVICE void fetch(int piece, const T* p, bool there) {
    if (!kAsync) return;
    Bits16* to = slots + (writing * kEach + piece) * kThreads;
    const Bits16* from = reinterpret_cast<const Bits16*>(p);
    if (kOnce)
      copy_async_once(to, from, there);
    else
      copy_async(to, from, there);
  }
  // The step is on its way; of several rings that go in step the last one commits.
  BSSN_DEVICE void next() {
    if (++writing == kStages<T>) writing = 0;
  }
  BSSN_DEVICE void fetched() {
    commit_copies();
    next();
  }
  // Before a step's pieces are read.
  BSSN_DEVICE void arrived() { wait_copies<kStages<T> - 2>(); }
  // The kLane numbers at p, or zeros.
  template <class A>
  BSSN_DEVICE void get(int piece, const T* p, bool there, A* numbers) {
    Pack<T, kLane<T>> pack;
    if (kAsync)
      pack.bits[0] = slots[(reading * kEach + piece) * kThreads];
    else if (!there)
      pack.bits[0] = Bits16{0, 0, 0, 0};
    else
      pack.bits[0] = kOnce ? load_once(reinterpret_cast<const Bits16*>(p)) : *reinterpret_cast<const Bits16*>(p);
    widen_pack(pack, numbers);
  }
  BSSN_DEVICE void read() {
    if (++reading == kStages<T>) reading = 0;
  }
};

// A flat tile step by step: kEach pieces of 16 bytes for each thread in a step.
template <class T, int kEach>
struct FlatSteps {
  int pieces, steps;

  BSSN_DEVICE explicit FlatSteps(int pieces) : pieces(pieces), steps((pieces + kEach * kThreads - 1) / (kEach * kThreads)) {}
  BSSN_DEVICE int place(int step, int j) const { return ((step * kEach + j) * kThreads + thread()) * kLane<T>; }
  BSSN_DEVICE bool there(int step, int j) const { return place(step, j) < pieces * kLane<T>; }
};

}  // namespace cuda
}  // namespace bssn
