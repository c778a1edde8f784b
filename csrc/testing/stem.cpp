// The kernel of stem on the emulation.
#include "cuda/stem.cuh"

#include "testing/kernels.h"

namespace fused_resnet {

int64_t emulate_stem(const std::string& dtype, const Addresses& addresses, const Numbers& sizes,
                     const std::array<int64_t, 4>& strides, int activation, double eps, bool aligned, int64_t limit,
                     unsigned seed) {
  int64_t bytes = 0;
  by_name(dtype, [&](auto element) {
    using T = decltype(element);
    StemArgs<T> a{conv_args<T>(addresses, sizes, activation, eps), strides[0], strides[1], strides[2], strides[3]};
    a.aligned = aligned;
    bytes = stem_plan<T>(a.shape).bytes;
    launch_stem(a, limit, Emulated{seed});
  });
  return bytes;
}

std::array<int64_t, 5> stem_tile_place(const Numbers& sizes, int64_t tile) {
  const ConvShape s = shape_of(sizes);
  const StemPlan plan = stem_plan<bf16>(s);
  const StemPlace place = stem_place<bf16>(s, plan, tile);
  return {place.n, place.row, place.column, place.filter, stem_tiles(s, plan)};
}

}  // namespace fused_resnet
