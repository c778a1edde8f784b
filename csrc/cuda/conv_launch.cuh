// What conv_launch.h declares, for the files that instantiate it.
#pragma once

#include "cuda/conv.cuh"
#include "cuda/conv_launch.h"

namespace fused_resnet {

template <class T>
void launch_conv_on(const ConvArgs<T>& a, int32_t filters, const Stream& stream) {
  const char* reason = tile_refusal(a, filters);
  STD_TORCH_CHECK(reason == nullptr, reason);
  launch_conv(a, filters, stream);
}

}  // namespace fused_resnet
