// 3x3 convolutions with stride 1 by Winograd's minimal filtering F(m x m, 3 x 3), m = 2 or 4 (Lavin and Gray,
// arXiv:1509.09308): y = A'[(G g G') . (B' d B)]A on tiles d of (m + 2)^2 pixels, as (m + 2)^2 products of [tiles, C]
// and [C, K]; 2.25 or 4 times fewer multiplications. Always in fp32. For m = 4 the points are 0, +-sqrt(1/2), +-sqrt(2)
// and infinity: the largest error over 512 channels is 0.27 times that of the usual 0, +-1, +-2 (3.6e-6
// against 1.3e-5).
#pragma once

#include "cpu/gemm.h"
#include "cpu/winograd_tiles.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

template <int M>
struct Filtering;

template <>
struct Filtering<2> {
  static FR_INLINE void input(const Floats* d, Floats* v) {
    v[0] = d[2] - d[0];
    v[1] = d[2] + d[1];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }
  static FR_INLINE void output(const Floats* m, Floats* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
};

template <>
struct Filtering<4> {
  static constexpr float kA = 0.70710678118654752f, kB = 1.4142135623730950f;
  static FR_INLINE void input(const Floats* d, Floats* v) {
    v[0] = d[0] - 2.5f * d[2] + d[4];
    const Floats even_a = d[4] - 2.0f * d[2], odd_a = d[3] - 2.0f * d[1];
    const Floats even_b = d[4] - 0.5f * d[2], odd_b = d[3] - 0.5f * d[1];
    v[1] = even_a + kA * odd_a;
    v[2] = even_a - kA * odd_a;
    v[3] = even_b + kB * odd_b;
    v[4] = even_b - kB * odd_b;
    v[5] = d[1] - 2.5f * d[3] + d[5];
  }
  static FR_INLINE void output(const Floats* m, Floats* y) {
    const Floats sum_a = m[1] + m[2], sum_b = m[3] + m[4];
    const Floats odd_a = kA * (m[1] - m[2]), odd_b = kB * (m[3] - m[4]);
    y[0] = m[0] + sum_a + sum_b;
    y[1] = odd_a + odd_b;
    y[2] = 0.5f * sum_a + 2.0f * sum_b;
    y[3] = 0.5f * odd_a + 2.0f * odd_b + m[5];
  }
};

// One vector of channels of one tile of x -> v, `position` floats from one position to the next.
template <class T, int M>
FR_INLINE void transform_input(const T* x, const ConvShape& s, int32_t h, int32_t w, bool whole, float* v,
                               int64_t position) {
  constexpr int N = M + 2;
  Floats part[N][N];
#pragma GCC unroll 6
  for (int j = 0; j < N; ++j) {
    Floats column[N], out[N];
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) {
      const bool there = whole || (inside(h + i, s.H) && inside(w + j, s.W));
      column[i] = there ? load(x + (int64_t{i} * s.W + j) * s.C) : Floats{};
    }
    Filtering<M>::input(column, out);
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) part[i][j] = out[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    Floats out[N];
    Filtering<M>::input(part[i], out);
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) store(v + (i * N + j) * position, out[j]);
  }
}

// Tiles [first, last) -> v [N * N][channels / kChunk][all][kChunk], from row `at` on.
template <class T, int M>
void input_tiles(const ConvRun<T>& c, int64_t first, int64_t last, int64_t all, int64_t at, float* v) {
  const ConvShape& s = c.shape;
  const WinogradTiles tiles = winograd_tiles(s, M);
  const int64_t position = winograd_chunks(s) * all * kChunk;
  for (int64_t t = first; t < last; ++t) {
    const Pixel tile = pixel_of(t, tiles.rows, tiles.columns);
    const int32_t h = tile.p * M - s.pad_h, w = tile.q * M - s.pad_w;
    const bool whole = h >= 0 && w >= 0 && h + M + 2 <= s.H && w + M + 2 <= s.W;
    const T* x = c.x + nhwc(tile.n, h, w, 0, s.H, s.W, s.C);
    float* to = v + (at + t - first) * kChunk;
    for (int64_t channel = 0; channel < s.C; channel += kLanes) {
      float* words = to + channel / kChunk * all * kChunk + channel % kChunk;
      if (whole) {
        transform_input<T, M>(x + channel, s, h, w, true, words, position);
      } else {
        transform_input<T, M>(x + channel, s, h, w, false, words, position);
      }
    }
  }
}

// Activations that are no clamp, out of line: they keep registers of the loop that none of the others needs.
template <class T>
__attribute__((noinline)) void store_activated(T* y, const Floats& z, Activation activation) {
  for (int lane = 0; lane < kLanes; ++lane) round_to(y[lane], activate(z[lane], activation));
}

// One vector of filters of one tile: sums m -> y, `position` floats from one position to the next.
template <class T, int M>
FR_INLINE void transform_output(const float* m, int64_t position, const ConvRun<T>& c, Pixel at, int64_t k, Floats low,
                                Floats high) {
  constexpr int N = M + 2;
  const ConvShape& s = c.shape;
  Floats part[M][N];
#pragma GCC unroll 6
  for (int j = 0; j < N; ++j) {
    Floats column[N], out[M];
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) column[i] = load(m + (i * N + j) * position);
    Filtering<M>::output(column, out);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) part[i][j] = out[i];
  }
  const Floats scale = load(c.scale + k), shift = load(c.shift + k);
  const int32_t columns = s.Q - at.q < M ? s.Q - at.q : M;
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    if (at.p + i >= s.P) break;
    Floats out[M];
    Filtering<M>::output(part[i], out);
    const int64_t row = nhwc(at.n, at.p + i, at.q, static_cast<int32_t>(k), s.P, s.Q, s.K);
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) {
      if (j >= columns) break;
      Floats z = out[j] * scale + shift;
      if (c.residual != nullptr) z += load(c.residual + row + int64_t{j} * s.K);
      if (c.activation <= Activation::relu6) {
        store(c.y + row + int64_t{j} * s.K, clamp(z, low, high));
      } else {
        store_activated(c.y + row + int64_t{j} * s.K, z, c.activation);
      }
    }
  }
}

template <class T>
int64_t winograd_scratch(const ConvShape& s, int m, const Part& part, bool shared) {
  const int64_t tiles = part.last_row - part.first_row;
  return 4 * (m + 2) * (m + 2) * tiles * (kPanel + (shared ? 0 : winograd_chunks(s) * kChunk));
}

template <class T, int M>
void winograd_part(const ConvRun<T>& c, const Part& part, const float* shared, float* scratch) {
  constexpr int64_t kPositions = (M + 2) * (M + 2);
  const ConvShape& s = c.shape;
  const WinogradTiles tiles = winograd_tiles(s, M);
  const int64_t rows = part.last_row - part.first_row, all = shared == nullptr ? rows : tiles.count;
  const int64_t position = winograd_chunks(s) * all * kChunk;
  float* sums = scratch;
  const float* v = shared == nullptr ? scratch + kPositions * rows * kPanel : shared + part.first_row * kChunk;
  if (shared == nullptr) input_tiles<T, M>(c, part.first_row, part.last_row, rows, 0, const_cast<float*>(v));
  Floats low, high;
  limits(c.activation, &low, &high);
  for (int64_t p = part.first_panel; p < part.last_panel; ++p) {
    const int64_t k = p * kPanel, width = s.K - k < kPanel ? kLanes : kPanel;
    for (int64_t at = 0; at < kPositions; ++at) {
      const uint32_t* a = reinterpret_cast<const uint32_t*>(v + at * position);
      const uint32_t* b = c.weights + kPositions * s.C * k + at * s.C * width;
      by_tiles(rows, kRows, [&](int64_t t, int64_t count, int64_t i) {
        run_tile<float>(count, width == kPanel,
                        {a + t * kChunk, b, 4 * kChunk, all * kChunk, s.C, b + s.C * (width + i * kLine),
                         sums + (at * rows + t) * width, false},
                        nullptr);
      });
    }
    for (int64_t t = 0; t < rows; ++t) {
      Pixel at = pixel_of(part.first_row + t, tiles.rows, tiles.columns);
      at.p *= M;
      at.q *= M;
      for (int64_t j = 0; j < width; j += kLanes)
        transform_output<T, M>(sums + t * width + j, rows * width, c, at, k + j, low, high);
    }
  }
}

template <class T>
void winograd(const ConvRun<T>& c, int m, const Part& part, const float* shared, void* scratch) {
  auto* floats = static_cast<float*>(scratch);
  m == 4 ? winograd_part<T, 4>(c, part, shared, floats) : winograd_part<T, 2>(c, part, shared, floats);
}

template <class T>
void winograd_input(const ConvRun<T>& c, int m, int64_t first, int64_t last, float* shared) {
  const int64_t all = winograd_tiles(c.shape, m).count;
  m == 4 ? input_tiles<T, 4>(c, first, last, all, first, shared)
         : input_tiles<T, 2>(c, first, last, all, first, shared);
}

}  // namespace
}  // namespace FR_ISA
}  // namespace fused_resnet
