// A device played by the host, in the place of csrc/cuda/device.cuh: the kernels' own code runs, thread by thread.
//
// Every thread of a program is a coroutine; it runs until it comes to a barrier, an exchange in its warp, an atomic or a
// pause, and then any thread that may go on does, of any resident program, chosen at random. So what lacks a barrier, a
// wait or a place of its own gives wrong numbers for some seeds, and what waits for ever is reported. Shared memory and
// the target of an asynchronous copy hold NaN until they are written. Not modelled: caches and the order in which stores
// of one thread reach another, accesses beyond an allocation.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstring>

#define BSSN_DEVICE inline
#define BSSN_DEVICE_CALL
#define BSSN_UNROLL
#define BSSN_UNROLL_BY_4
#define BSSN_UNROLL_BY_8

namespace bssn {
namespace cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;

struct alignas(16) Bits16 {
  uint32_t x, y, z, w;
};
struct alignas(8) Bits8 {
  uint32_t x, y;
};
struct alignas(4) Bits4 {
  uint32_t x;
};

// ---- What the model does; see model.cpp

namespace model {
int thread();
char* shared_memory();
void barrier();
void warp_barrier();
// All lanes of the warp give 8 bytes, and get those of lane ^ mask.
uint64_t exchange(uint64_t mine, int mask);
void event();  // an atomic: others may come before or after
void pause();  // a wait that is not over
void copy(void* to, const void* from, bool there);
void commit();
void wait(int pending);
}  // namespace model

inline int thread() { return model::thread(); }
inline void barrier() { model::barrier(); }
inline void warp_barrier() { model::warp_barrier(); }
template <class A>
A shuffle_xor(A x, int mask) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  bits = model::exchange(bits, mask);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline char* shared_memory() { return model::shared_memory(); }

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float widen(f16 x) { return float(x); }
template <class T>
T narrow(double x) { return T(x); }
template <class T>
T narrow(float x) { return T(x); }
template <>
inline bf16 narrow<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return bf16{0x7fff};
  return bf16{uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline bf16 narrow<bf16>(double x) { return narrow<bf16>(float(x)); }
template <>
inline f16 narrow<f16>(double x) { return f16(float(x)); }

template <class A>
A multiply(A a, A b) { return a * b; }

inline int add_relaxed(int* counter, int n) {
  model::event();
  const int old = *counter;
  *counter = old + n;
  return old;
}
inline int add_acquire_release(int* counter, int n) { return add_relaxed(counter, n); }
inline int load_acquire(const int* counter) { return *counter; }
inline int load_relaxed(const int* counter) { return *counter; }
inline void pause() { model::pause(); }

template <class Bits>
Bits load_once(const Bits* p) { return *p; }
template <class Bits>
void store_once(Bits* p, Bits v) { *p = v; }
template <class A>
A load_fresh(const A* p) { return *p; }

constexpr bool kAsync = true;
inline void copy_async(Bits16* to, const Bits16* from, bool there) { model::copy(to, from, there); }
inline void copy_async_once(Bits16* to, const Bits16* from, bool there) { model::copy(to, from, there); }
inline void commit_copies() { model::commit(); }
template <int kPending>
void wait_copies() { model::wait(kPending); }

}  // namespace cuda
}  // namespace bssn
