// Family conv_bn_act on the CPU by PyTorch's own convolutions, which are oneDNN's.
#pragma once

#include "cpu/pick.h"

namespace fused_resnet {

struct ConvCall {
  const Tensor &x, &weight;
  const Maybe &bias, &gamma, &beta, &mean, &var, &residual, &pre_gamma, &pre_beta, &pre_mean, &pre_var;
  double eps, pre_eps;
  const std::string &activation, &prologue;
  const Sizes &stride, &padding, &dilation;
  int64_t groups;
};

// The whole launch, its operands checked; nothing where PyTorch's convolution is not the faster one.
Maybe conv_by_onednn(const ConvShape& shape, const ConvCall& call);

}  // namespace fused_resnet
