// The element types of tensors, their accumulators and the activations: one definition for the CPU's loops, the GPU's
// kernels and the kernels' runs on a CPU. Everything has internal linkage, because files of one library are compiled
// for different instruction sets and the linker must not mix them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FR_HD static __host__ __device__ __forceinline__
#else
#define FR_HD static inline
// The compiler's own type of fp16, where it has one; g++ before 13 knows _Float16 in C++ for x86 alone.
#if defined(__aarch64__)
#define FR_HALF __fp16
#elif defined(__FLT16_MANT_DIG__)
#define FR_HALF _Float16
#endif
#endif

namespace fused_resnet {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
// Sums and arithmetic over elements of type T are kept in it.
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

FR_HD float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FR_HD uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FR_HD float widen(float value) {
  return value;
}
FR_HD double widen(double value) {
  return value;
}
FR_HD float widen(bf16 value) {
  return float_of_bits(static_cast<uint32_t>(value.bits) << 16);
}

#if defined(__CUDA_ARCH__)
FR_HD float widen(fp16 value) {
  return __half2float(__ushort_as_half(value.bits));
}
#elif defined(FR_HALF)
FR_HD float widen(fp16 value) {
  FR_HALF half;
  memcpy(&half, &value.bits, sizeof half);
  return static_cast<float>(half);
}
#else
FR_HD float widen(fp16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return float_of_bits(sign | ((rest << 13) + 0x38000000u));
  const float tiny = static_cast<float>(rest) * 0x1p-24f;  // subnormal
  return sign ? -tiny : tiny;
}
#endif

// Rounds to nearest, ties to even; NaN stays NaN.
FR_HD void round_to(float& out, float value) {
  out = value;
}
FR_HD void round_to(double& out, double value) {
  out = value;
}
FR_HD void round_to(bf16& out, float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

#if defined(__CUDA_ARCH__)
FR_HD void round_to(fp16& out, float value) {
  out.bits = __half_as_ushort(__float2half_rn(value));
}
#elif defined(FR_HALF)
FR_HD void round_to(fp16& out, float value) {
  const FR_HALF half = static_cast<FR_HALF>(value);
  memcpy(&out.bits, &half, sizeof half);
}
#else
FR_HD void round_to(fp16& out, float value) {
  const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half = 0x7e00u;   // NaN
  if (rest < 0x38800000u) {  // subnormal: the sum's last place is that of a subnormal, and it rounds
    half = bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000u;
  } else if (rest < 0x47800000u) {
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  } else if (rest <= 0x7f800000u) {
    half = 0x7c00u;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}
#endif

enum class Activation : int { identity, relu, relu6, silu, hardswish };

FR_HD float exponential(float value) {
  return expf(value);
}
FR_HD double exponential(double value) {
  return exp(value);
}

// NaN passes relu and relu6, as in stock: no maximum, which would drop it.
template <class A>
FR_HD A activate(A z, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return z <= A(0) ? A(0) : z;
    case Activation::relu6:
      return z <= A(0) ? A(0) : z >= A(6) ? A(6) : z;
    case Activation::silu:
      return z / (A(1) + exponential(-z));
    case Activation::hardswish: {
      const A up = z + A(3);
      return z * (up <= A(0) ? A(0) : up >= A(6) ? A(6) : up) / A(6);
    }
    default:
      return z;
  }
}

// Whether a gradient goes through the activation where its input was z: relu and relu6 only.
template <class A>
FR_HD bool passes(A z, Activation activation) {
  return !(z <= A(0)) && !(activation == Activation::relu6 && z >= A(6));
}

}  // namespace fused_resnet
