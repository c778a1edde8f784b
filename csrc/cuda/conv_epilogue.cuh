// What a convolution's kernels are given, and what stands behind their sums: bias, norm, residual and activation.
#pragma once

#include "common/index.h"
#include "cuda/norm.cuh"

namespace fused_resnet {

template <class T>
struct ConvArgs {
  ConvShape shape;
  const T *x, *weight, *residual;  // weight [K, R, S, C / groups]
  T* y;
  const Accumulator<T>*bias, *gamma, *beta, *mean, *var;  // [K]; null where absent
  Accumulator<T> eps;
  Activation activation;
  bool aligned;  // y and residual start at a multiple of 16 bytes
  // What stands in front of the convolution: pre.var is null without it. Vectors of [C].
  NormArgs<Accumulator<T>> pre;
  Activation pre_activation;
  bool chunks;     // 16 bytes of x and of weight never leave a tap, and start at a multiple of 16 bytes
  int32_t bundle;  // groups that a block takes side by side
};

// Of filter k: its norm, if there is one, with the bias in the mean.
template <class T>
FR_DEVICE ChannelNorm<Accumulator<T>> filter_norm(const ConvArgs<T>& a, int32_t k) {
  using A = Accumulator<T>;
  ChannelNorm<A> norm{A(0), A(1), A(0)};
  if (a.var != nullptr) norm = channel_norm(NormArgs<A>{a.gamma, a.beta, a.mean, a.var, nullptr, a.eps}, k);
  if (a.bias != nullptr) norm.mean -= a.bias[k];
  return norm;
}

// The norms of filters [k, min(k + kOctet, end)).
template <class T>
FR_DEVICE void filter_norms(const ConvArgs<T>& a, int32_t k, int32_t end, ChannelNorm<Accumulator<T>> (&norm)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) norm[i] = filter_norm(a, k + i < end ? k + i : end - 1);
}

// y of the filters [k, min(k + kOctet, end)) of pixel m from their sums; rounds once.
template <class T>
FR_DEVICE void store_filters(const ConvArgs<T>& a, int64_t m, int32_t k, int32_t end,
                             const ChannelNorm<Accumulator<T>> (&norm)[kOctet], Accumulator<T> (&z)[kOctet]) {
  const int64_t at = m * a.shape.K + k, last = m * a.shape.K + end;
  const bool whole = a.aligned && at % kOctet == 0;
  Accumulator<T> residual[kOctet] = {};
  if (a.residual != nullptr) load_elements<kOctet>(a.residual, at, last, whole, residual);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) z[i] = activate(normalised(z[i], norm[i]) + residual[i], a.activation);
  store_elements<kOctet>(a.y, at, last, whole, z);
}

}  // namespace fused_resnet
