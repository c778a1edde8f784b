// Any convolution as one product: the patches of a block of pixels are copied into chunks (a few vector moves against
// hundreds of multiply-adds on each word), so that strides, padding, dilation and groups end there.
#pragma once

#include "cpu/gemm.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

constexpr int64_t kDepthStep = 512;  // words of depth at a time: a block of 112 rows takes 224 KiB of the second cache

// One piece of a row's patch: `words` of them, whole vectors and a rest.
FR_INLINE void copy_words(uint32_t* to, const char* from, int64_t words) {
  for (; words >= kLanes; words -= kLanes, to += kLanes, from += kVectorBytes)
    *reinterpret_cast<WordsAt*>(to) = words_at(from);
#if defined(__AVX512F__)
  const auto rest = static_cast<__mmask16>((1u << words) - 1);
  _mm512_mask_storeu_epi32(to, rest, _mm512_maskz_loadu_epi32(rest, from));
#else
  for (; words > 0; --words, ++to, from += 4) memcpy(to, from, 4);
#endif
}

// Words [first, last) of a segment of which only elements [low, high) are inside of the image, zeros elsewhere.
template <class T>
void copy_edge(uint32_t* to, const T* segment, int64_t first, int64_t last, int64_t low, int64_t high) {
  constexpr int64_t kPerWord = 4 / sizeof(T);
  memset(to, 0, static_cast<size_t>(4 * (last - first)));
  const int64_t from = first * kPerWord > low ? first * kPerWord : low;
  const int64_t end = last * kPerWord < high ? last * kPerWord : high;
  if (from < end)
    memcpy(reinterpret_cast<T*>(to) + (from - first * kPerWord), segment + from,
           static_cast<size_t>(end - from) * sizeof(T));
}

// One segment of a patch: where it starts, and which of its elements are inside of the image.
template <class T>
struct Patch {
  const T* from;
  int32_t low, high;
};

// Segment i of the patches of `rows` pixels from `at` on.
template <class T>
void find_patches(const ConvRun<T>& c, const Segments& seg, Pixel at, int64_t rows, int32_t i, int32_t group,
                  Patch<T>* out) {
  const ConvShape& s = c.shape;
  const bool touch = seg.count == s.R;  // also where S is 1: then both readings say the same
  const int32_t columns = touch ? s.S : 1, inner = seg.elements / columns;
  const int32_t r = touch ? i : i / s.S, column = touch ? 0 : i % s.S;
  for (Patch<T>* end = out + rows; out != end;) {
    const int32_t h = tap(at.p, r, s.stride_h, s.pad_h, s.dilation_h);
    const T* row = c.x + nhwc(at.n, h, 0, group * inner, s.H, s.W, s.C);
    for (; at.q < s.Q && out != end; ++at.q, ++out) {
      const int32_t w = tap(at.q, column, s.stride_w, s.pad_w, s.dilation_w);
      const int32_t low = w < 0 ? -w : 0, high = w + columns > s.W ? s.W - w : columns;
      const bool there = inside(h, s.H) && low < high;
      *out = Patch<T>{row + int64_t{w} * s.C, there ? low * inner : 0, there ? high * inner : 0};
    }
    if (at.q == s.Q) at = at.p + 1 == s.P ? Pixel{at.n + 1, 0, 0} : Pixel{at.n, at.p + 1, 0};
  }
}

// Depth [d0, d1) of the patches of rows [first, last) -> chunks [..][rows][kChunk]; `patches` is room for the rows.
template <class T>
void gather(const ConvRun<T>& c, const Segments& seg, int32_t group, int64_t first, int64_t last, int64_t d0,
            int64_t d1, Patch<T>* patches, uint32_t* a) {
  const int64_t rows = last - first;
  const int32_t full = seg.elements * sizeof(T) == 4 * static_cast<size_t>(seg.words) ? seg.elements : -1;
  const Pixel at = pixel_of(first, c.shape.P, c.shape.Q);
  for (int64_t d = d0; d < d1;) {
    const auto i = static_cast<int32_t>(d / seg.words);
    const int64_t start = int64_t{i} * seg.words, stop = start + seg.words < d1 ? start + seg.words : d1;
    find_patches(c, seg, at, rows, i, group, patches);
    while (d < stop) {
      const int64_t offset = d - d0, room = kChunk - offset % kChunk, count = stop - d < room ? stop - d : room;
      uint32_t* to = a + offset / kChunk * rows * kChunk + offset % kChunk;
      for (int64_t m = 0; m < rows; ++m, to += kChunk) {
        const Patch<T>& p = patches[m];
        if (p.low != 0 || p.high != full) {
          copy_edge(to, p.from, d - start, d - start + count, p.low, p.high);
        } else if (count == kChunk) {
          copy_words(to, reinterpret_cast<const char*>(p.from) + 4 * (d - start), kChunk);
        } else {
          copy_words(to, reinterpret_cast<const char*>(p.from) + 4 * (d - start), count);
        }
      }
      d += count;
    }
  }
}

// Steps of nearly the same size, whole chunks each.
FR_INLINE int64_t depth_step(int64_t depth) {
  const int64_t steps = ceil_div(depth, kDepthStep);
  return ceil_div(ceil_div(depth, steps), kChunk) * kChunk;
}

template <class T>
int64_t direct_scratch(const ConvShape& s, const Part& part) {
  if (in_strips(s)) return strip_scratch(s, sizeof(T));
  const Segments seg = segments_of<T>(s);
  const int64_t depth = int64_t{seg.count} * seg.words, step = depth_step(depth), rows = part.last_row - part.first_row;
  const int64_t sums = step < depth ? rows * (part.last_panel - part.first_panel) * kPanel : 0;
  return 4 * (rows * step + sums) + rows * static_cast<int64_t>(sizeof(Patch<T>));
}

template <class T>
FR_INLINE Finish<T> finish_of(const ConvRun<T>& c, int64_t k, int64_t at, int64_t columns) {
  const T* residual = c.residual == nullptr ? nullptr : c.residual + at;
  return {c.scale + k, c.shift + k, residual, c.y + at, c.shape.K, columns, c.activation};
}

// The lines in which a tile ends, while the one before it computes: y is written, the residual read.
template <class T>
FR_INLINE void ask_for(const ConvRun<T>& c, int64_t at, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i, at += c.shape.K) {
    for (int64_t line = 0; line < kPanel; line += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(c.y + at + line, 1);
      if (c.residual != nullptr && c.residual != c.y) __builtin_prefetch(c.residual + at + line);
    }
  }
}

// Panels [first, last) of one group.
template <class T>
void direct_group(const ConvRun<T>& c, const Segments& seg, int32_t group, const Part& part, uint32_t* a) {
  const ConvShape& s = c.shape;
  const int64_t depth = int64_t{seg.count} * seg.words, step = depth_step(depth), rows = part.last_row - part.first_row;
  const int64_t filters = s.K / s.groups, padded = ceil_div<int64_t>(filters, kLanes) * kLanes;
  const bool plain = in_place(s, sizeof(T));
  const int64_t row = plain ? s.C * static_cast<int64_t>(sizeof(T)) : 4 * kChunk,
                chunk = plain ? kChunk : rows * kChunk;
  auto* patches = reinterpret_cast<Patch<T>*>(a + rows * step);
  auto* sums = reinterpret_cast<float*>(patches + rows);
  for (int64_t d0 = 0; d0 < depth; d0 += step) {
    const int64_t d1 = d0 + step < depth ? d0 + step : depth;
    const auto* from = reinterpret_cast<const char*>(a);
    if (plain) {
      from = reinterpret_cast<const char*>(c.x) + part.first_row * row + 4 * d0;
    } else {
      gather(c, seg, group, part.first_row, part.last_row, d0, d1, patches, a);
    }
    const auto product = [&](int64_t p, int64_t t, int64_t count, int64_t i) {
      const int64_t column = p * kPanel, width = padded - column < kPanel ? kLanes : kPanel;
      const int64_t k = group * filters + column, left = filters - column, at = (part.first_row + t) * s.K + k;
      const bool turn = p + 1 == part.last_panel;  // next come the first panel's weights of the next depth
      const uint32_t* own = c.weights + depth * group * padded;
      const uint32_t* next = own + (turn ? depth * part.first_panel + d1 : depth * (p + 1) + d0) * kPanel;
      const Finish<T> finish = finish_of(c, k, at, left < width ? left : width);
      if (d1 == depth && t + 2 * count <= rows) ask_for(c, at + count * s.K, count);
      run_tile<T>(
          count, width == kPanel,
          {reinterpret_cast<const uint32_t*>(from + t * row), own + depth * column + d0 * width, row, chunk, d1 - d0,
           next + i * (d1 - d0) * kLine, sums + (p - part.first_panel) * rows * kPanel + t * width, d0 > 0},
          d1 == depth ? &finish : nullptr);
    };
    if (step >= depth && depth * padded <= kWeightsAtHand) {  // whole rows of y are written one after the other
      by_tiles(rows, kRows, [&](int64_t t, int64_t count, int64_t) {
        for (int64_t p = part.first_panel; p < part.last_panel; ++p) product(p, t, count, 0);
      });
      continue;
    }
    for (int64_t p = part.first_panel; p < part.last_panel; ++p)
      by_tiles(rows, kRows, [&](int64_t t, int64_t count, int64_t i) { product(p, t, count, i); });
  }
}

template <class T>
void direct_strips(const ConvRun<T>& c, const Part& part, void* scratch) {
  const ConvShape& s = c.shape;
  const int64_t padded = ceil_div<int64_t>(s.K, kLanes) * kLanes;
  by_strips(
      s, c.x, T{}, c.weights, part, kRows, scratch, [&](int64_t panel, int64_t m, int64_t count, const Strip& strip) {
        const int64_t k = panel * kPanel, width = padded - k < kPanel ? kLanes : kPanel, left = s.K - k;
        const Finish<T> end = finish_of(c, k, m * s.K + k, left < width ? left : width);
        if (m + 2 * count <= part.last_row) ask_for(c, (m + count) * s.K + k, count);
        with_tile<kRows>(count, width == kPanel, [&]<int ROWS, int COLUMNS>() { tile<T, ROWS, COLUMNS>(strip, end); });
      });
}

template <class T>
void direct(const ConvRun<T>& c, const Part& part, void* scratch) {
  if (in_strips(c.shape)) return direct_strips(c, part, scratch);
  const Segments seg = segments_of<T>(c.shape);
  const int64_t panels = ceil_div<int64_t>(c.shape.K / c.shape.groups, kPanel);
  for (int64_t group = part.first_panel / panels; group * panels < part.last_panel; ++group) {
    const int64_t first = part.first_panel - group * panels, last = part.last_panel - group * panels;
    direct_group(c, seg, static_cast<int32_t>(group),
                 Part{part.first_row, part.last_row, first > 0 ? first : 0, last < panels ? last : panels},
                 static_cast<uint32_t*>(scratch));
  }
}

}  // namespace
}  // namespace FR_ISA
}  // namespace fused_resnet
