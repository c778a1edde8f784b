// The raw operator _bn_finalise on the CPU: mean, variance and 1 / std of a batch from the moments of tiles.
#include "common/finalise.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/check_finalise.h"

namespace fused_resnet {
namespace {

constexpr int64_t kGrain = 1 << 14;  // tiles x channels that are worth a thread

// Channels [first, last), tile after tile.
template <class A>
void finalise(const A* means, const A* squares, int64_t tiles, int64_t K, int64_t count, int64_t span, int64_t first,
              int64_t last, std::vector<Moments>& joined) {
  for (int64_t t = 0; t < tiles; ++t) {
    const auto elements = static_cast<double>(tile_elements(count, span, t));
    for (int64_t k = first; k < last; ++k)
      joined[k] = join(joined[k], {elements, means[t * K + k], squares[t * K + k]});
  }
}

std::tuple<Tensor, Tensor, Tensor> bn_finalise(const Tensor& means, const Tensor& squares, int64_t count, int64_t span,
                                               const Maybe& pivot, const Maybe& running_mean, const Maybe& running_var,
                                               const Maybe& batches, std::optional<double> momentum, double eps) {
  check_finalise(means, squares, count, span, pivot, running_mean, running_var, batches, momentum);
  const int64_t tiles = means.size(0), K = means.size(1);
  Tensor mean = make({K}, means.scalar_type(), means), var = make({K}, means.scalar_type(), means);
  Tensor inverse_std = make({K}, means.scalar_type(), means);
  const double weight = batch_weight(momentum.value_or(-1), batches ? *data<int64_t>(batches) : 1);
  by_wide_dtype(means, [&](auto element) {
    using A = decltype(element);
    std::vector<Moments> joined(K, {0, 0, 0});
    torch::stable::parallel_for(0, K, std::max<int64_t>(8, kGrain / tiles), [&](int64_t first, int64_t last) {
      finalise(data<A>(means), data<A>(squares), tiles, K, count, span, first, last, joined);
    });
    A* const moving_mean = running_mean ? data_out<A>(*running_mean) : nullptr;
    A* const moving_var = running_var ? data_out<A>(*running_var) : nullptr;
    for (int64_t k = 0; k < K; ++k) {
      Moments m = joined[k];
      if (pivot.has_value()) m.mean += data<A>(pivot)[k];
      const double biased = m.square / m.count;
      data_out<A>(mean)[k] = static_cast<A>(m.mean);
      data_out<A>(var)[k] = static_cast<A>(biased);
      data_out<A>(inverse_std)[k] = static_cast<A>(1 / std::sqrt(biased + eps));
      if (moving_mean != nullptr) moving_mean[k] = running_mean_of(moving_mean[k], m, weight);
      if (moving_var != nullptr) moving_var[k] = running_var_of(moving_var[k], m, weight);
    }
  });
  return {mean, var, inverse_std};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("_bn_finalise", TORCH_BOX(&fused_resnet::bn_finalise));
}
