// The launches on the CPU that operators and tapes (tape.cpp) share; schemas.cpp says what they compute.
#pragma once

#include "common/checks.h"

namespace fused_resnet {

void conv_packed(Tensor y, const Tensor& x, const Tensor& pack, const Maybe& residual, const Sizes& kernel,
                 const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                 Activation activation);
Tensor conv_int8(const Tensor& x, const Tensor& pack, const Maybe& residual, const Sizes& filters, const Sizes& stride,
                 const Sizes& padding, const Sizes& dilation, double residual_scale, int64_t residual_zero,
                 int64_t y_zero, double low, double high, bool narrow);
Tensor quantize(const Tensor& x, double inverse, int64_t zero);
Tensor max_pool(const Tensor& x, const Sizes& kernel, const Sizes& stride, const Sizes& padding);

}  // namespace fused_resnet
