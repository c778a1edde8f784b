// Where things are: the index arithmetic that the CPU's loops and the GPU's kernels share. Offsets are 64-bit,
// coordinates 32-bit. Letters are cuDNN's. tests/csrc exhausts every function here on the CPU.
#pragma once

#include "common/elements.h"

namespace fused_resnet {

template <class Int>
FR_HD Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

// One convolution. x [N, H, W, C], weight [K, R, S, C / groups], y [N, P, Q, K].
struct ConvShape {
  int32_t N, H, W, C, K, R, S, P, Q;
  int32_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};

// A pixel of an output.
struct Pixel {
  int32_t n, p, q;
};

FR_HD int64_t pixels(const ConvShape& s) {
  return static_cast<int64_t>(s.N) * s.P * s.Q;
}

FR_HD Pixel pixel_of(int64_t m, int32_t P, int32_t Q) {
  const int64_t row = m / Q;
  return Pixel{static_cast<int32_t>(row / P), static_cast<int32_t>(row % P), static_cast<int32_t>(m % Q)};
}

// The pixel `offset` behind `first`, offset < 2^30: without the 64-bit divisions, which are calls on a GPU.
FR_HD Pixel pixel_behind(Pixel first, int32_t offset, int32_t P, int32_t Q) {
  const int32_t q = first.q + offset, p = first.p + q / Q;
  return Pixel{first.n + p / P, p % P, q % Q};
}

// Row or column of the input that output position `p` reads with tap `r`; may lie outside of the image.
FR_HD int32_t tap(int32_t p, int32_t r, int32_t stride, int32_t padding, int32_t dilation) {
  return p * stride - padding + r * dilation;
}

FR_HD bool inside(int32_t at, int32_t size) {
  return at >= 0 && at < size;
}

// Offset of element [n, h, w, c] of a dense [N, H, W, C] tensor.
FR_HD int64_t nhwc(int64_t n, int32_t h, int32_t w, int32_t c, int32_t H, int32_t W, int32_t C) {
  return ((n * H + h) * W + w) * C + c;
}

// The depth of the matrix product that a convolution is: element e of a row of weight [K, R, S, C / groups].
struct Depth {
  int32_t r, s, c;
};

FR_HD Depth depth_of(int32_t e, int32_t S, int32_t channels) {
  const int32_t cell = e / channels;
  return Depth{cell / S, cell % S, e % channels};
}

// What the 3x3 max-pool with stride 2 and padding 1 makes of a size.
FR_HD int32_t pooled(int32_t size) {
  return (size + 1) / 2;
}

// Masks: bit i of byte b belongs to element 8 * b + i in the order of memory.
constexpr int kOctet = 8;

FR_HD int64_t mask_bytes(int64_t elements) {
  return ceil_div<int64_t>(elements, kOctet);
}

// Channel of the first element of octet `block` * `threads` + `thread`, C < 2^20. In 32 bits, because a GPU divides 64
// bits in a function call.
FR_HD int32_t octet_channel(int64_t block, int32_t thread, int32_t threads, int32_t C) {
  const auto c = static_cast<uint32_t>(C), width = static_cast<uint32_t>(threads * kOctet);
  return static_cast<int32_t>(
      (static_cast<uint32_t>(block) % c * (width % c) + static_cast<uint32_t>(thread * kOctet)) % c);
}

}  // namespace fused_resnet
