// The raw operator _conv_bn_act for CUDA: bf16 and fp16 on sm_80 and up.
#include "cuda/conv.cuh"
#include "cuda/launch.h"

namespace fused_resnet {
namespace {

template <class T>
void run(const ConvShape& s, const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& gamma,
         const Maybe& beta, const Maybe& mean, const Maybe& var, const Maybe& residual, double eps,
         Activation activation, int64_t tile, const Tensor& y) {
  ConvArgs<T> a{};
  a.shape = s;
  a.x = data<T>(x);
  a.weight = data<T>(weight);
  a.residual = data<T>(residual);
  a.y = data_out<T>(y);
  STD_TORCH_CHECK(aligned(a.x, a.weight), "x and weight must start at a multiple of 16 bytes");
  a.bias = vector_of<float>(bias, s.K, x, "bias");
  a.gamma = vector_of<float>(gamma, s.K, x, "gamma");
  a.beta = vector_of<float>(beta, s.K, x, "beta");
  a.mean = vector_of<float>(mean, s.K, x, "mean");
  a.var = vector_of<float>(var, s.K, x, "var");
  a.eps = static_cast<float>(eps);
  a.activation = activation;
  a.aligned = aligned(a.residual, a.y);
  launch_conv(a, tile, Stream(x));
}

Tensor conv_bn_act(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& gamma, const Maybe& beta,
                   const Maybe& mean, const Maybe& var, const Maybe& residual, const Maybe& pre_gamma,
                   const Maybe& pre_beta, const Maybe& pre_mean, const Maybe& pre_var, double eps, double pre_eps,
                   const std::string& activation, const std::string& prologue, const Sizes& stride,
                   const Sizes& padding, const Sizes& dilation, int64_t groups, int64_t tile) {
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation, groups);
  STD_TORCH_CHECK(prologue.empty() && !pre_gamma && !pre_beta && !pre_mean && !pre_var,
                  "the CUDA kernel has no prologue, but was given one with eps ", pre_eps);
  STD_TORCH_CHECK(s.groups == 1 && s.C % kChunk == 0,
                  "the CUDA kernel takes one group and channels in eights, not C = ", s.C, ", groups = ", s.groups);
  STD_TORCH_CHECK(int64_t{s.R} * s.S * s.C < 1 << 30, "a dot product of more than 2^30 terms");
  STD_TORCH_CHECK(is_channels_last(x) && is_channels_last(weight),
                  "x and weight must be dense in channels_last memory");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var must be given together");
  STD_TORCH_CHECK(tile == kNoTile || is_tile(tile, false), "tile = ", tile, " is none of this kernel's");
  Tensor y = make({s.N, s.K, s.P, s.Q}, x.scalar_type(), x, true);
  if (residual.has_value()) check_image(*residual, y, "residual");
  const Activation kind = activation_of(activation);
  if (x.scalar_type() == ScalarType::BFloat16) {
    run<bf16>(s, x, weight, bias, gamma, beta, mean, var, residual, eps, kind, tile, y);
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "the CUDA kernel takes bf16 and fp16");
    run<fp16>(s, x, weight, bias, gamma, beta, mean, var, residual, eps, kind, tile, y);
  }
  return y;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CUDA, m) {
  m.impl("_conv_bn_act", TORCH_BOX(&fused_resnet::conv_bn_act));
}
