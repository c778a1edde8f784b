#include "cpu/launches.h"
#include "cpu/pick.h"

namespace fused_resnet {

Launch mean_pool(const Image& x) {
  STD_TORCH_CHECK(x.size.size() == 4 && x.size[2] * x.size[3] > 0, "there is nothing to take the mean of");
  const int64_t C = x.size[1], count = x.size[2] * x.size[3];
  const ConvShape s = conv_sizes(x.size, {C, C, x.size[2], x.size[3]}, {1, 1}, {0, 0}, {1, 1}, 1);
  Launch launch{s, {{x.size[0], C, 1, 1}, x.dtype}, {}, {}};
  const auto pool = [&](auto element) {
    using T = decltype(element);
    const auto image = [=](const void* from, void* to, int64_t n) {
      convs<T>()[0].mean_pool(static_cast<const T*>(from) + n * count * C, count, C, static_cast<T*>(to) + n * C);
    };
    launch.all = [=](const void* from, const void*, void* to) {
      torch::stable::parallel_for(0, s.N, 1, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) image(from, to, n);
      });
    };
    launch.rows = [=](const void* from, const void*, void* to, int32_t, int32_t) { image(from, to, 0); };
    return launch;
  };
  if (x.dtype == ScalarType::BFloat16) return pool(bf16{});
  STD_TORCH_CHECK(x.dtype == ScalarType::Float, "x must be fp32 or bf16");
  return pool(float{});
}

namespace {

Tensor mean_pool_op(const Tensor& x) {
  return run(mean_pool(image_of(x)), x);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("_mean_pool", TORCH_BOX(&fused_resnet::mean_pool_op));
}
