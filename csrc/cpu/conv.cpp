// Families conv_bn_act and stem on the CPU in their plainest form: a home without Python where no other kernel is,
// and what the GPU's kernels are compared with. oneDNN's convolutions are faster.
#include "common/conv_tiles.h"
#include "cpu/pick.h"

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

// The operands of a convolution with its norm, and what they point into.
template <class T>
struct Operands {
  using A = Accumulator<T>;
  std::vector<A> weight, bias;
  NormVectors<A> norm;
  Conv<T> conv{};

  Operands(const ConvShape& s, const Tensor& x, const Tensor& w, const Maybe& b, const Maybe& gamma, const Maybe& beta,
           const Maybe& mean, const Maybe& var, double eps)
      : weight(packed<A>(w, s)), bias(channels<A>(b, s.K, 0)), norm(s.K, gamma, beta, mean, var, eps) {
    check_vector(b, s.K, x, "bias");
    conv.shape = s;
    conv.x = data<T>(x);
    conv.x_n = x.stride(0);
    conv.x_c = x.stride(1);
    conv.x_h = x.stride(2);
    conv.x_w = x.stride(3);
    conv.weight = weight.data();
    conv.bias = b.has_value() ? bias.data() : nullptr;
    if (mean.has_value()) conv.norm = norm.view();
  }
};

void check_vectors(const Tensor& x, int64_t size, const Maybe& gamma, const Maybe& beta, const Maybe& mean,
                   const Maybe& var) {
  check_vector(gamma, size, x, "gamma");
  check_vector(beta, size, x, "beta");
  check_vector(mean, size, x, "mean");
  check_vector(var, size, x, "var");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var must be given together");
}

Tensor conv_bn_act(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& gamma, const Maybe& beta,
                   const Maybe& mean, const Maybe& var, const Maybe& residual, const Maybe& pre_gamma,
                   const Maybe& pre_beta, const Maybe& pre_mean, const Maybe& pre_var, double eps, double pre_eps,
                   const std::string& activation, const std::string& prologue, const Sizes& stride,
                   const Sizes& padding, const Sizes& dilation, int64_t groups, int64_t tile) {
  STD_TORCH_CHECK(tile == kNoTile, "tile = ", tile, ", but the CPU's kernel has no tiles");
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation, groups);
  check_vectors(x, s.K, gamma, beta, mean, var);
  check_vectors(x, s.C, pre_gamma, pre_beta, pre_mean, pre_var);
  check_vector(bias, s.K, x, "bias");
  STD_TORCH_CHECK(prologue.empty() != pre_mean.has_value(), "a prologue needs its mean and var");
  Tensor y = make({s.N, s.K, s.P, s.Q}, x.scalar_type(), x, true);
  if (residual.has_value()) check_image(*residual, y, "residual");
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Operands<T> o(s, x, weight, bias, gamma, beta, mean, var, eps);
    const NormVectors<A> pre(s.C, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps);
    if (!prologue.empty()) {
      o.conv.prologue = pre.view();
      o.conv.pre_activation = activation_of(prologue);
    }
    o.conv.residual = data<T>(residual);
    o.conv.activation = activation_of(activation);
    o.conv.y = data_out<T>(y);
    torch::stable::parallel_for(0, int64_t{s.N} * s.P, 1, [&](int64_t first, int64_t last) {
      std::vector<A> row(int64_t{s.Q} * s.K);
      for (int64_t i = first; i < last; ++i) {
        loops<T>().conv_row(o.conv, i / s.P, static_cast<int32_t>(i % s.P), row.data());
        loops<T>().store_row(row.data(), static_cast<int64_t>(row.size()), o.conv.y + i * int64_t{s.Q} * s.K);
      }
    });
  });
  return y;
}

Tensor stem(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& gamma, const Maybe& beta,
            const Tensor& mean, const Tensor& var, double eps, const std::string& activation, const Sizes& stride,
            const Sizes& padding) {
  const ConvShape s = conv_shape(x, weight, stride, padding, {1, 1}, 1);
  check_vectors(x, s.K, gamma, beta, mean, var);
  check_vector(bias, s.K, x, "bias");
  Tensor y = make({s.N, s.K, pooled(s.P), pooled(s.Q)}, x.scalar_type(), x, true);
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Operands<T> o(s, x, weight, bias, gamma, beta, mean, var, eps);
    o.conv.activation = activation_of(activation);
    T* out = data_out<T>(y);
    const int64_t size = int64_t{s.Q} * s.K, rows = pooled(s.P);
    torch::stable::parallel_for(0, s.N * rows, 1, [&](int64_t first, int64_t last) {
      std::vector<A> buffer(3 * size);
      for (int64_t i = first; i < last; ++i) {
        const A* given[3] = {nullptr, nullptr, nullptr};
        for (int j = 0; j < 3; ++j) {
          const auto p = static_cast<int32_t>(2 * (i % rows) - 1 + j);
          if (!inside(p, s.P)) continue;
          loops<T>().conv_row(o.conv, i / rows, p, buffer.data() + j * size);
          given[j] = buffer.data() + j * size;
        }
        loops<T>().pool_row(given, s.Q, s.K, out + i * int64_t{pooled(s.Q)} * s.K);
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
