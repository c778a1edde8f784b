#include "cpu/memory.h"
#include "cpu/pick.h"

namespace fused_resnet {
namespace {

Tensor mean_pool(const Tensor& x) {
  STD_TORCH_CHECK(is_channels_last(x), "x must be dense in channels_last memory");
  const int64_t C = x.size(1), count = x.size(2) * x.size(3);
  STD_TORCH_CHECK(count > 0, "there is nothing to take the mean of");
  const Tensor y = make_image({{x.size(0), C, 1, 1}, x.scalar_type()}, x);
  const auto pool = [&](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, x.size(0), 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n)
        convs<T>()[0].mean_pool(data<T>(x) + n * count * C, count, C, data_out<T>(y) + n * C);
    });
    return y;
  };
  if (x.scalar_type() == ScalarType::BFloat16) return pool(bf16{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be fp32 or bf16");
  return pool(float{});
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("_mean_pool", TORCH_BOX(&fused_resnet::mean_pool));
}
