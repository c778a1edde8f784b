// The product under every convolution on the CPU: sums[rows, columns] += a[rows, depth] * b[depth, columns].
//
// Depth is counted in words of 32 bits: one float, or two bf16 whose products are added at once. `a` lies in chunks
// [depth / kChunk][rows][kChunk], or is x itself; `b` in panels [depth][columns] of one or two vectors. A tile of kRows
// x 2 vectors of sums stays in registers over the whole depth: two loads of b and kRows broadcasts feed 2 * kRows
// multiply-adds.
#pragma once

#include "cpu/convs.h"
#include "cpu/strips.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

constexpr int kRows = (kRegisters - 4) / 2;  // 2 * kRows sums, two vectors of b, one broadcast: one register is left
constexpr int kPanel = 2 * kLanes;
constexpr int kLine = 16;  // words of a cache line

// Sums of products of words: one of `a` with a vector of them, a column of `b`.
template <class T>
struct Word;

template <>
struct Word<float> {
  using Sums = Floats;
  using Column = Words;
  static FR_INLINE Words column(const uint32_t* b) { return words_at(b); }
  static FR_INLINE Floats add_product(uint32_t a, Words b, Floats sum) {
    return sum + float_of_bits(a) * reinterpret_cast<Floats>(b);
  }
};

template <>
struct Word<bf16> {
  using Sums = Floats;
  using Column = Words;
  static FR_INLINE Words column(const uint32_t* b) { return words_at(b); }
  static FR_INLINE Floats add_product(uint32_t a, Words b, Floats sum) {
#if defined(__AVX512BF16__)
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(pair),
                                                     reinterpret_cast<__m512bh>(b)));
#else
    sum += float_of_bits(a << 16) * reinterpret_cast<Floats>(b << 16);
    return sum + float_of_bits(a & 0xffff0000u) * reinterpret_cast<Floats>(b & 0xffff0000u);
#endif
  }
};

// What happens to finished sums: y = clamp(sum * scale + shift + residual), rounded once.
template <class T>
struct Finish {
  const float *scale, *shift;  // of the tile's first column
  const T* residual;           // may be null, and may be y
  T* y;                        // of the tile's first row and column
  int64_t row;                 // elements from one row to the next
  int64_t columns;             // how many of the panel's there are
  Activation activation;
};

struct Operands {
  const uint32_t *a, *b;
  int64_t row, chunk;  // from one row of a to the next in bytes, from one chunk to the next in words
  int64_t depth;
  const uint32_t* ahead;  // what the product after this one reads: a line of it is asked for with each word of depth
  float* sums;            // [rows, panel width]: where the sums start from, if `onward`, and end, if there is no Finish
  bool onward;
};

FR_INLINE void limits(Activation activation, Floats* low, Floats* high) {
  *low = all(activation == Activation::identity ? -INFINITY : 0.0f);
  *high = all(activation == Activation::relu6 ? 6.0f : INFINITY);
}

// e^x to two units of the last place: 2^n times Taylor's polynomial of what is left, |r| <= ln(2) / 2.
FR_INLINE Floats exponential(Floats x) {
  x = clamp(x, all(-104.0f), all(104.0f));  // where the result is 0 and infinite
  const Floats magic = all(0x1.8p23f), shifted = x * 1.44269504f + magic, n = shifted - magic;
  const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Floats sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = ((sum * r + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6;
  sum = ((sum * r + 0.5f) * r + 1.0f) * r + 1.0f;
  const Ints power = reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(magic), half = power >> 1;
  return sum * reinterpret_cast<Floats>((half + 127) << 23) * reinterpret_cast<Floats>((power - half + 127) << 23);
}

// As `activate` of one float.
FR_INLINE Floats activated(Floats z, Activation activation) {
  if (activation == Activation::silu) return z / (1.0f + exponential(-z));
  if (activation == Activation::hardswish) return z * clamp(z + 3.0f, all(0.0f), all(6.0f)) / 6.0f;
  Floats low, high;
  limits(activation, &low, &high);
  return clamp(z, low, high);
}

// For part of a panel and for activations that are no clamp.
template <class T>
void finish_slowly(const float* sums, int64_t rows, int64_t width, const Finish<T>& f) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* residual = f.residual == nullptr ? nullptr : f.residual + i * f.row;
    T* y = f.y + i * f.row;
    int64_t k = 0;
    for (; k + kLanes <= f.columns; k += kLanes) {
      Floats z = load(sums + i * width + k) * load(f.scale + k) + load(f.shift + k);
      if (residual != nullptr) z += load(residual + k);
      store(y + k, activated(z, f.activation));
    }
    for (; k < f.columns; ++k) {
      float z = sums[i * width + k] * f.scale[k] + f.shift[k];
      if (residual != nullptr) z += widen(residual[k]);
      round_to(y[k], activate(z, f.activation));
    }
  }
}

// For all columns of the first `rows` rows, and activations that are clamps.
template <class T, int ROWS, int COLUMNS>
FR_INLINE void finish_whole(const Floats (&sum)[ROWS][COLUMNS], int64_t rows, const Finish<T>& f) {
  Floats low, high;
  limits(f.activation, &low, &high);
  const T* residual = f.residual;
#pragma GCC unroll 2
  for (int j = 0; j < COLUMNS; ++j) {
    const Floats scale = load(f.scale + j * kLanes), shift = load(f.shift + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      if (i >= rows) break;
      const int64_t at = i * f.row + j * kLanes;
      Floats z = sum[i][j] * scale + shift;
      if (residual != nullptr) z += load(residual + at);
      store(f.y + at, clamp(z, low, high));
    }
  }
}

template <class T, int ROWS, int COLUMNS>
FR_INLINE void put_down(const Floats (&sum)[ROWS][COLUMNS], float* to) {
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) store(to + (i * COLUMNS + j) * kLanes, sum[i][j]);
  }
}

template <class T, int ROWS, int COLUMNS>
FR_INLINE void finish(const Floats (&sum)[ROWS][COLUMNS], const Finish<T>& f) {
  if (f.columns == COLUMNS * kLanes && f.activation <= Activation::relu6) return finish_whole(sum, ROWS, f);
  float buffer[ROWS * COLUMNS * kLanes];
  put_down<T>(sum, buffer);
  finish_slowly(buffer, ROWS, COLUMNS * kLanes, f);
}

template <class T, int ROWS, int COLUMNS>
void tile(const Operands& o, const Finish<T>* f) {
  Floats sum[ROWS][COLUMNS];
  constexpr int kWidth = COLUMNS * kLanes;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) sum[i][j] = o.onward ? load(o.sums + i * kWidth + j * kLanes) : Floats{};
  }
  const uint32_t *a = o.a, *b = o.b, *ahead = o.ahead;
  for (int64_t depth = o.depth; depth > 0; depth -= kChunk, a += o.chunk) {
    const uint32_t *word = a, *end = a + (depth < kChunk ? depth : kChunk);
    for (; word != end; ++word, b += kWidth, ahead += kLine) {
      __builtin_prefetch(ahead, 0, 2);
      add_word<Word<T>>(reinterpret_cast<const char*>(word), o.row, ~0u, b, sum);
    }
  }
  if (f == nullptr) return put_down<T>(sum, o.sums);
  finish(sum, *f);
}

template <class T, int ROWS, int COLUMNS>
void tile(const Strip& strip, const Finish<T>& f) {
  Floats sum[ROWS][COLUMNS] = {};
  add_strip<Word<T>>(strip, sum);
  finish(sum, f);
}

template <class T>
FR_INLINE void run_tile(int64_t rows, bool two, const Operands& o, const Finish<T>* f) {
  with_tile<kRows>(rows, two, [&]<int ROWS, int COLUMNS>() { tile<T, ROWS, COLUMNS>(o, f); });
}

}  // namespace
}  // namespace FR_ISA
}  // namespace fused_resnet
