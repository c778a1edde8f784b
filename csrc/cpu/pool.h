// Pools in NHWC: the maximum, without the indices that only a gradient needs, and the mean of whole maps.
#pragma once

#include "cpu/convs.h"
#include "cpu/simd.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

typedef uint8_t Bytes64 __attribute__((vector_size(kVectorBytes)));
typedef uint8_t Bytes64At __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

FR_INLINE bool larger(uint8_t a, uint8_t b) {
  return a > b;
}

template <class T>
FR_INLINE bool larger(T a, T b) {
  const float wide = widen(a);
  return wide > widen(b) || wide != wide;
}

// The larger of two values, and what is larger than nothing. NaN wins, as in stock's max-pool.
template <class T>
struct Larger {
  static constexpr int kCount = kLanes;
  static FR_INLINE Floats least() { return all(-INFINITY); }
  static FR_INLINE Floats of(Floats a, const T* from) {
    const Floats b = load(from);
    return b > a || b != b ? b : a;
  }
  static FR_INLINE void put(T* to, Floats value) { store(to, value); }
};

template <>
struct Larger<uint8_t> {
  static constexpr int kCount = kVectorBytes;
  static FR_INLINE Bytes64 least() { return Bytes64{}; }
  static FR_INLINE Bytes64 of(Bytes64 a, const uint8_t* from) {
    const Bytes64 b = *reinterpret_cast<const Bytes64At*>(from);
    return b > a ? b : a;
  }
  static FR_INLINE void put(uint8_t* to, Bytes64 value) { *reinterpret_cast<Bytes64At*>(to) = value; }
};

// Row p of image n of the pooled batch; a window reaches into the image, because padding is half of it at most.
template <class T>
void max_pool(const ConvShape& s, const T* x, T* y, int64_t n, int32_t p) {
  constexpr int kCount = Larger<T>::kCount;
  const int32_t top = p * s.stride_h - s.pad_h, left_most = -s.pad_w;
  const int32_t h0 = top < 0 ? 0 : top, h1 = top + s.R < s.H ? top + s.R : s.H;
  y += nhwc(n, p, 0, 0, s.P, s.Q, s.C);
  for (int32_t q = 0; q < s.Q; ++q, y += s.C) {
    const int32_t left = left_most + q * s.stride_w;
    const int32_t w0 = left < 0 ? 0 : left, w1 = left + s.S < s.W ? left + s.S : s.W;
    const auto vector = [&](const T* from, int64_t pixel, T* to) {
      auto most = Larger<T>::least();
      for (int32_t h = h0; h < h1; ++h, from += int64_t{s.W} * pixel) {
        for (int32_t w = w0; w < w1; ++w) most = Larger<T>::of(most, from + (w - w0) * pixel);
      }
      Larger<T>::put(to, most);
    };
    const T* from = x + nhwc(n, h0, w0, 0, s.H, s.W, s.C);
    int32_t k = 0;
    for (; k + kCount <= s.C; k += kCount) vector(from + k, s.C, y + k);
    if (k == s.C) continue;
    if (k > 0) {  // the last vector reaches back
      vector(from + s.C - kCount, s.C, y + s.C - kCount);
      continue;
    }
    for (; k < s.C; ++k) {
      T most = from[k];
      for (int32_t h = h0; h < h1; ++h) {
        for (int32_t w = w0; w < w1; ++w) {
          const T value = x[nhwc(n, h, w, k, s.H, s.W, s.C)];
          if (larger(value, most)) most = value;
        }
      }
      y[k] = most;
    }
  }
}

template <class T>
void mean_pool(const T* x, int64_t count, int64_t C, T* y) {
  const float scale = 1.0f / static_cast<float>(count);
  int64_t k = 0;
  for (; k + kLanes <= C; k += kLanes) {
    Floats sum{};
    for (int64_t i = 0; i < count; ++i) sum += load(x + i * C + k);
    store(y + k, sum * scale);
  }
  for (; k < C; ++k) {
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += widen(x[i * C + k]);
    round_to(y[k], sum * scale);
  }
}

}  // namespace
}  // namespace FR_ISA
}  // namespace fused_resnet
