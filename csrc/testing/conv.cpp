// The kernels of conv_bn_act on the emulation.
#include "cuda/conv.cuh"

#include "testing/kernels.h"

namespace fused_resnet {

void emulate_conv(const std::string& dtype, const Addresses& a, const Numbers& sizes, int activation, double eps,
                  int pre_activation, double pre_eps, bool aligned, unsigned seed, int32_t filters) {
  by_name(dtype, [&](auto element) {
    using T = decltype(element);
    ConvArgs<T> args = conv_args<T>(a, sizes, activation, eps);
    args.aligned = aligned;
    args.pre = norm_args<Accumulator<T>>(a, "pre_", pre_eps);
    args.pre_activation = static_cast<Activation>(pre_activation);
    launch_conv(args, filters, Emulated{seed});
  });
}

std::array<int64_t, 5> tile_place(const Numbers& sizes, int64_t block, int32_t tile_n, int32_t bundle) {
  const ConvTilePlace place = conv_tile_place(shape_of(sizes), block, tile_n, bundle);
  return {place.pixel, place.group, place.filter, place.pixels, conv_blocks(shape_of(sizes), tile_n, bundle)};
}

int32_t chunk_number(int32_t row, int32_t chunk) {
  return swizzled(row, chunk);
}

std::array<int32_t, 3> depth_behind(int32_t r, int32_t s, int32_t c, int32_t S, int32_t channels) {
  const Depth next = next_depth({r, s, c}, S, channels);
  return {next.r, next.s, next.c};
}

}  // namespace fused_resnet
