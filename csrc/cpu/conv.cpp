// Families conv_bn_act and stem on the CPU: PyTorch's convolutions, and for what they do not take plain loops, which
// are also what the GPU's kernels are compared with.
#include "common/conv_tiles.h"
#include "cpu/onednn.h"

namespace fused_resnet {
namespace {

// weight [K, C / groups, R, S] in any strides -> [groups, R, S, C / groups, K / groups].
template <class A>
std::vector<A> packed(const Tensor& weight, const ConvShape& s) {
  const int64_t channels = s.C / s.groups, filters = s.K / s.groups;
  std::vector<A> out(weight.numel());
  by_dtype(weight, [&](auto element) {
    const auto* from = data<decltype(element)>(weight);
    for (int64_t k = 0; k < s.K; ++k) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t cell = 0; cell < int64_t{s.R} * s.S; ++cell) {
          const int64_t at = k * weight.stride(0) + c * weight.stride(1) + cell / s.S * weight.stride(2) +
                             cell % s.S * weight.stride(3);
          const int64_t to = ((k / filters * s.R * s.S + cell) * channels + c) * filters + k % filters;
          out[to] = static_cast<A>(widen(from[at]));
        }
      }
    }
  });
  return out;
}

// The whole launch in loops: for fp64 and for what is empty.
template <class T>
void convolve_rows(const ConvShape& s, const ConvCall& o, const Tensor& y) {
  using A = Accumulator<T>;
  const std::vector<A> weight = packed<A>(o.weight, s), bias = channels<A>(o.bias, s.K, 0);
  const NormVectors<A> norm(s.K, o.gamma, o.beta, o.mean, o.var, o.eps);
  const NormVectors<A> pre(s.C, o.pre_gamma, o.pre_beta, o.pre_mean, o.pre_var, o.pre_eps);
  Conv<T> conv{};
  conv.shape = s;
  conv.x = data<T>(o.x);
  conv.x_n = o.x.stride(0);
  conv.x_c = o.x.stride(1);
  conv.x_h = o.x.stride(2);
  conv.x_w = o.x.stride(3);
  conv.weight = weight.data();
  conv.bias = o.bias.has_value() ? bias.data() : nullptr;
  if (o.mean.has_value()) conv.norm = norm.view();
  if (!o.prologue.empty()) {
    conv.prologue = pre.view();
    conv.pre_activation = activation_of(o.prologue);
  }
  conv.residual = data<T>(o.residual);
  conv.activation = activation_of(o.activation);
  conv.y = data_out<T>(y);
  torch::stable::parallel_for(0, int64_t{s.N} * s.P, 1, [&](int64_t first, int64_t last) {
    std::vector<A> row(int64_t{s.Q} * s.K);
    for (int64_t i = first; i < last; ++i) {
      loops<T>().conv_row(conv, i / s.P, static_cast<int32_t>(i % s.P), row.data());
      loops<T>().store_row(row.data(), static_cast<int64_t>(row.size()), conv.y + i * int64_t{s.Q} * s.K);
    }
  });
}

Tensor convolve(const ConvShape& s, const ConvCall& o) {
  if (const Maybe found = conv_by_onednn(s, o)) return *found;
  const Tensor y = make({s.N, s.K, s.P, s.Q}, o.x.scalar_type(), o.x, true);
  by_dtype(o.x, [&](auto element) { convolve_rows<decltype(element)>(s, o, y); });
  return y;
}

Tensor conv_bn_act(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& gamma, const Maybe& beta,
                   const Maybe& mean, const Maybe& var, const Maybe& residual, const Maybe& pre_gamma,
                   const Maybe& pre_beta, const Maybe& pre_mean, const Maybe& pre_var, double eps, double pre_eps,
                   const std::string& activation, const std::string& prologue, const Sizes& stride,
                   const Sizes& padding, const Sizes& dilation, int64_t groups, int64_t tile) {
  STD_TORCH_CHECK(tile == kNoTile, "tile = ", tile, ", but the CPU's kernel has no tiles");
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation, groups);
  check_conv_norms(x, s, bias, gamma, beta, mean, var, pre_gamma, pre_beta, pre_mean, pre_var, prologue);
  if (residual.has_value()) check_result(*residual, s, x, "residual");
  return convolve(s, {x,        weight,  bias, gamma,   beta,       mean,     var,    residual, pre_gamma, pre_beta,
                      pre_mean, pre_var, eps,  pre_eps, activation, prologue, stride, padding,  dilation,  groups});
}

Tensor stem(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& gamma, const Maybe& beta,
            const Tensor& mean, const Tensor& var, double eps, const std::string& activation, const Sizes& stride,
            const Sizes& padding) {
  const Sizes dilation{1, 1};
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation, 1);
  check_vector(bias, s.K, x, "bias");
  check_norm(x, s.K, gamma, beta, mean, var);
  const Maybe absent, given_mean = mean, given_var = var;
  const Tensor wide =
      convolve(s, {x,      weight, bias, gamma, beta,       given_mean, given_var, absent,  absent,   absent,
                   absent, absent, eps,  eps,   activation, "",         stride,    padding, dilation, 1});
  const Tensor y = make({s.N, s.K, pooled(s.P), pooled(s.Q)}, x.scalar_type(), x, true);
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    const int64_t size = int64_t{s.Q} * s.K, rows = pooled(s.P);
    torch::stable::parallel_for(0, s.N * rows, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T* given[3] = {nullptr, nullptr, nullptr};
        for (int j = 0; j < 3; ++j) {
          const auto p = static_cast<int32_t>(2 * (i % rows) - 1 + j);
          if (inside(p, s.P)) given[j] = data<T>(wide) + (i / rows * s.P + p) * size;
        }
        loops<T>().pool_row(given, s.Q, s.K, data_out<T>(y) + i * int64_t{pooled(s.Q)} * s.K);
      }
    });
  });
  return y;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("_conv_bn_act", TORCH_BOX(&fused_resnet::conv_bn_act));
  m.impl("_stem", TORCH_BOX(&fused_resnet::stem));
}
