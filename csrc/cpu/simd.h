// Vectors of the instruction set that a file is compiled for, in the compiler's own vector types: one source for SSE,
// AVX2, AVX-512 and NEON. Included by csrc/cpu/isa only; everything has internal linkage.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/elements.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
// The same where they lie in memory: at any address, over any type.
typedef float FloatsAt __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef uint32_t WordsAt __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
typedef uint16_t HalvesAt __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

#define FR_INLINE inline __attribute__((always_inline))

FR_INLINE Floats all(float value) {
  return value - Floats{};
}

FR_INLINE Words words_at(const void* from) {
  return *static_cast<const WordsAt*>(from);
}

FR_INLINE Floats load(const float* from) {
  return *reinterpret_cast<const FloatsAt*>(from);
}

// Compilers widen halves of vectors, and put them together.
FR_INLINE Floats load(const bf16* from) {
#if defined(__AVX512F__)
  const auto wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  const auto wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  const auto wide = __builtin_convertvector(*reinterpret_cast<const HalvesAt*>(from), Words);
#endif
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(wide) << 16);
}

FR_INLINE void store(float* to, Floats value) {
  *reinterpret_cast<FloatsAt*>(to) = value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
FR_INLINE void store(bf16* to, Floats value) {
#if defined(__AVX512BF16__)
  *reinterpret_cast<HalvesAt*>(to) = reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(value)));
#else
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  *reinterpret_cast<HalvesAt*>(to) = __builtin_convertvector(value != value ? Words{} + 0x7fc0u : rounded, Halves);
#endif
}

// NaN passes, as in `activate`. In this order they are x86's maximum and minimum, which give the second of two operands
// where one is NaN.
FR_INLINE Floats clamp(Floats z, Floats low, Floats high) {
  z = low > z ? low : z;
  return high < z ? high : z;
}

}  // namespace
}  // namespace FR_ISA
}  // namespace fused_resnet
