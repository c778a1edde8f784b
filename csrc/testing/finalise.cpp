// The kernels of _bn_finalise on the emulation.
#include "cuda/finalise.cuh"

#include "testing/kernels.h"

namespace fused_resnet {

int64_t emulate_finalise(const std::string& dtype, const Addresses& addresses, int64_t count, int64_t span, int32_t K,
                         double momentum, double eps, unsigned seed) {
  const int64_t tiles = ceil_div(count, span);
  auto run = [&](auto element) {
    using A = decltype(element);
    FinaliseArgs<A> a{};
    a.means = at<const A>(addresses, "means");
    a.squares = at<const A>(addresses, "squares");
    a.pivot = at<const A>(addresses, "pivot");
    a.tiles = tiles;
    a.span = span;
    a.count = count;
    a.K = K;
    std::vector<double> parts(3 * join_strips(tiles) * K);
    a.parts = parts.data();
    a.mean = at<A>(addresses, "mean");
    a.var = at<A>(addresses, "var");
    a.inverse_std = at<A>(addresses, "inverse_std");
    a.running_mean = at<A>(addresses, "running_mean");
    a.running_var = at<A>(addresses, "running_var");
    a.batches = at<const int64_t>(addresses, "num_batches_tracked");
    a.momentum = momentum;
    a.eps = eps;
    launch_finalise(a, Emulated{seed});
  };
  dtype == "fp64" ? run(double{}) : run(float{});
  return join_strips(tiles);
}

}  // namespace fused_resnet
