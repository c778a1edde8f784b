// One channel's batch norm as kernels take it: mean, scale and shift.
#pragma once

#include "cuda/device.h"

namespace fused_resnet {

// One norm: vectors [C] in the accumulator's type; absent ones are null.
template <class A>
struct NormArgs {
  const A *gamma, *beta, *mean, *var, *means;  // means [2, C]
  A eps;
};

template <class A>
struct ChannelNorm {
  A mean, scale, shift;
};

template <class A>
FR_DEVICE A inverse_std(const NormArgs<A>& n, int32_t c) {
  return inverse_root(n.var[c] + n.eps);
}

template <class A>
FR_DEVICE ChannelNorm<A> channel_norm(const NormArgs<A>& n, int32_t c) {
  return {n.mean[c], (n.gamma == nullptr ? A(1) : n.gamma[c]) * inverse_std(n, c),
          n.beta == nullptr ? A(0) : n.beta[c]};
}

template <class A>
FR_DEVICE A normalised(A value, const ChannelNorm<A>& n) {
  return (value - n.mean) * n.scale + n.shift;
}

}  // namespace fused_resnet
