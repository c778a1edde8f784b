// The product under a convolution of 8-bit values: sums[rows, columns] += a[rows, depth] * b[depth, columns] in 32
// bits, which are exact: 66,000 products of 255 and 127 fit.
//
// Depth is counted in words of four uint8 of `a` and four int8 of `b`, whose products one instruction adds up where the
// processor has VNNI; elsewhere pairs of 16 bits do, without saturation on the way. The layout is that of gemm.h.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/int8.h"
#include "cpu/simd.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

constexpr int kRows8 = (kRegisters - 4) / 2;
constexpr int kPanel8 = 2 * kLanes;

typedef int32_t IntsAt __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint8_t BytesAt __attribute__((vector_size(kLanes), aligned(1), may_alias));

FR_INLINE Ints ints_at(const int32_t* from) {
  return *reinterpret_cast<const IntsAt*>(from);
}

#if defined(__AVX512VNNI__)

struct Column {
  Words all;
};

FR_INLINE Column column_at(const uint32_t* b) {
  return {words_at(b)};
}

FR_INLINE Ints dot(const uint32_t* a, const Column& b, Ints sum) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(static_cast<int>(*a)), reinterpret_cast<__m512i>(b.all)));
}

#else

typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));

// Values 0 and 2, and 1 and 3 of every word in 16 bits.
struct Column {
  Shorts even, odd;
};

FR_INLINE Column column_at(const uint32_t* b) {
  const Words words = words_at(b);
  return {reinterpret_cast<Shorts>(words << 8) >> 8, reinterpret_cast<Shorts>(words) >> 8};
}

// Sums of neighbours' products.
FR_INLINE Ints madd(Words a, Shorts b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Ints>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  const Ints both = reinterpret_cast<Ints>(b), low = reinterpret_cast<Ints>(a & 0xffffu);
  return low * (both << 16 >> 16) + reinterpret_cast<Ints>(a >> 16) * (both >> 16);
#endif
}

FR_INLINE Ints dot(const uint32_t* a, const Column& b, Ints sum) {
  const Words even = Words{} + (*a & 0x00ff00ffu), odd = Words{} + (*a >> 8 & 0x00ff00ffu);
  return sum + madd(even, b.even) + madd(odd, b.odd);
}

#endif

struct Operands8 {
  const uint32_t *a, *b;
  int64_t chunk, depth;  // words: from one chunk of a to the next; in all
  const int32_t* start;
};

template <int ROWS, int COLUMNS>
void tile8(const Operands8& o, int32_t* sums) {
  constexpr int kWidth = COLUMNS * kLanes;
  Ints sum[ROWS][COLUMNS];
#pragma GCC unroll 2
  for (int j = 0; j < COLUMNS; ++j) {
    const Ints start = ints_at(o.start + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) sum[i][j] = start;
  }
  const uint32_t *a = o.a, *b = o.b;
  for (int64_t depth = o.depth; depth > 0; depth -= kChunk, a += o.chunk) {
    const uint32_t *word = a, *end = a + (depth < kChunk ? depth : kChunk);
    for (; word != end; ++word, b += kWidth) {
      Column column[COLUMNS];
#pragma GCC unroll 2
      for (int j = 0; j < COLUMNS; ++j) column[j] = column_at(b + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; ++j) sum[i][j] = dot(word + i * kChunk, column[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) *reinterpret_cast<IntsAt*>(sums + i * kWidth + j * kLanes) = sum[i][j];
  }
}

using Tile8 = void (*)(const Operands8&, int32_t* sums);

template <int ROWS>
constexpr Tile8 tile8_of(int64_t rows, bool two) {
  if constexpr (ROWS == 0) {
    return nullptr;
  } else {
    if (rows == ROWS) return two ? tile8<ROWS, 2> : tile8<ROWS, 1>;
    return tile8_of<ROWS - 1>(rows, two);
  }
}

// Rounds |z| < 2^22 to the nearest, ties to even.
FR_INLINE Ints rounded(Floats z) {
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23
  return reinterpret_cast<Ints>(z + magic) - reinterpret_cast<Ints>(magic);
}

// uint8 of a z between -zero and 255 - zero.
FR_INLINE void store8(uint8_t* to, Floats z, int32_t zero) {
  const Ints q = rounded(z) + zero;
#if defined(__AVX512F__)
  __m128i bytes = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(q));
  asm("" : "+x"(bytes));  // as one instruction with its store it is slow on AMD's cores
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
#else
  *reinterpret_cast<BytesAt*>(to) = __builtin_convertvector(q, Bytes);
#endif
}

// Compilers widen bytes one by one.
FR_INLINE Ints widened(const uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(*reinterpret_cast<const BytesAt*>(from), Ints);
#endif
}

FR_INLINE Floats residual_at(const uint8_t* from, int32_t zero) {
  return __builtin_convertvector(widened(from) - zero, Floats);
}

FR_INLINE Floats residual_at(const float* from, int32_t) {
  return load(from);
}

// What is done with the sums of a tile: rows of `width`, of which `columns` are filters.
template <class R, class Y>
void finish8(const Int8Run& c, const int32_t* sums, int64_t rows, int64_t width, int64_t columns, int64_t at,
             int64_t k) {
  constexpr bool kNarrow = sizeof(Y) == 1;
  const R* residual = static_cast<const R*>(c.residual);
  Y* y = static_cast<Y*>(c.y);
  const float most = 255 - c.y_zero, least = -c.y_zero;
  const float low = kNarrow && c.low < least ? least : c.low, high = kNarrow && c.high > most ? most : c.high;
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Floats scale = load(c.scale + k + j), shift = load(c.shift + k + j);
    const int64_t left = columns - j;
    for (int64_t i = 0; i < rows; ++i) {
      Floats z = __builtin_convertvector(ints_at(sums + i * width + j), Floats) * scale + shift;
      const int64_t to = at + i * c.shape.K + j;
      Y part[kLanes];
      if (residual != nullptr) {
        R own[kLanes] = {};
        const R* from = residual + to;
        if (left < kLanes) {
          for (int64_t l = 0; l < left; ++l) own[l] = from[l];
          from = own;
        }
        z += residual_at(from, c.residual_zero) * c.residual_scale;
      }
      Y* out = left < kLanes ? part : y + to;
      if constexpr (kNarrow) {
        z = z > low ? z : all(low);  // NaN, too
        store8(out, z < high ? z : all(high), c.y_zero);
      } else {
        store(out, clamp(z, all(low), all(high)));
      }
      if (left < kLanes) {
        for (int64_t l = 0; l < left; ++l) y[to + l] = part[l];
      }
    }
  }
}

}  // namespace
}  // namespace FR_ISA
}  // namespace fused_resnet
