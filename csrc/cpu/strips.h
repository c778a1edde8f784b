// Convolutions of few channels, as a stem's: the rows of x under the kernel are copied once, with their padding, and a
// row of the kernel reads its columns where they lie, because neighbouring pixels touch in memory. So nothing is
// gathered: the pixels of a tile are `step` bytes apart in the copy. Weights are packed as for direct.h and gemm8.h.
#pragma once

#include "cpu/simd.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

// What a tile of pixels of one row of y reads.
struct Strip {
  const char* const* rows;  // [R] where the first pixel's columns start
  int32_t count, words;     // R; words of the columns of one row of the kernel
  int64_t step;             // bytes from one pixel to the next
  uint32_t last;            // the bits of the last word that are the pixel's own: behind them anything may lie
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
    const char *a = strip.rows[r], *end = a + 4 * (strip.words - 1);
    for (; a != end; a += 4, b += COLUMNS * kLanes) add_word<M>(a, strip.step, ~0u, b, sum);
    add_word<M>(a, strip.step, strip.last, b, sum);
    b += COLUMNS * kLanes;
  }
}

// The last R rows of x that were asked for, with their padding.
template <class T>
class Rows {
 public:
  // `room` has strip_scratch bytes; borders hold `zero`.
  Rows(const ConvShape& shape, const T* x, T zero, void* room)
      : s(shape), x(x), zero(zero), pitch(strip_pitch(shape, sizeof(T))), room(static_cast<char*>(room)) {}

  // Rows of the copy under the kernel at row p of image n.
  void at(int32_t n, int32_t p, const char** rows) {
    const int32_t first = p * s.stride_h, end = first + s.R;  // of the padded image
    int32_t h = n == image && first >= low && first < high ? high : first;
    for (; h < end; ++h) copy(n, h);
    image = n, low = first, high = end;
    for (int32_t r = 0; r < s.R; ++r) rows[r] = room + (first + r) % s.R * pitch;
  }

 private:
  void copy(int32_t n, int32_t h) {
    T* to = reinterpret_cast<T*>(room + h % s.R * pitch);
    const int64_t elements = pitch / static_cast<int64_t>(sizeof(T));
    const int64_t left = int64_t{s.pad_w} * s.C, width = int64_t{s.W} * s.C;
    const bool there = inside(h - s.pad_h, s.H) && left < elements;
    const int64_t own = !there ? 0 : width < elements - left ? width : elements - left, start = there ? left : 0;
    for (int64_t i = 0; i < start; ++i) to[i] = zero;
    if (own > 0)
      memcpy(to + start, x + nhwc(n, h - s.pad_h, 0, 0, s.H, s.W, s.C), static_cast<size_t>(own) * sizeof(T));
    for (int64_t i = start + own; i < elements; ++i) to[i] = zero;
  }

  const ConvShape& s;
  const T* x;
  const T zero;
  const int64_t pitch;
  char* const room;
  int32_t image = -1, low = 0, high = 0;  // what the copy holds: rows [low, high) of the padded image
};

// Calls f(first row of y, how many, strip) for every tile of the part; the weights are for it to fill in.
template <class T, class F>
FR_INLINE void by_strips(const ConvShape& s, const T* x, T zero, const Part& part, int rows_of_tile, void* scratch,
                         const F& f) {
  const Segments seg = segments_of<T>(s);
  const int32_t own = seg.elements * static_cast<int32_t>(sizeof(T)) % 4;
  const char *rows[kMostOfStrip], *start[kMostOfStrip];
  Rows<T> copies(s, x, zero, scratch);
  Pixel at = pixel_of(part.first_row, s.P, s.Q);
  for (int64_t m = part.first_row; m < part.last_row;) {
    copies.at(at.n, at.p, rows);
    const int64_t count = part.last_row - m < s.Q - at.q ? part.last_row - m : s.Q - at.q;
    const int64_t tiles = ceil_div<int64_t>(count, rows_of_tile), step = int64_t{s.stride_w} * s.C * sizeof(T);
    for (int64_t i = 0; i < tiles; ++i) {  // of nearly the same size
      const int64_t first = count * i / tiles, last = count * (i + 1) / tiles;
      for (int32_t r = 0; r < s.R; ++r) start[r] = rows[r] + (at.q + first) * step;
      f(m + first, last - first, Strip{start, s.R, seg.words, step, own == 0 ? ~0u : (1u << 8 * own) - 1, nullptr});
    }
    m += count;
    at = at.p + 1 == s.P ? Pixel{at.n + 1, 0, 0} : Pixel{at.n, at.p + 1, 0};
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
