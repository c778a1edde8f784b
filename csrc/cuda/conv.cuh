// Family conv_bn_act for sm_80 and up, bf16 and fp16: y = act(norm(conv(x, w) + bias) + residual).
//
// An implicit matrix product, y [M = N*P*Q, K] = patches of x [M, D = R*S*C] * weight [K, D]^T, x and y channels_last,
// weight [K, R, S, C]; C is a multiple of 8, so that 16 bytes never leave a tap. A block makes a tile of kTileM pixels
// x TILE_N filters from STAGES buffers of kTileD elements of the depth, filled by cp.async; warps read them with
// ldmatrix and multiply with mma.sync. The sums, in fp32, then go through shared memory, so that the epilogue reads the
// residual and writes y in 16 bytes and rounds once.
#pragma once

#include "common/conv_tiles.h"
#include "common/index.h"
#include "cuda/device.h"

namespace fused_resnet {

constexpr int kConvThreads = 128;
constexpr int kTileM = 128, kTileD = 32, kStages = 3;
constexpr int kChunk = 8;                             // elements in 16 bytes
constexpr int kRowChunks = kTileD / kChunk;           // 16-byte chunks of a row of a buffer
constexpr int kLoadRows = kConvThreads / kRowChunks;  // rows that the block's threads fill at once

template <class T>
struct ConvArgs {
  ConvShape shape;
  const T *x, *weight, *residual;
  T* y;
  const float *bias, *gamma, *beta, *mean, *var;  // [K]; null where absent
  float eps;
  Activation activation;
  bool aligned;  // y and residual start at a multiple of 16 bytes
};

// Buffers of [rows, kTileD] elements: eight rows of one column of chunks, which ldmatrix reads at once, lie in eight
// different 16-byte columns of the 128 bytes that shared memory delivers at a time.
FR_HD int32_t swizzled(int32_t row, int32_t chunk) {
  return (row * kRowChunks + (chunk ^ (row >> 1 & 3))) * kChunk;
}

template <int TILE_N>
FR_HD int64_t conv_shared_bytes() {
  const int64_t buffers = kStages * (kTileM + TILE_N) * kTileD * 2, sums = kTileM * TILE_N * 4;
  return buffers > sums ? buffers : sums;
}

FR_HD int64_t conv_blocks(const ConvShape& s, int tile_n) {
  return ceil_div(pixels(s), int64_t{kTileM}) * ceil_div(s.K, tile_n);
}

// What a thread copies: one column of chunks of every kLoadRows-th row.
template <class T, int TILE_N>
struct ConvLoader {
  static constexpr int kPixels = kTileM / kLoadRows, kFilters = TILE_N / kLoadRows;
  const T *image[kPixels], *filter[kFilters];  // null beyond the last
  int32_t top[kPixels], left[kPixels];         // of the window
  int32_t row, chunk;
};

template <class T, int TILE_N>
FR_DEVICE ConvLoader<T, TILE_N> make_loader(const ConvArgs<T>& a, int64_t first_pixel, int32_t first_filter) {
  const ConvShape& s = a.shape;
  ConvLoader<T, TILE_N> load;
  load.row = thread_index() / kRowChunks;
  load.chunk = thread_index() % kRowChunks;
#pragma unroll
  for (int i = 0; i < load.kPixels; ++i) {
    const int64_t m = first_pixel + load.row + i * kLoadRows;
    const Pixel pixel = pixel_of(m, s.P, s.Q);
    load.image[i] = m < pixels(s) ? a.x + nhwc(pixel.n, 0, 0, 0, s.H, s.W, s.C) : nullptr;
    load.top[i] = tap(pixel.p, 0, s.stride_h, s.pad_h, s.dilation_h);
    load.left[i] = tap(pixel.q, 0, s.stride_w, s.pad_w, s.dilation_w);
  }
#pragma unroll
  for (int i = 0; i < load.kFilters; ++i) {
    const int32_t k = first_filter + load.row + i * kLoadRows;
    load.filter[i] = k < s.K ? a.weight + static_cast<int64_t>(k) * s.R * s.S * s.C : nullptr;
  }
  return load;
}

// Starts the copies of depth [step * kTileD, + kTileD) to one stage's buffers.
template <class T, int TILE_N>
FR_DEVICE void start_copies(const ConvArgs<T>& a, const ConvLoader<T, TILE_N>& load, int32_t step, T* patches,
                            T* weights) {
  const ConvShape& s = a.shape;
  const int32_t e = step * kTileD + load.chunk * kChunk;
  const Depth at = depth_of(e, s.S, s.C);
  const bool live = at.r < s.R;
#pragma unroll
  for (int i = 0; i < load.kPixels; ++i) {
    const int32_t h = load.top[i] + at.r * s.dilation_h, w = load.left[i] + at.s * s.dilation_w;
    const bool valid = live && load.image[i] != nullptr && inside(h, s.H) && inside(w, s.W);
    copy_async(patches + swizzled(load.row + i * kLoadRows, load.chunk),
               valid ? load.image[i] + nhwc(0, h, w, at.c, s.H, s.W, s.C) : a.x, valid);
  }
#pragma unroll
  for (int i = 0; i < load.kFilters; ++i) {
    const bool valid = live && load.filter[i] != nullptr;
    copy_async(weights + swizzled(load.row + i * kLoadRows, load.chunk), valid ? load.filter[i] + e : a.weight, valid);
  }
}

// sums of a warp's 64 x TILE_N / 2 += what one stage holds.
template <class T, int TILE_N>
FR_DEVICE void multiply_stage(const T* patches, const T* weights, int row, int column,
                              float (&sums)[4][TILE_N / 16][4]) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int d = 0; d < kTileD / 16; ++d) {
    uint32_t left[4][4], right[TILE_N / 32][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_matrices(left[i], patches + swizzled(row + 16 * i + lane % 16, 2 * d + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < TILE_N / 32; ++j) {
      load_matrices(right[j], weights + swizzled(column + 16 * j + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < TILE_N / 16; ++j) {
        multiply_add(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1], T{});
      }
    }
  }
}

// norm, residual, activation and rounding of the block's sums in shared memory [kTileM, TILE_N].
template <class T, int TILE_N>
FR_DEVICE void store_tile(const ConvArgs<T>& a, const float* sums, int64_t first_pixel, int32_t first_filter) {
  constexpr int kColumns = TILE_N / kChunk;
  const ConvShape& s = a.shape;
  const int32_t k = first_filter + thread_index() % kColumns * kChunk;
  float mean[kChunk], scale[kChunk], shift[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const bool live = k + i < s.K;
    const bool norm = live && a.var != nullptr;
    mean[i] = (norm ? a.mean[k + i] : 0.f) - (live && a.bias != nullptr ? a.bias[k + i] : 0.f);
    scale[i] = norm ? (a.gamma == nullptr ? 1.f : a.gamma[k + i]) * inverse_root(a.var[k + i] + a.eps) : 1.f;
    shift[i] = norm && a.beta != nullptr ? a.beta[k + i] : 0.f;
  }
  const int64_t size = pixels(s) * s.K;
  const bool whole = a.aligned && s.K % kChunk == 0;
  for (int row = thread_index() / kColumns; row < kTileM; row += kConvThreads / kColumns) {
    const int64_t m = first_pixel + row;
    if (m >= pixels(s) || k >= s.K) return;
    const int64_t at = m * s.K + k, end = whole ? size : (m + 1) * s.K;
    float z[kChunk], residual[kChunk] = {};
    if (a.residual != nullptr) load_elements<kChunk>(a.residual, at, end, whole, residual);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      z[i] = (sums[row * TILE_N + thread_index() % kColumns * kChunk + i] - mean[i]) * scale[i] + shift[i];
      z[i] = activate(z[i] + residual[i], a.activation);
    }
    store_elements<kChunk>(a.y, at, end, whole, z);
  }
}

// Two by two warps, each 64 pixels x TILE_N / 2 filters.
template <class T, int TILE_N>
FR_KERNEL(kConvThreads)
conv_bn_act_tile(const ConvArgs<T> a) {
  const ConvShape& s = a.shape;
  const int32_t filter_tiles = ceil_div(s.K, TILE_N), block = static_cast<int32_t>(block_index());
  const int64_t first_pixel = int64_t{block / filter_tiles} * kTileM;
  const int32_t first_filter = block % filter_tiles * TILE_N;
  T* const patches = reinterpret_cast<T*>(shared_memory());
  T* const weights = patches + kStages * kTileM * kTileD;
  const ConvLoader<T, TILE_N> load = make_loader<T, TILE_N>(a, first_pixel, first_filter);
  const int32_t steps = ceil_div(s.R * s.S * s.C, kTileD);
  auto start = [&](int32_t step) {
    const int stage = step % kStages;
    if (step < steps) start_copies(a, load, step, patches + stage * kTileM * kTileD, weights + stage * TILE_N * kTileD);
    commit_copies();  // an empty group keeps the count of what is under way
  };
  const int warp = thread_index() / 32, row = warp / 2 * 64, column = warp % 2 * (TILE_N / 2);
  float sums[4][TILE_N / 16][4] = {};
  for (int32_t step = 0; step < kStages - 1; ++step) start(step);
  for (int32_t step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    sync_block();  // all copies of this step have landed, and all have read what the next copies overwrite
    start(step + kStages - 1);
    const int stage = step % kStages;
    multiply_stage<T, TILE_N>(patches + stage * kTileM * kTileD, weights + stage * TILE_N * kTileD, row, column, sums);
  }
  wait_copies<0>();
  sync_block();
  float* const tile = reinterpret_cast<float*>(shared_memory());
  const int lane = thread_index() % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < TILE_N / 16; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        tile[(row + 16 * i + lane / 4 + e / 2 * 8) * TILE_N + column + 8 * j + lane % 4 * 2 + e % 2] = sums[i][j][e];
      }
    }
  }
  sync_block();
  store_tile<T, TILE_N>(a, tile, first_pixel, first_filter);
}

// `tile` is an index into kConvTiles or kNoTile.
template <class T, class Launch>
void launch_conv(const ConvArgs<T>& a, int64_t tile, const Launch& launch) {
  const int32_t filters = tile == kNoTile ? (a.shape.K <= 64 ? 64 : 128) : kConvTiles[tile].filters;
  if (filters == 64) {
    launch(conv_bn_act_tile<T, 64>, conv_blocks(a.shape, 64), kConvThreads, conv_shared_bytes<64>(), a);
  } else {
    launch(conv_bn_act_tile<T, 128>, conv_blocks(a.shape, 128), kConvThreads, conv_shared_bytes<128>(), a);
  }
}

}  // namespace fused_resnet
