// The launches of conv_bn_act for sm_80 and up, compiled in files of their own.
#pragma once

#include "cuda/conv_epilogue.cuh"
#include "cuda/launch.h"

namespace fused_resnet {

// `filters` of a tile of the tensor-core kernel, or 0 for what the rule takes. Of `a` chunks and bundle are set by it.
template <class T>
void launch_conv_on(const ConvArgs<T>& a, int32_t filters, const Stream& stream);

}  // namespace fused_resnet
