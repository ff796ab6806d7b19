// Vectors of the instruction set this file is compiled for: GCC and clang vector types, so that the arithmetic is
// written once. Only half precision needs intrinsics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bssn {
namespace BSSN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T, int bytes, bool = std::is_arithmetic<T>::value>
struct VectorOf {};
template <class T, int bytes>
struct VectorOf<T, bytes, true> {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class A>
using Vec = typename VectorOf<A, kVectorBytes>::type;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class To, class From>
static inline To bit_cast(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// --- one element ---------------------------------------------------------------------------------------------------

template <class A, class T, class = std::enable_if_t<std::is_floating_point<T>::value>>
static inline A load_one(const T* x) {
  return A(*x);
}
template <class A>
static inline A load_one(const bf16* x) {
  return A(bit_cast<float>(uint32_t(x->bits) << 16));
}
template <class A>
static inline A load_one(const f16* x) {
  const uint32_t sign = uint32_t(x->bits & 0x8000) << 16, magnitude = x->bits & 0x7fff;
  // Scaling by 2^112 moves the exponent from bias 15 to 127 and normalizes subnormals at once.
  float y = bit_cast<float>(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00) y = bit_cast<float>(0x7f800000u | (magnitude << 13));
  return A(bit_cast<float>(bit_cast<uint32_t>(y) | sign));
}

template <class T, class A, class = std::enable_if_t<std::is_floating_point<T>::value>>
static inline void store_one(T* x, A value) {
  *x = T(value);
}
template <class A>
static inline void store_one(bf16* x, A value) {
  const float y = float(value);
  const uint32_t bits = bit_cast<uint32_t>(y);
  x->bits = y != y ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
template <class A>
static inline void store_one(f16* x, A value) {
  const float y = float(value);
  const uint32_t bits = bit_cast<uint32_t>(y), sign = (bits >> 16) & 0x8000;
  const float magnitude = std::fabs(y);
  uint32_t half;
  if (!(magnitude < 65520.0f)) {  // rounds to infinity, or is NaN
    half = y != y ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x1p-14f) {  // subnormal: the addition rounds to a multiple of 2^-24
    half = bit_cast<uint32_t>(magnitude + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    const uint32_t b = bit_cast<uint32_t>(magnitude);
    half = (b - 0x38000000u + 0xfff + ((b >> 13) & 1)) >> 13;
  }
  x->bits = uint16_t(half | sign);
}

// --- one vector: kLanes<A> elements ----------------------------------------------------------------------------------

template <class A>
static inline Vec<A> load(const A* x) {
  Vec<A> y;
  std::memcpy(&y, x, sizeof(y));
  return y;
}
template <class A, class T>
static inline std::enable_if_t<!std::is_same<A, T>::value, Vec<A>> load(const T* x) {
  Vec<A> y;
  for (int i = 0; i < kLanes<A>; ++i) y[i] = load_one<A>(x + i);
  return y;
}
template <class A>
static inline std::enable_if_t<std::is_same<A, float>::value, Vec<A>> load(const bf16* x) {
  typename VectorOf<uint16_t, kVectorBytes / 2>::type narrow;
  std::memcpy(&narrow, x, sizeof(narrow));
  return (Vec<float>)(__builtin_convertvector(narrow, typename VectorOf<uint32_t, kVectorBytes>::type) << 16);
}
#if defined(__AVX512F__)
template <class A>
static inline std::enable_if_t<std::is_same<A, float>::value, Vec<A>> load(const f16* x) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)x));
}
#elif defined(__AVX2__)
template <class A>
static inline std::enable_if_t<std::is_same<A, float>::value, Vec<A>> load(const f16* x) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
}
#endif

template <class A>
static inline void store(A* x, Vec<A> y) {
  std::memcpy(x, &y, sizeof(y));
}
template <class T, class A>
static inline std::enable_if_t<!std::is_same<A, T>::value> store_lanes(T* x, Vec<A> y) {
  for (int i = 0; i < kLanes<A>; ++i) store_one(x + i, A(y[i]));
}
static inline void store(float* x, Vec<double> y) { store_lanes<float, double>(x, y); }
static inline void store(double* x, Vec<float> y) { store_lanes<double, float>(x, y); }
static inline void store(bf16* x, Vec<double> y) { store_lanes<bf16, double>(x, y); }
static inline void store(f16* x, Vec<double> y) { store_lanes<f16, double>(x, y); }
static inline void store(bf16* x, Vec<float> y) {
  typedef typename VectorOf<uint32_t, kVectorBytes>::type Bits;
  const Bits bits = (Bits)y;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto nan = y != y;
  const Bits chosen = (rounded & ~(Bits)nan) | (0x7fc0 & (Bits)nan);
  const auto narrow = __builtin_convertvector(chosen, typename VectorOf<uint16_t, kVectorBytes / 2>::type);
  std::memcpy(x, &narrow, sizeof(narrow));
}
#if defined(__AVX512F__)
static inline void store(f16* x, Vec<float> y) {
  _mm256_storeu_si256((__m256i*)x, _mm512_maskz_cvtps_ph(0xffff, (__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
static inline void store(f16* x, Vec<float> y) {
  _mm_storeu_si128((__m128i*)x, _mm256_cvtps_ph((__m256)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
static inline void store(f16* x, Vec<float> y) { store_lanes<f16, float>(x, y); }
#endif

// Fetches n numbers, which may lie beyond the end of an array. Hardware does so up to the end of a page of 4 KiB; across
// it a core reads some 5 % faster with this.
template <int n, class T>
static inline void prefetch(const T* x) {
  constexpr int line = 64 / int(sizeof(T));
  for (int i = 0; i < n; i += line) __builtin_prefetch(x + i);
}

static inline bool aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0; }

// Past the caches, for memory that nobody reads soon; x is aligned.
template <class A>
static inline void stream(A* x, Vec<A> y) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)x, (__m512i)y);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)x, (__m256i)y);
#else
  store(x, y);
#endif
}
static inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class A>
static inline Vec<A> broadcast(A x) {
  return Vec<A>{} + x;
}

// The sum of the lanes, by halves.
template <class A>
static inline double sum_lanes(Vec<A> x) {
  A lanes[kLanes<A>];
  store(lanes, x);
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return double(lanes[0]);
}

}  // namespace BSSN_ISA
}  // namespace bssn
