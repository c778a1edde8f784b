// The raw operator _conv_bn_act for CUDA, sm_80 and up.
#include "common/conv_tiles.h"
#include "cuda/conv_launch.h"
#include "cuda/conv_sm90.h"

namespace fused_resnet {
namespace {

Tensor conv_bn_act(const Tensor& x_, const Tensor& weight_, const Maybe& bias, const Maybe& gamma, const Maybe& beta,
                   const Maybe& mean, const Maybe& var, const Maybe& residual, const Maybe& pre_gamma,
                   const Maybe& pre_beta, const Maybe& pre_mean, const Maybe& pre_var, double eps, double pre_eps,
                   const std::string& activation, const std::string& prologue, const Sizes& stride,
                   const Sizes& padding, const Sizes& dilation, int64_t groups, int64_t tile) {
  const ConvShape s = conv_shape(x_, weight_, stride, padding, dilation, groups);
  check_conv_norms(x_, s, bias, gamma, beta, mean, var, pre_gamma, pre_beta, pre_mean, pre_var, prologue);
  STD_TORCH_CHECK(int64_t{s.R} * s.S * (s.C / s.groups) < 1 << 30, "a dot product of more than 2^30 terms");
  STD_TORCH_CHECK(tile == kNoTile || is_tile(tile, false) || is_tile(tile, true), "there is no tile ", tile);
  // The same tensors where they are in this memory already.
  const Tensor x = torch::stable::contiguous(x_, torch::headeronly::MemoryFormat::ChannelsLast);
  const Tensor weight = torch::stable::contiguous(weight_, torch::headeronly::MemoryFormat::ChannelsLast);
  Tensor y = make({s.N, s.K, s.P, s.Q}, x.scalar_type(), x, true);
  if (residual.has_value()) check_image(*residual, y, "residual");
  const Stream stream(x);
  Vectors vectors(x);
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    ConvArgs<T> a{};
    a.shape = s;
    a.x = data<T>(x);
    a.weight = data<T>(weight);
    a.residual = data<T>(residual);
    a.y = data_out<T>(y);
    set_epilogue<A>(a, vectors, s.K, bias, gamma, beta, mean, var, eps, activation);
    a.aligned = aligned(a.residual, a.y);
    if (!prologue.empty()) {
      a.pre = {vectors.of<A>(pre_gamma, s.C, "pre_gamma"),
               vectors.of<A>(pre_beta, s.C, "pre_beta"),
               vectors.of<A>(pre_mean, s.C, "pre_mean"),
               vectors.of<A>(pre_var, s.C, "pre_var"),
               nullptr,
               static_cast<A>(pre_eps)};
      a.pre_activation = activation_of(prologue);
    }
    if (launch_sm90(a, tile, stream)) return;
    launch_conv_on(a, tile == kNoTile ? 0 : kConvTiles[tile].filters, stream);
  });
  return y;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CUDA, m) {
  m.impl("_conv_bn_act", TORCH_BOX(&fused_resnet::conv_bn_act));
}
