// Convolutions whose patches are read where they lie: the rows of x under a band of rows of y are copied once, with
// their padding, and a row of the kernel reads its columns there, because neighbouring pixels touch in memory: the
// pixels of a tile are `step` bytes apart. Gathering patches would copy each value R * S times. Weights are packed as
// for direct.h and gemm8.h.
#pragma once

#include "cpu/simd.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

constexpr int64_t kBandBytes = 192 << 10;  // of a band's copies: they stay in the second cache

// What a tile of pixels of one row of y reads.
struct Strip {
  const char* first;     // where the first pixel's columns start in the kernel's first row
  int64_t pitch, step;   // bytes from one row of the kernel to the next, from one pixel to the next
  int32_t count, words;  // rows of the kernel; words of the columns of one
  uint32_t last;         // the bits of the last word that are the pixel's own: behind them anything may lie
  const uint32_t* weights;
};

template <class M, int ROWS, int COLUMNS>
FR_INLINE void add_word(const char* a, int64_t step, uint32_t mask, const uint32_t* b,
                        typename M::Sums (&sum)[ROWS][COLUMNS]) {
  typename M::Column column[COLUMNS];
#pragma GCC unroll 2
  for (int j = 0; j < COLUMNS; ++j) column[j] = M::column(b + j * kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    uint32_t word;
    memcpy(&word, a + i * step, sizeof word);
    word &= mask;
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) sum[i][j] = M::add_product(word, column[j], sum[i][j]);
  }
}

template <class M, int ROWS, int COLUMNS>
FR_INLINE void add_strip(const Strip& strip, typename M::Sums (&sum)[ROWS][COLUMNS]) {
  const uint32_t* b = strip.weights;
  for (int32_t r = 0; r < strip.count; ++r) {
    const char *a = strip.first + r * strip.pitch, *end = a + 4 * (strip.words - 1);
    for (; a != end; a += 4, b += COLUMNS * kLanes) add_word<M>(a, strip.step, ~0u, b, sum);
    add_word<M>(a, strip.step, strip.last, b, sum);
    b += COLUMNS * kLanes;
  }
}

// Rows of y whose copies are made at once.
FR_INLINE int64_t band_rows(const ConvShape& s, int64_t element) {
  const int64_t fit = (kBandBytes / strip_pitch(s, element) - s.R) / s.stride_h + 1;
  return fit < 1 ? 1 : fit > s.P ? s.P : fit;
}

FR_INLINE int64_t strip_scratch(const ConvShape& s, int64_t element) {
  return ((band_rows(s, element) - 1) * s.stride_h + s.R) * strip_pitch(s, element);
}

// Row h of the padded image n; `zero` is what borders hold.
template <class T>
void copy_padded(const ConvShape& s, const T* x, T zero, int64_t n, int32_t h, T* to) {
  const int64_t elements = strip_pitch(s, sizeof(T)) / static_cast<int64_t>(sizeof(T));
  const int64_t left = int64_t{s.pad_w} * s.C, width = int64_t{s.W} * s.C;
  const bool there = inside(h - s.pad_h, s.H) && left < elements;
  const int64_t own = !there ? 0 : width < elements - left ? width : elements - left, start = there ? left : 0;
  for (int64_t i = 0; i < start; ++i) to[i] = zero;
  if (own > 0) memcpy(to + start, x + nhwc(n, h - s.pad_h, 0, 0, s.H, s.W, s.C), static_cast<size_t>(own) * sizeof(T));
  for (int64_t i = start + own; i < elements; ++i) to[i] = zero;
}

// Rows in tiles of nearly the same size, of at most `most`: calls f(first row, rows, which tile).
template <class F>
FR_INLINE void by_tiles(int64_t rows, int64_t most, const F& f) {
  const int64_t tiles = ceil_div(rows, most), each = rows / tiles, longer = rows % tiles;
  for (int64_t i = 0, at = 0; i < tiles; ++i) {
    const int64_t count = each + (i < longer);
    f(at, count, i);
    at += count;
  }
}

// Calls f(panel, first pixel of y, how many, strip) for every tile of the part.
template <class T, class F>
FR_INLINE void by_strips(const ConvShape& s, const T* x, T zero, const uint32_t* weights, const Part& part,
                         int rows_of_tile, void* scratch, const F& f) {
  constexpr int64_t kPanelWords = 2 * kLanes;
  const Segments seg = segments_of<T>(s);
  const int32_t rest = seg.elements * static_cast<int32_t>(sizeof(T)) % 4;
  const int64_t pitch = strip_pitch(s, sizeof(T)), step = int64_t{s.stride_w} * s.C * sizeof(T);
  const int64_t depth = int64_t{seg.count} * seg.words;
  Strip strip{nullptr, pitch, step, s.R, seg.words, rest == 0 ? ~0u : (1u << 8 * rest) - 1, nullptr};
  const auto* copies = static_cast<const char*>(scratch);
  for (int64_t m = part.first_row; m < part.last_row;) {
    const Pixel start = pixel_of(m, s.P, s.Q);
    const int64_t below = start.p + band_rows(s, sizeof(T)) < s.P ? start.p + band_rows(s, sizeof(T)) : s.P;
    const int64_t end = m - start.q + (below - start.p) * s.Q, last = end < part.last_row ? end : part.last_row;
    const int64_t rows = ceil_div<int64_t>(start.q + last - m, s.Q);
    for (int64_t h = 0; h < (rows - 1) * s.stride_h + s.R; ++h)
      copy_padded(s, x, zero, start.n, start.p * s.stride_h + static_cast<int32_t>(h),
                  reinterpret_cast<T*>(static_cast<char*>(scratch) + h * pitch));
    const auto tiles = [&](const auto& g) {
      for (int64_t p = 0, at = m; p < rows; ++p) {
        const int64_t q = p == 0 ? start.q : 0, own = s.Q - q < last - at ? s.Q - q : last - at;
        by_tiles(own, rows_of_tile, [&](int64_t from, int64_t count, int64_t) {
          strip.first = copies + p * s.stride_h * pitch + (q + from) * step;
          g(at + from, count);
        });
        at += own;
      }
    };
    const auto tile = [&](int64_t panel, int64_t at, int64_t count) {
      strip.weights = weights + depth * panel * kPanelWords;
      f(panel, at, count, strip);
    };
    if (depth * s.K <= kWeightsAtHand) {  // whole rows of y are written one after the other
      tiles([&](int64_t at, int64_t count) {
        for (int64_t p = part.first_panel; p < part.last_panel; ++p) tile(p, at, count);
      });
    } else {
      for (int64_t p = part.first_panel; p < part.last_panel; ++p)
        tiles([&](int64_t at, int64_t count) { tile(p, at, count); });
    }
    m = last;
  }
}

// Calls f.operator()<rows, columns>() for a tile of as many rows and of one or two vectors.
template <int ROWS, class F>
FR_INLINE void with_tile(int64_t rows, bool two, const F& f) {
  if constexpr (ROWS > 0) {
    if (rows != ROWS) return with_tile<ROWS - 1>(rows, two, f);
    if (two) return f.template operator()<ROWS, 2>();
    f.template operator()<ROWS, 1>();
  }
}

}  // namespace
}  // namespace FR_ISA
}  // namespace fused_resnet
