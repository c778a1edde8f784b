// The raw operator _stem for CUDA, sm_80 and up.
#include "cuda/launch.h"
#include "cuda/stem.cuh"

namespace fused_resnet {
namespace {

Tensor stem(const Tensor& x, const Tensor& weight_, const Maybe& bias, const Maybe& gamma, const Maybe& beta,
            const Tensor& mean, const Tensor& var, double eps, const std::string& activation, const Sizes& stride,
            const Sizes& padding) {
  const ConvShape s = conv_shape(x, weight_, stride, padding, {1, 1}, 1);
  STD_TORCH_CHECK(s.C <= kPack, "the CUDA kernel of stem takes up to 4 channels, not ", s.C);
  check_vector(bias, s.K, x, "bias");
  check_norm(x, s.K, gamma, beta, mean, var);
  const Tensor weight = torch::stable::contiguous(weight_, torch::headeronly::MemoryFormat::ChannelsLast);
  Tensor y = make({s.N, s.K, pooled(s.P), pooled(s.Q)}, x.scalar_type(), x, true);
  const Stream stream(x);
  Vectors vectors(x);
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    StemArgs<T> a{};
    a.shape = s;
    a.x = data<T>(x);
    a.x_n = x.stride(0);
    a.x_c = x.stride(1);
    a.x_h = x.stride(2);
    a.x_w = x.stride(3);
    a.weight = data<T>(weight);
    a.y = data_out<T>(y);
    set_epilogue<A>(a, vectors, s.K, bias, gamma, beta, mean, var, eps, activation);
    a.aligned = aligned(a.y);
    const int64_t bytes = stem_plan<T>(s).bytes;
    STD_TORCH_CHECK(bytes <= stream.shared_memory(), "windows of ", s.R, " x ", s.S, " with stride ", s.stride_h, " x ",
                    s.stride_w, " take ", bytes, " bytes of shared memory, a block has ", stream.shared_memory());
    launch_stem(a, int64_t{stream.multiprocessors()} * kStemBlocks, stream);
  });
  return y;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CUDA, m) {
  m.impl("_stem", TORCH_BOX(&fused_resnet::stem));
}
