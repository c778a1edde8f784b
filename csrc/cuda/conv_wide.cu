// conv_bn_act for sm_80 and up: launches with elements of 32 and 64 bits.
#include "cuda/conv_launch.cuh"

namespace fused_resnet {

template void launch_conv_on(const ConvArgs<float>&, int32_t, const Stream&);
template void launch_conv_on(const ConvArgs<double>&, int32_t, const Stream&);

}  // namespace fused_resnet
