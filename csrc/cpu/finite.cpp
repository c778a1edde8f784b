#include "cpu/finite.h"

namespace fused_resnet {
namespace {

bool finite(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() || is_channels_last(x), "x must be dense");
  bool found = false;
  by_dtype(x, [&](auto element) { found = is_finite<decltype(element)>(x); });
  return found;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("_is_finite", TORCH_BOX(&fused_resnet::finite));
}
