// What every raw operator asks of its tensors, for the CPU and for CUDA, on the stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "common/elements.h"
#include "common/index.h"

namespace fused_resnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"identity", "relu", "relu6", "silu", "hardswish"};
  for (int i = 0; i < 5; ++i) {
    if (name == kNames[i]) return static_cast<Activation>(i);
  }
  STD_TORCH_CHECK(false, "unknown activation '", name, "'");
}

// An activation whose gradient is a bit.
inline Activation kink_of(const std::string& name) {
  const Activation found = activation_of(name);
  STD_TORCH_CHECK(found <= Activation::relu6, "activation '", name, "' has no mask");
  return found;
}

// [N, C, H, W] in the order N, H, W, C without gaps.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  if (t.numel() == 0) return true;
  int64_t step = 1;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != step) return false;
    step *= t.size(d);
  }
  return true;
}

inline bool same_device(const Tensor& t, const Tensor& x) {
  return t.is_cpu() == x.is_cpu() && t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index();
}

// `t` is laid out as `x` is, element for element; x itself is checked, too.
inline void check_image(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(is_channels_last(t), name, " must be dense in channels_last memory");
  bool same = t.scalar_type() == x.scalar_type() && same_device(t, x);
  for (int d = 0; d < 4; ++d) same = same && t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, name, " must have the shape, dtype and device of x");
}

inline void check_vector(const Maybe& v, int64_t size, const Tensor& x, const char* name) {
  if (!v.has_value()) return;
  STD_TORCH_CHECK(v->numel() == size && v->is_contiguous() && same_device(*v, x), name, " must be dense, of ", size,
                  " elements, on the device of x");
}

inline void check_mask(const Maybe& mask, const Tensor& x) {
  if (!mask.has_value()) return;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte && mask->is_contiguous() && same_device(*mask, x) &&
                      mask->numel() == mask_bytes(x.numel()),
                  "mask must be uint8 of ", mask_bytes(x.numel()), " bytes on the device of x");
}

// The norm of an image with the device of x.
inline void check_norm(const Tensor& x, int64_t channels, const Maybe& gamma, const Maybe& beta, const Maybe& mean,
                       const Maybe& var) {
  check_vector(gamma, channels, x, "gamma");
  check_vector(beta, channels, x, "beta");
  check_vector(mean, channels, x, "mean");
  check_vector(var, channels, x, "var");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var must be given together");
}

inline void check_shortcut(const Tensor& x, const Maybe& residual, const Maybe& r_mean, const Maybe& r_var) {
  if (residual.has_value()) check_image(*residual, x, "residual");
  STD_TORCH_CHECK(r_mean.has_value() == r_var.has_value() && (residual.has_value() || !r_var.has_value()),
                  "the norm of a residual needs the residual, its mean and its var");
}

// What the sums and the gradient of a norm ask of their images.
inline void check_backward(const Tensor& x, const Tensor& dy, const Maybe& mask, const Maybe& residual,
                           const Maybe& r_mean, const Maybe& r_var) {
  check_image(x, x, "x");
  check_image(dy, x, "dy");
  check_mask(mask, x);
  check_shortcut(x, residual, r_mean, r_var);
}

inline void check_means(const Tensor& x, const Tensor& means, bool shortcut, const Maybe& r_var, const Maybe& r_means) {
  STD_TORCH_CHECK(shortcut || !r_var.has_value(), "a norm of the shortcut without a shortcut");
  STD_TORCH_CHECK(r_means.has_value() == r_var.has_value(), "a norm of the shortcut needs its means");
  check_vector(means, 2 * x.size(1), x, "means");
  check_vector(r_means, 2 * x.size(1), x, "r_means");
}

inline Tensor make(const Sizes& sizes, ScalarType dtype, const Tensor& like, bool channels_last = false) {
  std::optional<torch::headeronly::MemoryFormat> format;
  if (channels_last) format = torch::headeronly::MemoryFormat::ChannelsLast;
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor image_like(const Tensor& x) {
  return make({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x, true);
}

// fp64 beside fp64, else fp32.
inline ScalarType accumulator_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls `f` with a value of the element type of `x`.
template <class F>
void by_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(fp16{});
    default:
      STD_TORCH_CHECK(false, "x must be fp32, fp64, bf16 or fp16");
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* data(const Maybe& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <class T>
T* data_out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline int32_t narrow_size(int64_t size, const char* name) {
  STD_TORCH_CHECK(size >= 0 && size < (int64_t{1} << 30), name, " = ", size, " is out of range");
  return static_cast<int32_t>(size);
}

inline Sizes sizes_of(const Tensor& t) {
  Sizes sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

// The sizes of a convolution of x [N, C, H, W] with filters [K, C / groups, R, S], checked against each other.
inline ConvShape conv_sizes(const Sizes& x, const Sizes& filters, const Sizes& stride, const Sizes& padding,
                            const Sizes& dilation, int64_t groups) {
  STD_TORCH_CHECK(x.size() == 4 && filters.size() == 4, "x and weight must have four dimensions");
  for (const Sizes* pair : {&stride, &padding, &dilation}) {
    STD_TORCH_CHECK(pair->size() == 2, "stride, padding and dilation are pairs");
  }
  auto at = [](int64_t size) { return narrow_size(size, "a size"); };
  ConvShape s{at(x[0]),
              at(x[2]),
              at(x[3]),
              at(x[1]),
              at(filters[0]),
              at(filters[2]),
              at(filters[3]),
              0,
              0,
              at(stride[0]),
              at(stride[1]),
              at(padding[0]),
              at(padding[1]),
              at(dilation[0]),
              at(dilation[1]),
              at(groups)};
  STD_TORCH_CHECK(s.stride_h > 0 && s.stride_w > 0 && s.dilation_h > 0 && s.dilation_w > 0 && s.groups > 0,
                  "stride, dilation and groups must be positive");
  STD_TORCH_CHECK(filters[1] * groups == s.C && s.K % s.groups == 0, "weight does not fit x and groups");
  const int64_t high = s.H + 2 * int64_t{s.pad_h} - s.dilation_h * (s.R - int64_t{1}) - 1;
  const int64_t wide = s.W + 2 * int64_t{s.pad_w} - s.dilation_w * (s.S - int64_t{1}) - 1;
  STD_TORCH_CHECK(high >= 0 && wide >= 0, "the kernel is larger than the padded image");
  s.P = at(high / s.stride_h + 1);
  s.Q = at(wide / s.stride_w + 1);
  return s;
}

inline ConvShape conv_shape(const Tensor& x, const Tensor& weight, const Sizes& stride, const Sizes& padding,
                            const Sizes& dilation, int64_t groups) {
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && same_device(weight, x),
                  "weight must have the dtype and device of x");
  return conv_sizes(sizes_of(x), sizes_of(weight), stride, padding, dilation, groups);
}

// An image of the output's size, with the dtype and device of x.
inline void check_result(const Tensor& y, const ConvShape& s, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(is_channels_last(y), name, " must be dense in channels_last memory");
  STD_TORCH_CHECK(y.size(0) == s.N && y.size(1) == s.K && y.size(2) == s.P && y.size(3) == s.Q &&
                      y.scalar_type() == x.scalar_type() && same_device(y, x),
                  name, " must have the shape of the output, and the dtype and device of x");
}

// The norms behind and in front of a convolution, and its bias.
inline void check_conv_norms(const Tensor& x, const ConvShape& s, const Maybe& bias, const Maybe& gamma,
                             const Maybe& beta, const Maybe& mean, const Maybe& var, const Maybe& pre_gamma,
                             const Maybe& pre_beta, const Maybe& pre_mean, const Maybe& pre_var,
                             const std::string& prologue) {
  check_vector(bias, s.K, x, "bias");
  check_norm(x, s.K, gamma, beta, mean, var);
  check_norm(x, s.C, pre_gamma, pre_beta, pre_mean, pre_var);
  STD_TORCH_CHECK(prologue.empty() != pre_mean.has_value(), "a prologue needs its mean and var");
}

}  // namespace fused_resnet
