// Max-pool in NHWC, without the indices that only a gradient needs.
#pragma once

#include "cpu/convs.h"
#include "cpu/simd.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

// NaN wins, as in stock's max-pool.
FR_INLINE Floats larger(Floats a, Floats b) {
  return b > a || b != b ? b : a;
}

// Row p of image n of the pooled batch; a window reaches into the image, because padding is half of it at most.
template <class T>
void max_pool(const ConvShape& s, const T* x, T* y, int64_t n, int32_t p) {
  const int32_t top = p * s.stride_h - s.pad_h, left_most = -s.pad_w;
  const int32_t h0 = top < 0 ? 0 : top, h1 = top + s.R < s.H ? top + s.R : s.H;
  y += nhwc(n, p, 0, 0, s.P, s.Q, s.C);
  for (int32_t q = 0; q < s.Q; ++q, y += s.C) {
    const int32_t left = left_most + q * s.stride_w;
    const int32_t w0 = left < 0 ? 0 : left, w1 = left + s.S < s.W ? left + s.S : s.W;
    int64_t k = 0;
    for (; k + kLanes <= s.C; k += kLanes) {
      Floats most = all(-INFINITY);
      for (int32_t h = h0; h < h1; ++h) {
        const T* row = x + nhwc(n, h, 0, 0, s.H, s.W, s.C) + k;
        for (int32_t w = w0; w < w1; ++w) most = larger(most, load(row + int64_t{w} * s.C));
      }
      store(y + k, most);
    }
    for (; k < s.C; ++k) {
      float most = -INFINITY;
      for (int32_t h = h0; h < h1; ++h) {
        for (int32_t w = w0; w < w1; ++w) {
          const float value = widen(x[nhwc(n, h, w, static_cast<int32_t>(k), s.H, s.W, s.C)]);
          if (value > most || value != value) most = value;
        }
      }
      round_to(y[k], most);
    }
  }
}

}  // namespace
}  // namespace FR_ISA
}  // namespace fused_resnet
