// How a block of conv_bn_act gets its operands into shared memory. Buffers are rows of 64 bytes: of patches a row for
// each pixel (of each group), of weights one for each filter, as deep as 64 bytes are.
#pragma once

#include "cuda/conv_epilogue.cuh"

namespace fused_resnet {

constexpr int kConvThreads = 128;
constexpr int kTileM = 128;                           // rows of patches
constexpr int kRowChunks = 4;                         // of 16 bytes
constexpr int kLoadRows = kConvThreads / kRowChunks;  // rows that the block's threads fill at once

template <class T>
constexpr int kChunk = 16 / sizeof(T);
template <class T>
constexpr int kTileD = kRowChunks * kChunk<T>;

// By 16 bytes that go past registers; by 8 bytes, where a group has 4, 12, 20 ... channels of 16 bits; through
// registers, where there is a prologue, or element by element.
enum class Load : int { chunks, halves, registers };

// Number of a chunk in a buffer: eight rows of one column of chunks, which a warp reads at once, lie in eight different
// 16-byte columns of the 128 bytes that shared memory delivers at a time.
FR_HD int32_t swizzled(int32_t row, int32_t chunk) {
  return row * kRowChunks + (chunk ^ (row >> 1 & 3));
}

template <class T>
FR_DEVICE T* chunk_of(T* buffer, int32_t row, int32_t chunk) {
  return buffer + swizzled(row, chunk) * kChunk<std::remove_const_t<T>>;
}

// What a block works on: rows of patches are `bundle` groups of `pixels` pixels each, rows of weights `bundle` groups
// of TILE_N filters.
struct ConvTilePlace {
  int64_t pixel;
  int32_t group, filter;  // the first ones; filter counts within its group
  int32_t bundle, pixels;
};

// Where a block's tile lies: filters fastest, then groups, so that blocks in flight share pixels.
FR_HD ConvTilePlace conv_tile_place(const ConvShape& s, int64_t block, int32_t tile_n, int32_t bundle) {
  const int32_t filter_tiles = ceil_div(s.K / s.groups, tile_n), bundles = ceil_div(s.groups, bundle);
  const auto at = static_cast<int32_t>(block), pixels = kTileM / bundle;
  return {int64_t{at / filter_tiles / bundles} * pixels, at / filter_tiles % bundles * bundle,
          at % filter_tiles * tile_n, bundle, pixels};
}

FR_HD int64_t conv_blocks(const ConvShape& s, int32_t tile_n, int32_t bundle) {
  return ceil_div(pixels(s), int64_t{kTileM / bundle}) * ceil_div(s.K / s.groups, tile_n) * ceil_div(s.groups, bundle);
}

// The element of the depth behind `at`.
FR_HD Depth next_depth(Depth at, int32_t S, int32_t channels) {
  if (++at.c < channels) return at;
  return at.s + 1 < S ? Depth{at.r, at.s + 1, 0} : Depth{at.r + 1, 0, 0};
}

// What a thread copies: one column of chunks of every kLoadRows-th row.
template <class T, int TILE_N>
struct ConvLoader {
  static constexpr int kBundle = TILE_N < 64 ? 4 : 1;  // at most
  static constexpr int kPixels = kTileM / kLoadRows, kFilters = kBundle * TILE_N / kLoadRows;
  const T *image[kPixels], *filter[kFilters];  // null beyond the last
  int32_t top[kPixels], left[kPixels];         // of the window
  int32_t group[kPixels];
  int32_t row, chunk, channels;  // channels of a group
  // What is on its way through registers, and whether element j of chunk i lies in an image: bit i * kChunk + j.
  Bytes16 held[kPixels];
  uint32_t valid;
};

template <class T, int TILE_N>
FR_DEVICE ConvLoader<T, TILE_N> make_loader(const ConvArgs<T>& a, const ConvTilePlace& place) {
  const ConvShape& s = a.shape;
  const int32_t filters = s.K / s.groups;
  ConvLoader<T, TILE_N> load;
  load.row = thread_index() / kRowChunks;
  load.chunk = thread_index() % kRowChunks;
  load.channels = s.C / s.groups;
  const Pixel first = pixel_of(place.pixel, s.P, s.Q);
#pragma unroll
  for (int i = 0; i < load.kPixels; ++i) {
    const int32_t row = load.row + i * kLoadRows, slot = load.kBundle > 1 ? row / place.pixels : 0;
    const Pixel pixel = pixel_behind(first, row - slot * place.pixels, s.P, s.Q);
    load.group[i] = place.group + slot;
    const bool live = pixel.n < s.N && load.group[i] < s.groups;
    load.image[i] = live ? a.x + nhwc(pixel.n, 0, 0, load.group[i] * load.channels, s.H, s.W, s.C) : nullptr;
    load.top[i] = tap(pixel.p, 0, s.stride_h, s.pad_h, s.dilation_h);
    load.left[i] = tap(pixel.q, 0, s.stride_w, s.pad_w, s.dilation_w);
  }
#pragma unroll
  for (int i = 0; i < load.kFilters; ++i) {
    const int32_t row = load.row + i * kLoadRows, slot = row / TILE_N, k = place.filter + row % TILE_N;
    const bool live = k < filters && slot < place.bundle && place.group + slot < s.groups;
    const int64_t filter = int64_t{place.group + slot} * filters + k;
    load.filter[i] = live ? a.weight + filter * s.R * s.S * load.channels : nullptr;
  }
  return load;
}

// Where thread's row i reads for depth `at`; null outside of the image.
template <class T, int TILE_N>
FR_DEVICE const T* source(const ConvArgs<T>& a, const ConvLoader<T, TILE_N>& load, int i, const Depth& at) {
  const ConvShape& s = a.shape;
  const int32_t h = load.top[i] + at.r * s.dilation_h, w = load.left[i] + at.s * s.dilation_w;
  const bool live = load.image[i] != nullptr && at.r < s.R && inside(h, s.H) && inside(w, s.W);
  return live ? load.image[i] + nhwc(0, h, w, at.c, s.H, s.W, s.C) : nullptr;
}

// Starts the copies of BYTES each of depth [step * kTileD, + kTileD), past registers.
template <int BYTES, class T, int TILE_N>
FR_DEVICE void copy_patches(const ConvArgs<T>& a, const ConvLoader<T, TILE_N>& load, int32_t step, T* patches) {
  constexpr int kCount = BYTES / sizeof(T);
#pragma unroll
  for (int part = 0; part < kChunk<T>; part += kCount) {
    const Depth at = depth_of(step * kTileD<T> + load.chunk * kChunk<T> + part, a.shape.S, load.channels);
#pragma unroll
    for (int i = 0; i < load.kPixels; ++i) {
      const T* from = source(a, load, i, at);
      copy_async<BYTES>(chunk_of(patches, load.row + i * kLoadRows, load.chunk) + part, from == nullptr ? a.x : from,
                        from != nullptr);
    }
  }
}

template <int BYTES, class T, int TILE_N>
FR_DEVICE void copy_weights(const ConvArgs<T>& a, const ConvLoader<T, TILE_N>& load, int32_t step, T* weights) {
  constexpr int kCount = BYTES / sizeof(T);
#pragma unroll
  for (int part = 0; part < kChunk<T>; part += kCount) {
    const int32_t e = step * kTileD<T> + load.chunk * kChunk<T> + part;
    const bool live = e < a.shape.R * a.shape.S * load.channels;
#pragma unroll
    for (int i = 0; i < load.kFilters; ++i) {
      const bool valid = live && load.filter[i] != nullptr;
      copy_async<BYTES>(chunk_of(weights, load.row + i * kLoadRows, load.chunk) + part,
                        valid ? load.filter[i] + e : a.weight, valid);
    }
  }
}

// The same element by element.
template <class T, int TILE_N>
FR_DEVICE void store_weights(const ConvArgs<T>& a, const ConvLoader<T, TILE_N>& load, int32_t step, T* weights) {
  const int32_t first = step * kTileD<T> + load.chunk * kChunk<T>;
  for (int i = 0; i < load.kFilters; ++i) {
    T* to = chunk_of(weights, load.row + i * kLoadRows, load.chunk);
    for (int j = 0; j < kChunk<T>; ++j) {
      const bool valid = load.filter[i] != nullptr && first + j < a.shape.R * a.shape.S * load.channels;
      to[j] = valid ? load.filter[i][first + j] : T{};
    }
  }
}

// Loads the patches of a step into registers; what lies outside is zero.
template <class T, int TILE_N>
FR_DEVICE void hold_patches(const ConvArgs<T>& a, ConvLoader<T, TILE_N>& load, int32_t step) {
  const Depth first = depth_of(step * kTileD<T> + load.chunk * kChunk<T>, a.shape.S, load.channels);
  load.valid = 0;
#pragma unroll
  for (int i = 0; i < load.kPixels; ++i) {
    load.held[i] = Bytes16{};
    if (a.chunks) {
      const T* from = source(a, load, i, first);
      if (from == nullptr) continue;
      load.held[i] = *reinterpret_cast<const Bytes16*>(from);
      load.valid |= ((1u << kChunk<T>)-1u) << i * kChunk<T>;
    } else {
      T chunk[kChunk<T>];
      Depth at = first;
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const T* from = source(a, load, i, at);
        chunk[j] = from == nullptr ? T{} : *from;
        load.valid |= (from == nullptr ? 0u : 1u) << (i * kChunk<T> + j);
        at = next_depth(at, a.shape.S, load.channels);
      }
      memcpy(&load.held[i], chunk, 16);
    }
  }
}

// The prologue's norms for the channels of a chunk of row i.
template <class T, int TILE_N>
FR_DEVICE void prologue_norms(const ConvArgs<T>& a, const ConvLoader<T, TILE_N>& load, int i, Depth at,
                              ChannelNorm<Accumulator<T>> (&norm)[kChunk<T>]) {
#pragma unroll
  for (int j = 0; j < kChunk<T>; ++j) {
    norm[j] = channel_norm(a.pre, load.group[i] * load.channels + at.c);
    at = next_depth(at, a.shape.S, load.channels);
  }
}

// Stores what is held, through the prologue where there is one: what lies outside stays zero.
template <class T, int TILE_N>
FR_DEVICE void store_patches(const ConvArgs<T>& a, const ConvLoader<T, TILE_N>& load, int32_t step, T* patches) {
  const Depth at = depth_of(step * kTileD<T> + load.chunk * kChunk<T>, a.shape.S, load.channels);
  const bool prologue = a.pre.var != nullptr;
  ChannelNorm<Accumulator<T>> norm[kChunk<T>];
  if (prologue && load.kBundle == 1) prologue_norms(a, load, 0, at, norm);
#pragma unroll
  for (int i = 0; i < load.kPixels; ++i) {
    Bytes16 held = load.held[i];
    const uint32_t valid = load.valid >> i * kChunk<T> & ((1u << kChunk<T>)-1u);
    if (prologue && valid != 0) {
      if (load.kBundle > 1) prologue_norms(a, load, i, at, norm);
      T chunk[kChunk<T>];
      memcpy(chunk, &held, 16);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        if (valid >> j & 1) round_to(chunk[j], activate(normalised(widen(chunk[j]), norm[j]), a.pre_activation));
      }
      memcpy(&held, chunk, 16);
    }
    *reinterpret_cast<Bytes16*>(chunk_of(patches, load.row + i * kLoadRows, load.chunk)) = held;
  }
}

// Begins to fill one stage's buffers with a step.
template <Load LOAD, class T, int TILE_N>
FR_DEVICE void begin_stage(const ConvArgs<T>& a, ConvLoader<T, TILE_N>& load, int32_t step, T* patches, T* weights) {
  constexpr int kBytes = LOAD == Load::halves ? 8 : 16;
  if constexpr (LOAD == Load::registers) {
    hold_patches(a, load, step);
    if (!a.chunks) return store_weights(a, load, step, weights);
  } else {
    copy_patches<kBytes>(a, load, step, patches);
  }
  copy_weights<kBytes>(a, load, step, weights);
}

}  // namespace fused_resnet
