// What the kernels ask of a device: threads, barriers, atomics, 16-byte accesses with cache policies. The kernels use
// nothing of CUDA but this, so that the tests can run them on a host that plays a device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define BSSN_DEVICE __device__ __forceinline__
#define BSSN_DEVICE_CALL __device__ __noinline__
#define BSSN_UNROLL _Pragma("unroll")
#define BSSN_UNROLL_BY_4 _Pragma("unroll 4")
#define BSSN_UNROLL_BY_8 _Pragma("unroll 8")

namespace bssn {
namespace cuda {

constexpr int kThreads = 128;  // of a program
constexpr int kWarps = kThreads / 32;

using bf16 = __nv_bfloat16;
using f16 = __half;

struct alignas(16) Bits16 {
  uint32_t x, y, z, w;
};
struct alignas(8) Bits8 {
  uint32_t x, y;
};
struct alignas(4) Bits4 {
  uint32_t x;
};

BSSN_DEVICE int thread() { return int(threadIdx.x); }
BSSN_DEVICE void barrier() { __syncthreads(); }
BSSN_DEVICE void warp_barrier() { __syncwarp(); }
template <class A>
BSSN_DEVICE A shuffle_xor(A x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
BSSN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

BSSN_DEVICE double widen(double x) { return x; }
BSSN_DEVICE float widen(float x) { return x; }
BSSN_DEVICE float widen(bf16 x) { return __bfloat162float(x); }
BSSN_DEVICE float widen(f16 x) { return __half2float(x); }
template <class T>
BSSN_DEVICE T narrow(double x);
template <>
BSSN_DEVICE double narrow<double>(double x) { return x; }
template <>
BSSN_DEVICE float narrow<float>(double x) { return float(x); }
template <>
BSSN_DEVICE bf16 narrow<bf16>(double x) { return __float2bfloat16_rn(float(x)); }
template <>
BSSN_DEVICE f16 narrow<f16>(double x) { return __float2half_rn(float(x)); }
template <class T>
BSSN_DEVICE T narrow(float x);
template <>
BSSN_DEVICE double narrow<double>(float x) { return x; }
template <>
BSSN_DEVICE float narrow<float>(float x) { return x; }
template <>
BSSN_DEVICE bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
BSSN_DEVICE f16 narrow<f16>(float x) { return __float2half_rn(x); }

// A product that is rounded by itself. Left to the compiler, m g + x y would be fused one way in one kernel and the other
// way in the next, and a layer's bits would depend on the group that it is in.
BSSN_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
BSSN_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }

// ---- Counters, in global memory

// Order among tickets is all that a ticket needs.
BSSN_DEVICE int add_relaxed(int* counter, int n) {
  int old;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(n) : "memory");
  return old;
}
BSSN_DEVICE int add_acquire_release(int* counter, int n) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(n) : "memory");
  return old;
}
BSSN_DEVICE int load_acquire(const int* counter) {
  int now;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  return now;
}
// While one waits: an acquire each time would empty L1 for the programs beside.
BSSN_DEVICE int load_relaxed(const int* counter) {
  int now;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  return now;
}
BSSN_DEVICE void pause() { __nanosleep(40); }

// ---- Accesses to full-size arrays

#if __CUDA_ARCH__ >= 800
BSSN_DEVICE uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
#endif

// Of what this launch does not need again: the next in line to leave L2.
BSSN_DEVICE Bits16 load_once(const Bits16* p) {
  Bits16 v;
#if __CUDA_ARCH__ >= 800
  asm("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p), "l"(evict_first()));
#else
  v = *p;
#endif
  return v;
}
BSSN_DEVICE Bits8 load_once(const Bits8* p) {
  Bits8 v;
#if __CUDA_ARCH__ >= 800
  asm("ld.global.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
      : "=r"(v.x), "=r"(v.y)
      : "l"(p), "l"(evict_first()));
#else
  v = *p;
#endif
  return v;
}
BSSN_DEVICE Bits4 load_once(const Bits4* p) { return *p; }

BSSN_DEVICE void store_once(Bits16* p, Bits16 v) {
#if __CUDA_ARCH__ >= 800
  asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;"
               :
               : "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "l"(evict_first())
               : "memory");
#else
  *p = v;
#endif
}
BSSN_DEVICE void store_once(Bits8* p, Bits8 v) {
#if __CUDA_ARCH__ >= 800
  asm volatile("st.global.L1::no_allocate.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;"
               :
               : "l"(p), "r"(v.x), "r"(v.y), "l"(evict_first())
               : "memory");
#else
  *p = v;
#endif
}
BSSN_DEVICE void store_once(Bits4* p, Bits4 v) { *p = v; }

// Written by another program of this launch: past L1, which is not coherent.
template <class A>
BSSN_DEVICE A load_fresh(const A* p) {
  return __ldcg(p);
}
BSSN_DEVICE Bits16 load_fresh(const Bits16* p) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
  return Bits16{v.x, v.y, v.z, v.w};
}

// ---- Asynchronous copies from global to shared memory, each thread for itself

#if __CUDA_ARCH__ >= 800
constexpr bool kAsync = true;
// Zeros where `there` is false.
BSSN_DEVICE void copy_async(Bits16* to, const Bits16* from, bool there) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(at), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
BSSN_DEVICE void copy_async_once(Bits16* to, const Bits16* from, bool there) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
               :
               : "r"(at), "l"(from), "r"(there ? 16 : 0), "l"(evict_first())
               : "memory");
}
BSSN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
BSSN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}
#else
constexpr bool kAsync = false;
BSSN_DEVICE void copy_async(Bits16*, const Bits16*, bool) {}
BSSN_DEVICE void copy_async_once(Bits16*, const Bits16*, bool) {}
BSSN_DEVICE void commit_copies() {}
template <int kPending>
BSSN_DEVICE void wait_copies() {}
#endif

}  // namespace cuda
}  // namespace bssn
