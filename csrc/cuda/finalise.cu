// The raw operator _bn_finalise for CUDA.
#include <tuple>

#include "common/check_finalise.h"
#include "cuda/finalise.cuh"
#include "cuda/launch.h"

namespace fused_resnet {
namespace {

std::tuple<Tensor, Tensor, Tensor> bn_finalise(const Tensor& means, const Tensor& squares, int64_t count, int64_t span,
                                               const Maybe& pivot, const Maybe& running_mean, const Maybe& running_var,
                                               const Maybe& batches, std::optional<double> momentum, double eps) {
  check_finalise(means, squares, count, span, pivot, running_mean, running_var, batches, momentum);
  const Stream stream(means);
  const int64_t K = means.size(1);
  Tensor mean = make({K}, means.scalar_type(), means), var = make({K}, means.scalar_type(), means);
  Tensor inverse_std = make({K}, means.scalar_type(), means);
  Tensor parts = make({3, join_strips(means.size(0)), K}, ScalarType::Double, means);
  by_wide_dtype(means, [&](auto element) {
    using A = decltype(element);
    FinaliseArgs<A> a{};
    a.means = data<A>(means);
    a.squares = data<A>(squares);
    a.pivot = data<A>(pivot);
    a.tiles = means.size(0);
    a.span = span;
    a.count = count;
    a.K = narrow_size(K, "K");
    a.parts = data_out<double>(parts);
    a.mean = data_out<A>(mean);
    a.var = data_out<A>(var);
    a.inverse_std = data_out<A>(inverse_std);
    a.running_mean = running_mean ? data_out<A>(*running_mean) : nullptr;
    a.running_var = running_var ? data_out<A>(*running_var) : nullptr;
    a.batches = data<int64_t>(batches);
    a.momentum = momentum.value_or(-1);
    a.eps = eps;
    launch_finalise(a, stream);
  });
  return {mean, var, inverse_std};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CUDA, m) {
  m.impl("_bn_finalise", TORCH_BOX(&fused_resnet::bn_finalise));
}
