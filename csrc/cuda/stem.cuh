// Family stem for sm_80 and up: y = maxpool(act(norm(conv(x, w) + bias))), 3x3 pool with stride 2 and padding 1, for
// images of up to four channels in any strides.
//
// A block makes a tile of POOL_ROWS x 8 pooled pixels x FILTERS filters. The window of the image that it needs is
// loaded once, packed to four channels; the products read the window itself, not patches of it: an element of a patch
// is a pixel's place plus a tap's. The convolution's pixels, the pool's halo among them (14 % more for 7 x 8), stay in
// shared memory, rounded as they would be stored, and are pooled there. Blocks stay: weights are loaded once, tiles
// follow each other. Elements of 16 bits are multiplied by tensor cores, wider ones in their own precision.
#pragma once

#include "cuda/conv_epilogue.cuh"
#include "cuda/fragment.cuh"

namespace fused_resnet {

constexpr int kStemThreads = 256;
constexpr int kStemBlocks = 2;  // of a multiprocessor: one loads while the other multiplies
constexpr int kPack = 4;        // channels of a packed pixel
constexpr int kPoolColumns = 8;
constexpr int kStemColumns = 2 * kPoolColumns + 1;  // of the convolution

// A tile's sizes: 7 x 8 pooled pixels are 255 of the convolution, of 256 that eight warps make.
template <class T>
struct StemTile {
  static constexpr int kPoolRows = sizeof(T) == 2 ? 7 : 3, kRows = 2 * kPoolRows + 1;
  static constexpr int kPixels = kRows * kStemColumns, kPadded = (kPixels + 31) / 32 * 32;
  static constexpr int kFilters = sizeof(T) == 8 ? 32 : 64;
  static constexpr int kWarpRows = kPadded / 32, kWarpColumns = kStemThreads / 32 / kWarpRows;  // warps
  static constexpr int kPitch = kFilters + 16 / sizeof(T);                                      // of a pixel's sums
};

template <class T>
struct alignas(sizeof(T) == 2 ? 8 : 16) PackedPixel {
  T channels[kPack];
};

template <class T>
struct StemArgs : ConvArgs<T> {
  int64_t x_n, x_c, x_h, x_w;  // strides
};

// Where things lie in shared memory, in bytes, and the tiles of a problem.
struct StemPlan {
  int32_t taps;   // R * S, for tensor cores rounded up to the four of one step
  int32_t pitch;  // packed pixels of a filter's row: a row ends in another 16-byte column than the next
  int32_t window_rows, window_columns;
  int64_t window_at, sums_at, vectors_at, offsets_at, bytes;
  int32_t tile_rows, tile_columns, filter_tiles;
};

template <class T>
FR_HD StemPlan stem_plan(const ConvShape& s) {
  using Tile = StemTile<T>;
  StemPlan plan{};
  const int32_t cells = s.R * s.S, pixel = kPack * static_cast<int32_t>(sizeof(T));
  plan.taps = sizeof(T) == 2 ? ceil_div(cells, 4) * 4 : cells;
  plan.pitch = sizeof(T) == 2 ? plan.taps + 2 : plan.taps | 1;
  plan.window_rows = (Tile::kRows - 1) * s.stride_h + s.R;
  plan.window_columns = (kStemColumns - 1) * s.stride_w + s.S;
  auto after = [](int64_t at, int64_t bytes) { return at + ceil_div(bytes, int64_t{16}) * 16; };
  plan.window_at = after(0, int64_t{Tile::kFilters} * plan.pitch * pixel);
  plan.sums_at = after(plan.window_at, int64_t{plan.window_rows} * plan.window_columns * pixel);
  plan.vectors_at = after(plan.sums_at, Tile::kPadded * Tile::kPitch * sizeof(T));
  plan.offsets_at = after(plan.vectors_at, Tile::kFilters * sizeof(ChannelNorm<Accumulator<T>>));
  plan.bytes = after(plan.offsets_at, plan.taps * sizeof(int32_t));
  plan.tile_rows = ceil_div(pooled(s.P), Tile::kPoolRows);
  plan.tile_columns = ceil_div(pooled(s.Q), kPoolColumns);
  plan.filter_tiles = ceil_div(s.K, Tile::kFilters);
  return plan;
}

FR_HD int64_t stem_tiles(const ConvShape& s, const StemPlan& plan) {
  return int64_t{s.N} * plan.tile_rows * plan.tile_columns * plan.filter_tiles;
}

// Tile -> image, first pooled row and column, first filter. Filters are slowest: a block loads their weights anew.
struct StemPlace {
  int64_t n;
  int32_t row, column, filter;
};

template <class T>
FR_HD StemPlace stem_place(const ConvShape& s, const StemPlan& plan, int64_t tile) {
  const int64_t rows = tile / plan.tile_columns, images = rows / plan.tile_rows;
  return {images % s.N, static_cast<int32_t>(rows % plan.tile_rows) * StemTile<T>::kPoolRows,
          static_cast<int32_t>(tile % plan.tile_columns) * kPoolColumns,
          static_cast<int32_t>(images / s.N) * StemTile<T>::kFilters};
}

// Weights [FILTERS, pitch] of packed pixels, zero beyond the channels, the taps and the filters; norms; where each tap
// lies in the window, -1 beyond the last.
template <class T>
FR_DEVICE void load_filters(const StemArgs<T>& a, const StemPlan& plan, int32_t first, char* shared) {
  using Tile = StemTile<T>;
  const ConvShape& s = a.shape;
  T* const weights = reinterpret_cast<T*>(shared);
  const int32_t row = plan.pitch * kPack;
  for (int32_t i = thread_index(); i < Tile::kFilters * row; i += kStemThreads) {
    const int32_t k = first + i / row, cell = i % row / kPack, c = i % kPack;
    const bool live = k < s.K && cell < s.R * s.S && c < s.C;
    weights[i] = live ? a.weight[(int64_t{k} * s.R * s.S + cell) * s.C + c] : T{};
  }
  auto* const norms = reinterpret_cast<ChannelNorm<Accumulator<T>>*>(shared + plan.vectors_at);
  for (int32_t i = thread_index(); i < Tile::kFilters && first + i < s.K; i += kStemThreads)
    norms[i] = filter_norm(a, first + i);
  auto* const offsets = reinterpret_cast<int32_t*>(shared + plan.offsets_at);
  for (int32_t i = thread_index(); i < plan.taps; i += kStemThreads)
    offsets[i] = i < s.R * s.S ? i / s.S * plan.window_columns + i % s.S : -1;
}

// The window, zero outside of the image and beyond the channels.
template <class T>
FR_DEVICE void load_window(const StemArgs<T>& a, const StemPlan& plan, const StemPlace& place, T* window) {
  const ConvShape& s = a.shape;
  const int32_t top = tap(2 * place.row - 1, 0, s.stride_h, s.pad_h, 1);
  const int32_t left = tap(2 * place.column - 1, 0, s.stride_w, s.pad_w, 1);
  for (int32_t i = thread_index(); i < plan.window_rows * plan.window_columns; i += kStemThreads) {
    const int32_t h = top + i / plan.window_columns, w = left + i % plan.window_columns;
    const bool live = inside(h, s.H) && inside(w, s.W);
    const T* from = a.x + place.n * a.x_n + h * a.x_h + w * a.x_w;
    PackedPixel<T> pixel;
#pragma unroll
    for (int c = 0; c < kPack; ++c) pixel.channels[c] = live && c < s.C ? from[c * a.x_c] : T{};
    reinterpret_cast<PackedPixel<T>*>(window)[i] = pixel;
  }
}

// Where the window of the convolution's pixel m of the tile begins; those beyond the last repeat it.
template <class T>
FR_DEVICE int32_t pixel_offset(const ConvShape& s, const StemPlan& plan, int32_t m) {
  const int32_t at = m < StemTile<T>::kPixels ? m : StemTile<T>::kPixels - 1;
  return at / kStemColumns * s.stride_h * plan.window_columns + at % kStemColumns * s.stride_w;
}

// sums of a warp's 32 pixels x 8 * J filters from `column` on.
template <class T, int J>
FR_DEVICE void multiply_window(const StemPlan& plan, const T* weights, const T* window, const int32_t* offsets,
                               const int32_t (&pixel)[2][2], int column, Accumulator<T> (&sums)[2][J][4]) {
  const int lane = thread_index() % 32;
  if constexpr (sizeof(T) == 2) {
    for (int32_t step = 0; step < plan.taps; step += 4) {
      uint32_t left[2][4], right[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // two taps further
        const int32_t offset = offsets[step + lane % 4 / 2 + 2 * half];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int low = 0; low < 2; ++low) {
            const T* from = window + (pixel[i][low] + offset) * kPack + lane % 2 * 2;
            left[i][2 * half + low] = offset < 0 ? 0 : *reinterpret_cast<const uint32_t*>(from);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < J; ++j) {
        if (j % 2 == 0) {
          const int filter = column + 8 * j + lane % 8 + lane / 16 * 8;
          load_matrices(right, weights + (filter * plan.pitch + step) * kPack + lane / 8 % 2 * 8);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) multiply_add(sums[i][j], left[i], right[j % 2 * 2], right[j % 2 * 2 + 1], T{});
      }
    }
  } else {
    for (int32_t step = 0; step < plan.taps; ++step) {
      const int32_t offset = offsets[step];
      multiply_wide<T, kPack>(
          [&](int i, int e) { return window + (pixel[i][e / 2] + offset) * kPack; },
          [&](int j, int e) { return weights + ((column + sum_column<T>(lane, j, e)) * plan.pitch + step) * kPack; },
          sums);
    }
  }
}

// Norm, activation and rounding: the convolution's pixels [kPadded, kPitch] in shared memory.
template <class T, int J>
FR_DEVICE void store_pixels(const StemArgs<T>& a, const ChannelNorm<Accumulator<T>>* norms, int row, int column,
                            const Accumulator<T> (&sums)[2][J][4], T* out) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int j = 0; j < J; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int32_t k = column + sum_column<T>(lane, j, e);
      const ChannelNorm<Accumulator<T>> norm = norms[k];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Accumulator<T> z = activate(normalised(sums[i][j][e], norm), a.activation);
        round_to(out[(row + sum_row(lane, i, e)) * StemTile<T>::kPitch + k], z);
      }
    }
  }
}

// The pool over what store_pixels has left; NaN wins, as in stock's.
template <class T>
FR_DEVICE void store_pooled(const StemArgs<T>& a, const StemPlace& place, const T* tile) {
  using Tile = StemTile<T>;
  using A = Accumulator<T>;
  const ConvShape& s = a.shape;
  constexpr int kOctets = Tile::kFilters / kOctet;
  const int32_t P = pooled(s.P), Q = pooled(s.Q);
  for (int32_t at = thread_index(); at < Tile::kPoolRows * kPoolColumns * kOctets; at += kStemThreads) {
    const int32_t octet = at % kOctets * kOctet, k = place.filter + octet, pixel = at / kOctets;
    const int32_t row = pixel / kPoolColumns, column = pixel % kPoolColumns;
    if (k >= s.K || place.row + row >= P || place.column + column >= Q) continue;
    A best[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) best[i] = -static_cast<A>(INFINITY);
    for (int32_t cell = 0; cell < 9; ++cell) {
      const int32_t r = cell / 3, t = cell % 3;
      if (!inside(2 * (place.row + row) - 1 + r, s.P) || !inside(2 * (place.column + column) - 1 + t, s.Q)) continue;
      const T* from = tile + ((2 * row + r) * kStemColumns + 2 * column + t) * Tile::kPitch + octet;
      A values[kOctet];
      load_elements<kOctet>(from, 0, kOctet, true, values);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) best[i] = values[i] > best[i] || values[i] != values[i] ? values[i] : best[i];
    }
    const int64_t to = nhwc(place.n, place.row + row, place.column + column, k, P, Q, s.K);
    store_elements<kOctet>(a.y, to, to - k + s.K, a.aligned && s.K % kOctet == 0, best);
  }
}

template <class T>
FR_WIDE_KERNEL(kStemThreads, kStemBlocks)
stem_tiles_kernel(const StemArgs<T> a) {
  using Tile = StemTile<T>;
  using A = Accumulator<T>;
  const ConvShape& s = a.shape;
  const StemPlan plan = stem_plan<T>(s);
  char* const shared = shared_memory();
  T *const window = reinterpret_cast<T*>(shared + plan.window_at), *const tile =
                                                                       reinterpret_cast<T*>(shared + plan.sums_at);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int row = warp % Tile::kWarpRows * 32, column = warp / Tile::kWarpRows * (Tile::kFilters / Tile::kWarpColumns);
  int32_t pixel[2][2], loaded = -1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int low = 0; low < 2; ++low) pixel[i][low] = pixel_offset<T>(s, plan, row + sum_row(lane, i, 2 * low));
  }
  for (int64_t at = block_index(); at < stem_tiles(s, plan); at += grid_blocks()) {
    const StemPlace place = stem_place<T>(s, plan, at);
    if (place.filter != loaded) load_filters(a, plan, place.filter, shared);
    loaded = place.filter;
    load_window(a, plan, place, window);
    sync_block();  // all is there, and all have pooled the tile before
    A sums[2][Tile::kFilters / Tile::kWarpColumns / 8][4] = {};
    multiply_window(plan, reinterpret_cast<const T*>(shared), window,
                    reinterpret_cast<const int32_t*>(shared + plan.offsets_at), pixel, column, sums);
    store_pixels(a, reinterpret_cast<const ChannelNorm<A>*>(shared + plan.vectors_at), row, column, sums, tile);
    sync_block();  // all have read the window and written their pixels
    store_pooled(a, place, tile);
  }
}

// `limit` is how many blocks stay.
template <class T, class Launch>
void launch_stem(const StemArgs<T>& a, int64_t limit, const Launch& launch) {
  const StemPlan plan = stem_plan<T>(a.shape);
  const int64_t tiles = stem_tiles(a.shape, plan);
  launch(stem_tiles_kernel<T>, tiles < limit ? tiles : limit, kStemThreads, plan.bytes, a);
}

}  // namespace fused_resnet
