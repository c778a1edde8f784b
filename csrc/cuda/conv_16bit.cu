// conv_bn_act for sm_80 and up: launches with elements of 16 bits.
#include "cuda/conv.cuh"
#include "cuda/conv_launch.h"

namespace fused_resnet {

template <class T>
void launch_conv_on(const ConvArgs<T>& a, int32_t filters, const Stream& stream) {
  const char* reason = tile_refusal(a, filters);
  STD_TORCH_CHECK(reason == nullptr, reason);
  launch_conv(a, filters, stream);
}

template void launch_conv_on(const ConvArgs<bf16>&, int32_t, const Stream&);
template void launch_conv_on(const ConvArgs<fp16>&, int32_t, const Stream&);

}  // namespace fused_resnet
