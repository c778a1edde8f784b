// The launches on the CPU that operators and tapes (tape.cpp) share; schemas.cpp says what they compute.
#pragma once

#include <functional>

#include "cpu/memory.h"

namespace fused_resnet {

// A launch on images of certain sizes. It keeps its packed weights alive, and reads and writes what it is given.
struct Launch {
  ConvShape shape;
  Image y;
  // The whole batch, by all threads. The residual may be null where the launch has none, and may be y.
  std::function<void(const void* x, const void* residual, void* y)> all;
  // Rows [first, last) of a single image, by the thread that calls.
  std::function<void(const void* x, const void* residual, void* y, int32_t first, int32_t last)> rows;
  int32_t step = 1;  // rows come in multiples of it; the last may be fewer
};

Launch conv_packed(const Image& x, const Tensor& pack, int64_t K, const Sizes& kernel, const Sizes& stride,
                   const Sizes& padding, const Sizes& dilation, int64_t groups, Activation activation);

// What a launch on 8-bit values has besides.
struct Int8Numbers {
  double residual_scale;
  int64_t residual_zero, y_zero;
  double low, high;
  bool narrow;  // y is uint8, else fp32
};

// `residual` is uint8 or fp32, if there is one.
Launch conv_int8(const Image& x, const Tensor& pack, std::optional<ScalarType> residual, const Sizes& filters,
                 const Sizes& stride, const Sizes& padding, const Sizes& dilation, const Int8Numbers& numbers);
Launch quantize(const Image& x, double inverse, int64_t zero);
Launch max_pool(const Image& x, const Sizes& kernel, const Sizes& stride, const Sizes& padding);
Launch mean_pool(const Image& x);  // of each channel: y is [N, C, 1, 1]

// A launch by itself, into a new image.
inline Tensor run(const Launch& launch, const Tensor& x, const Maybe& residual = std::nullopt) {
  STD_TORCH_CHECK(is_channels_last(x), "x must be dense in channels_last memory");
  if (residual.has_value()) check_result(*residual, launch.shape, *residual, "residual");
  const Tensor y = make_image(launch.y, x);
  launch.all(x.const_data_ptr(), residual.has_value() ? residual->const_data_ptr() : nullptr, y.mutable_data_ptr());
  return y;
}

}  // namespace fused_resnet
