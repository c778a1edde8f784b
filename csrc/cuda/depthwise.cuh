// Depthwise convolutions of conv_bn_act: a filter reads one channel, so that there is no matrix product. A thread takes
// 8 filters of every kDepthwiseLanes-th pixel of its block's strip; the block's weights stand in shared memory.
#pragma once

#include "cuda/conv_epilogue.cuh"

namespace fused_resnet {

constexpr int kDepthwiseFilters = 64;  // of a block
constexpr int kDepthwiseLanes = 16;    // threads for the same filters
constexpr int kDepthwisePixels = 128;  // of a block
constexpr int kDepthwiseThreads = kDepthwiseFilters / kOctet * kDepthwiseLanes;
constexpr int kDepthwiseWindow = 128;  // taps whose weights fit into 64 KiB; larger windows run as other groups do

FR_HD bool is_depthwise(const ConvShape& s) {
  return s.groups > 1 && s.groups == s.C && int64_t{s.R} * s.S <= kDepthwiseWindow;
}

FR_HD int64_t depthwise_blocks(const ConvShape& s) {
  return ceil_div(pixels(s), int64_t{kDepthwisePixels}) * ceil_div(s.K, kDepthwiseFilters);
}

// Adds up the taps of one pixel. `weights` [R * S, kDepthwiseFilters] start at the thread's first filter, k.
template <class T, bool PROLOGUE>
FR_DEVICE void depthwise_sums(const ConvArgs<T>& a, const Pixel& pixel, int32_t k, const Accumulator<T>* weights,
                              const ChannelNorm<Accumulator<T>> (&pre)[kOctet], Accumulator<T> (&sums)[kOctet]) {
  using A = Accumulator<T>;
  const ConvShape& s = a.shape;
  const int32_t times = s.K / s.C;  // filters that read a channel
  for (int32_t r = 0; r < s.R; ++r) {
    const int32_t h = tap(pixel.p, r, s.stride_h, s.pad_h, s.dilation_h);
    for (int32_t t = 0; t < s.S && inside(h, s.H); ++t) {
      const int32_t w = tap(pixel.q, t, s.stride_w, s.pad_w, s.dilation_w);
      if (!inside(w, s.W)) continue;
      const int64_t at = nhwc(pixel.n, h, w, 0, s.H, s.W, s.C);
      A x[kOctet], weight[kOctet];
      if (times == 1) {
        load_elements<kOctet>(a.x, at + k, at + s.C, a.chunks, x);
      } else {
#pragma unroll
        for (int i = 0; i < kOctet; ++i) x[i] = k + i < s.K ? widen(a.x[at + (k + i) / times]) : A(0);
      }
      load_elements<kOctet>(weights, (r * s.S + t) * kDepthwiseFilters, s.R * s.S * kDepthwiseFilters, true, weight);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if constexpr (PROLOGUE) {
          T rounded;
          round_to(rounded, activate(normalised(x[i], pre[i]), a.pre_activation));
          x[i] = widen(rounded);
        }
        sums[i] += x[i] * weight[i];
      }
    }
  }
}

template <class T, bool PROLOGUE>
FR_WIDE_KERNEL(kDepthwiseThreads, 1)
conv_bn_act_depthwise(const ConvArgs<T> a) {
  using A = Accumulator<T>;
  const ConvShape& s = a.shape;
  const auto block = static_cast<int32_t>(block_index());
  const int32_t tiles = ceil_div(s.K, kDepthwiseFilters), first = block % tiles * kDepthwiseFilters, taps = s.R * s.S;
  A* const weights = reinterpret_cast<A*>(shared_memory());
  for (int32_t i = thread_index(); i < taps * kDepthwiseFilters; i += kDepthwiseThreads) {
    const int32_t k = first + i / taps, cell = i % taps;
    weights[cell * kDepthwiseFilters + i / taps] = k < s.K ? widen(a.weight[int64_t{k} * taps + cell]) : A(0);
  }
  sync_block();
  const int32_t octet = thread_index() % (kDepthwiseFilters / kOctet) * kOctet, k = first + octet;
  if (k >= s.K) return;
  ChannelNorm<A> norm[kOctet], pre[kOctet];
  filter_norms(a, k, s.K, norm);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    pre[i] = PROLOGUE ? channel_norm(a.pre, (k + i < s.K ? k + i : s.K - 1) / (s.K / s.C)) : ChannelNorm<A>{};
  }
  const int64_t strip = int64_t{block / tiles} * kDepthwisePixels;
  const Pixel start = pixel_of(strip, s.P, s.Q);
  for (int at = thread_index() / (kDepthwiseFilters / kOctet); at < kDepthwisePixels; at += kDepthwiseLanes) {
    if (strip + at >= pixels(s)) return;
    A sums[kOctet] = {};
    depthwise_sums<T, PROLOGUE>(a, pixel_behind(start, at, s.P, s.Q), k, weights + octet, pre, sums);
    store_filters(a, strip + at, k, s.K, norm, sums);
  }
}

// a.chunks: x starts at a multiple of 16 bytes, and so does every octet of channels.
template <class T, class Launch>
void launch_depthwise(ConvArgs<T> a, const Launch& launch) {
  a.chunks = a.shape.C % kOctet == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
  const size_t bytes = sizeof(Accumulator<T>) * a.shape.R * a.shape.S * kDepthwiseFilters;
  auto go = [&](auto kernel) { launch(kernel, depthwise_blocks(a.shape), kDepthwiseThreads, bytes, a); };
  a.pre.var == nullptr ? go(conv_bn_act_depthwise<T, false>) : go(conv_bn_act_depthwise<T, true>);
}

}  // namespace fused_resnet
