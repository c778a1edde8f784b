// Family conv_bn_act for sm_80 and up: y = act(norm(conv(pro(x), w) + bias) + residual).
//
// An implicit matrix product, y [M = N*P*Q, K] = patches of x [M, D = R*S*C] * weight [K, D]^T, x and y channels_last,
// weight [K, R, S, C]. A block makes a tile of kTileM pixels x TILE_N filters from kStages buffers of kTileD elements
// of the depth. Elements of 16 bits are multiplied by tensor cores (ldmatrix, mma.sync), wider ones in their own
// precision. Narrow tiles, of fewer than 64 filters, take up to four groups at once, each with its own pixels: no
// product is made between groups. The sums, in fp32, then go through shared memory, so that the epilogue reads the
// residual and writes y in 16 bytes and rounds once. How x and weight arrive is told in conv_load.cuh; depthwise
// convolutions have a kernel of their own.
#pragma once

#include "cuda/conv_load.cuh"
#include "cuda/depthwise.cuh"
#include "cuda/fragment.cuh"

namespace fused_resnet {

constexpr int kStages = 3;

// Two by two warps, each 64 pixels x TILE_N / 2 filters; of narrow tiles four, each 32 pixels x all filters.
template <class T, int TILE_N>
struct ConvWarps {
  static constexpr bool kNarrow = TILE_N < 64;
  static constexpr int kRows = kNarrow ? 32 : 64, kColumns = kNarrow ? TILE_N : TILE_N / 2;
  using Sums = Accumulator<T>[kRows / 16][kColumns / 8][4];
};

template <class T, int TILE_N>
FR_HD int64_t conv_shared_bytes() {
  const int64_t rows = kTileM + TILE_N * (TILE_N < 64 ? 4 : 1);
  const int64_t buffers = kStages * rows * kRowChunks * 16, sums = kTileM * TILE_N * sizeof(Accumulator<T>);
  return buffers > sums ? buffers : sums;
}

// sums of a warp += what one stage holds from its first row of patches and of weights on.
template <class T, int I, int J>
FR_DEVICE void multiply_stage(const T* patches, const T* weights, int row, int column,
                              Accumulator<T> (&sums)[I][J][4]) {
  const int lane = thread_index() % 32;
  if constexpr (sizeof(T) == 2) {
    constexpr bool kPairs = J > 1;  // else one load brings the whole depth of 8 filters
#pragma unroll
    for (int d = 0; d < 2; ++d) {
      uint32_t left[I][4], right[4];
#pragma unroll
      for (int i = 0; i < I; ++i)
        load_matrices(left[i], chunk_of(patches, row + 16 * i + lane % 16, 2 * d + lane / 16));
#pragma unroll
      for (int j = 0; j < J; ++j) {
        if (j % 2 == 0) {
          const int filter = column + 8 * j + lane % 8 + (kPairs ? lane / 16 * 8 : 0);
          load_matrices(right, chunk_of(weights, filter, kPairs ? 2 * d + lane / 8 % 2 : lane / 8));
        }
        const int half = kPairs ? j % 2 : d;
#pragma unroll
        for (int i = 0; i < I; ++i) multiply_add(sums[i][j], left[i], right[2 * half], right[2 * half + 1], T{});
      }
    }
  } else {
#pragma unroll 1  // all four at once took every register
    for (int chunk = 0; chunk < kRowChunks; ++chunk) {
      multiply_wide<T, kChunk<T>>(
          [&](int i, int e) { return chunk_of(patches, row + sum_row(lane, i, e), chunk); },
          [&](int j, int e) { return chunk_of(weights, column + sum_column<T>(lane, j, e), chunk); }, sums);
    }
  }
}

// Norm, residual, activation and rounding of the block's sums in shared memory [kTileM, TILE_N].
template <int TILE_N, class T>
FR_DEVICE void store_tile(const ConvArgs<T>& a, const ConvTilePlace& place, const Accumulator<T>* sums) {
  constexpr int kColumns = TILE_N / kOctet;
  const ConvShape& s = a.shape;
  const int32_t filters = s.K / s.groups, column = thread_index() % kColumns * kOctet;
  const int32_t other = thread_index() / kColumns, slot = other % place.bundle, group = place.group + slot;
  const int32_t first = group * filters, k = first + place.filter + column;
  if (group >= s.groups || k >= first + filters) return;
  ChannelNorm<Accumulator<T>> norm[kOctet];
  filter_norms(a, k, first + filters, norm);
  for (int32_t at = other / place.bundle; at < place.pixels; at += kConvThreads / kColumns / place.bundle) {
    if (place.pixel + at >= pixels(s)) return;
    Accumulator<T> z[kOctet];
    load_elements<kOctet>(sums, (slot * place.pixels + at) * TILE_N + column, kTileM * TILE_N, true, z);
    store_filters(a, place.pixel + at, k, first + filters, norm, z);
  }
}

template <class T, int TILE_N, Load LOAD>
FR_WIDE_KERNEL(kConvThreads, 1)
conv_bn_act_tile(const ConvArgs<T> a) {
  using Warps = ConvWarps<T, TILE_N>;
  const ConvTilePlace place = conv_tile_place(a.shape, block_index(), TILE_N, Warps::kNarrow ? a.bundle : 1);
  ConvLoader<T, TILE_N> load = make_loader<T, TILE_N>(a, place);
  constexpr int kPatches = kTileM * kTileD<T>, kWeights = load.kBundle * TILE_N * kTileD<T>;
  T* const patches = reinterpret_cast<T*>(shared_memory());
  T* const weights = patches + kStages * kPatches;
  const int32_t steps = ceil_div(a.shape.R * a.shape.S * load.channels, kTileD<T>);
  auto begin = [&](int32_t step) {
    const int stage = step % kStages;
    if (step < steps) begin_stage<LOAD>(a, load, step, patches + stage * kPatches, weights + stage * kWeights);
    commit_copies();  // an empty group keeps the count of what is under way
  };
  auto finish = [&](int32_t step) {
    if (LOAD == Load::registers && step < steps) store_patches(a, load, step, patches + step % kStages * kPatches);
  };
  const int warp = thread_index() / 32;
  const int row = Warps::kNarrow ? warp * 32 : warp / 2 * 64;
  const int column = Warps::kNarrow ? row / place.pixels * TILE_N : warp % 2 * (TILE_N / 2);
  typename Warps::Sums sums = {};
  for (int32_t step = 0; step < kStages - 1; ++step) {
    begin(step);
    finish(step);
  }
  for (int32_t step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    sync_block();  // all copies of this step have landed, and all have read what the next copies overwrite
    begin(step + kStages - 1);
    const int stage = step % kStages;
    multiply_stage(patches + stage * kPatches, weights + stage * kWeights, row, column, sums);
    finish(step + kStages - 1);
  }
  wait_copies<0>();
  sync_block();
  auto* const tile = reinterpret_cast<Accumulator<T>*>(shared_memory());
  const int lane = thread_index() % 32, left = Warps::kNarrow ? 0 : column;
#pragma unroll
  for (int i = 0; i < Warps::kRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < Warps::kColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        tile[(row + sum_row(lane, i, e)) * TILE_N + left + sum_column<T>(lane, j, e)] = sums[i][j][e];
    }
  }
  sync_block();
  store_tile<TILE_N>(a, place, tile);
}

// Whether operands can go past registers, 16 bytes at a time. The tile of 128 filters has no registers for them.
template <class T>
bool past_registers(const ConvArgs<T>& a) {
  const auto start = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.weight);
  return start % 16 == 0 && a.shape.C / a.shape.groups % kChunk<T> == 0 && a.pre.var == nullptr;
}

// Why conv_bn_act_tile with so many filters cannot run, or null.
template <class T>
const char* tile_refusal(const ConvArgs<T>& a, int32_t filters) {
  if (filters <= 64) return nullptr;
  if (sizeof(T) != 2) return "tiles of 128 filters take 16-bit elements";
  return past_registers(a) ? nullptr : "tiles of 128 filters take channels in eights, aligned, and no prologue";
}

template <class T, int TILE_N, class Launch>
void launch_conv_tile(const ConvArgs<T>& a, const Launch& launch) {
  const int64_t blocks = conv_blocks(a.shape, TILE_N, TILE_N < 64 ? a.bundle : 1);
  auto go = [&](auto kernel) { launch(kernel, blocks, kConvThreads, conv_shared_bytes<T, TILE_N>(), a); };
  if (past_registers(a)) return go(conv_bn_act_tile<T, TILE_N, Load::chunks>);
  if constexpr (TILE_N == 8 && sizeof(T) == 2) {
    const auto start = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.weight);
    if (start % 8 == 0 && a.shape.C / a.shape.groups % 4 == 0 && a.pre.var == nullptr)
      return go(conv_bn_act_tile<T, TILE_N, Load::halves>);
  }
  if constexpr (TILE_N <= 64) go(conv_bn_act_tile<T, TILE_N, Load::registers>);
}

// `filters` of a tile, or 0 for what the rule takes. Of `a` chunks and bundle are set here.
template <class T, class Launch>
void launch_conv(ConvArgs<T> a, int32_t filters, const Launch& launch) {
  const ConvShape& s = a.shape;
  const auto start = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.weight);
  a.chunks = start % 16 == 0 && s.C / s.groups % kChunk<T> == 0;
  a.bundle = s.groups >= 4 ? 4 : s.groups >= 2 ? 2 : 1;
  if (filters == 0) {
    if (is_depthwise(s)) return launch_depthwise(a, launch);
    for (filters = 8; filters < 128 && filters < s.K / s.groups;) filters *= 2;
    if (tile_refusal(a, filters) != nullptr) filters = 64;
  }
  switch (filters) {
    case 8:
      return launch_conv_tile<T, 8>(a, launch);
    case 16:
      return launch_conv_tile<T, 16>(a, launch);
    case 32:
      return launch_conv_tile<T, 32>(a, launch);
    case 64:
      return launch_conv_tile<T, 64>(a, launch);
    default:
      if constexpr (sizeof(T) == 2) launch_conv_tile<T, 128>(a, launch);
  }
}

}  // namespace fused_resnet
