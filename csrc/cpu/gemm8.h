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
#include "cpu/strips.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

// Few enough for the products of the next tile to start while the sums of this one become bytes.
constexpr int kRows8 = 6;
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

FR_INLINE Ints dot(uint32_t a, const Column& b, Ints sum) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(static_cast<int>(a)), reinterpret_cast<__m512i>(b.all)));
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

FR_INLINE Ints dot(uint32_t a, const Column& b, Ints sum) {
  const Words even = Words{} + (a & 0x00ff00ffu), odd = Words{} + (a >> 8 & 0x00ff00ffu);
  return sum + madd(even, b.even) + madd(odd, b.odd);
}

#endif

struct Word8 {
  using Sums = Ints;
  using Column = fused_resnet::FR_ISA::Column;
  static FR_INLINE Column column(const uint32_t* b) { return column_at(b); }
  static FR_INLINE Ints add_product(uint32_t a, const Column& b, Ints sum) { return dot(a, b, sum); }
};

struct Operands8 {
  const uint32_t *a, *b;
  int64_t row, chunk, depth;  // from one row of a to the next in bytes; from one chunk to the next, and all, in words
};

template <int ROWS, int COLUMNS>
FR_INLINE void add_words(const Operands8& o, Ints (&sum)[ROWS][COLUMNS]) {
  const uint32_t *a = o.a, *b = o.b;
  for (int64_t depth = o.depth; depth > 0; depth -= kChunk, a += o.chunk) {
    const uint32_t *word = a, *end = a + (depth < kChunk ? depth : kChunk);
    for (; word != end; ++word, b += COLUMNS * kLanes)
      add_word<Word8>(reinterpret_cast<const char*>(word), o.row, ~0u, b, sum);
  }
}

template <int ROWS, int COLUMNS>
FR_INLINE void add_words(const Strip& strip, Ints (&sum)[ROWS][COLUMNS]) {
  add_strip<Word8>(strip, sum);
}

// uint8 of a z between -zero and 255 - zero, rounded to the nearest, ties to even.
FR_INLINE void store8(uint8_t* to, Floats z, int32_t zero) {
  const Ints q = reinterpret_cast<Ints>(z + 0x1.8p23f) + zero;  // in its low byte, because that of 0x1.8p23 is zero
#if defined(__AVX512F__)
  __m128i bytes = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(q));
  asm("" : "+v"(bytes));  // as one instruction with its store it is slow on AMD's cores
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

// What the ends of a part's tiles have in common.
struct Ends8 : Int8Run {
  uint8_t least, most;  // what low and high are as bytes
  bool fits;            // no sum ends outside of int32
  bool plain;           // saturation is all that is left to do for bytes
};

FR_INLINE Ends8 ends_of(const Int8Run& c, int64_t depth, const Part& part) {
  const float lowest = static_cast<float>(-c.y_zero), highest = static_cast<float>(255 - c.y_zero);
  const auto byte = [&](float limit) {
    limit = limit < lowest ? lowest : limit > highest ? highest : limit;
    return static_cast<uint8_t>(c.y_zero + static_cast<int32_t>(limit + 0x1.8p23f - 0x1.8p23f));  // to the nearest
  };
  const float sums = static_cast<float>(depth) * (4 * 255 * 127),
              residual = 255 * (c.residual_scale < 0 ? -c.residual_scale : c.residual_scale);
  const int64_t padded = ceil_div<int64_t>(c.shape.K, kLanes) * kLanes, end = part.last_panel * kPanel8;
  Floats far{};
  for (int64_t k = part.first_panel * kPanel8; k < padded && k < end; k += kLanes) {
    const Floats scale = load(c.scale + k), shift = load(c.shift + k);
    const Floats z = (scale < 0 ? -scale : scale) * sums + (shift < 0 ? -shift : shift) + residual;
    far = z < 0x1p30f ? far : all(1.0f);  // NaN, too
  }
  bool fits = true;
  for (int i = 0; i < kLanes; ++i) fits = fits && far[i] == 0;
  const uint8_t least = byte(c.low), most = byte(c.high);
  return {c, least, most, fits, c.y_zero == 0 && least == 0 && most == 255};
}

// Where the sums of a tile end: rows of y from element `at` on, filters k and on, of which there are `columns`.
struct End8 {
  const Ends8* all;
  int64_t at, k, columns;
};

// y = what follows the sums, for vectors of filters.
template <class R, class Y>
struct Finish8 {
  static constexpr bool kNarrow = sizeof(Y) == 1;
  float low, high, residual_scale;
  int32_t residual_zero, y_zero;

  explicit Finish8(const Ends8& e)
      : low(kNarrow ? static_cast<float>(e.least - e.y_zero) : e.low),
        high(kNarrow ? static_cast<float>(e.most - e.y_zero) : e.high),
        residual_scale(e.residual_scale),
        residual_zero(e.residual_zero),
        y_zero(e.y_zero) {}

  FR_INLINE void operator()(Ints sum, Floats scale, Floats shift, const R* residual, Y* y) const {
    Floats z = __builtin_convertvector(sum, Floats) * scale + shift;
    if (residual != nullptr) z += residual_at(residual, residual_zero) * residual_scale;
    if constexpr (kNarrow) {
      z = z > low ? z : all(low);  // NaN, too
      store8(y, z < high ? z : all(high), y_zero);
    } else {
      store(y, clamp(z, all(low), all(high)));
    }
  }
};

// Of sums that were put down, rows of `width`.
template <class R, class Y>
void finish8(const End8& end, const int32_t* sums, int64_t rows, int64_t width) {
  const Ends8& c = *end.all;
  const Finish8<R, Y> finish(c);
  const R* residual = static_cast<const R*>(c.residual);
  Y* y = static_cast<Y*>(c.y);
  for (int64_t j = 0; j < end.columns; j += kLanes) {
    const Floats scale = load(c.scale + end.k + j), shift = load(c.shift + end.k + j);
    const int64_t left = end.columns - j;
    for (int64_t i = 0; i < rows; ++i) {
      const Ints sum = ints_at(sums + i * width + j);
      const int64_t to = end.at + i * c.shape.K + j;
      const R* from = residual == nullptr ? nullptr : residual + to;
      if (left >= kLanes) {
        finish(sum, scale, shift, from, y + to);
        continue;
      }
      R own[kLanes] = {};
      Y part[kLanes];
      for (int64_t l = 0; from != nullptr && l < left; ++l) own[l] = from[l];
      finish(sum, scale, shift, from == nullptr ? nullptr : own, part);
      for (int64_t l = 0; l < left; ++l) y[to + l] = part[l];
    }
  }
}

// The usual end, bytes of whole panels, with the sums still in registers.
template <int ROWS, int COLUMNS>
FR_INLINE void finish_bytes(const End8& end, const Ints (&sum)[ROWS][COLUMNS]) {
  const Ends8& c = *end.all;
  const Finish8<uint8_t, uint8_t> finish(c);
  const uint8_t* residual = c.residual == nullptr ? nullptr : static_cast<const uint8_t*>(c.residual) + end.at;
  uint8_t* y = static_cast<uint8_t*>(c.y) + end.at;
  const int64_t row = c.shape.K;  // bytes of y may be anything's, for all that a compiler knows: nothing is read again
#pragma GCC unroll 2
  for (int j = 0; j < COLUMNS; ++j) {
    const Floats scale = load(c.scale + end.k + j * kLanes), shift = load(c.shift + end.k + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const int64_t to = i * row + j * kLanes;
      finish(sum[i][j], scale, shift, residual == nullptr ? nullptr : residual + to, y + to);
    }
  }
}

#if defined(__AVX512BW__)

// Where sums fit, rows of two vectors, two by two: four vectors are put together before they are clamped, and stores
// are of 32 bytes. Saturation does not tell what is far above from what is far below int32: hence `fits`.
template <bool PLAIN, int ROWS>
FR_INLINE void finish_pairs(const End8& end, const Ints (&sum)[ROWS][2]) {
  const Ends8& c = *end.all;
  const uint8_t* residual = c.residual == nullptr ? nullptr : static_cast<const uint8_t*>(c.residual) + end.at;
  uint8_t* y = static_cast<uint8_t*>(c.y) + end.at;
  const int64_t row = c.shape.K;
  const float residual_scale = c.residual_scale;
  const float offset = residual == nullptr ? 0.0f : static_cast<float>(-c.residual_zero) * residual_scale;
  const Floats scale[2] = {load(c.scale + end.k), load(c.scale + end.k + kLanes)};
  const Floats shift[2] = {load(c.shift + end.k) + offset, load(c.shift + end.k + kLanes) + offset};
  const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(c.y_zero));
  const __m512i least = _mm512_set1_epi8(static_cast<char>(c.least));
  const __m512i most = _mm512_set1_epi8(static_cast<char>(c.most));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto rounded = [&](int i, int j) {
    Floats z = __builtin_convertvector(sum[i][j], Floats) * scale[j] + shift[j];
    if (residual != nullptr) z += residual_at(residual + i * row + j * kLanes, 0) * residual_scale;
    return _mm512_maskz_cvtps_epi32(0xffff, reinterpret_cast<__m512>(z));
  };
  const auto words = [&](int i) {
    const __m512i both = _mm512_packs_epi32(rounded(i, 0), rounded(i, 1));
    return PLAIN ? both : _mm512_adds_epi16(both, zero);
  };
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i += 2) {
    const __m512i first = words(i), second = i + 1 < ROWS ? words(i + 1) : first;
    __m512i bytes = _mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_packus_epi16(first, second));
    if (!PLAIN) bytes = _mm512_min_epu8(_mm512_max_epu8(bytes, least), most);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i * row), _mm512_castsi512_si256(bytes));
    if (i + 1 < ROWS)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + (i + 1) * row),
                          _mm512_maskz_extracti64x4_epi64(0xf, bytes, 1));
  }
}

template <int ROWS>
FR_INLINE void finish_bytes(const End8& end, const Ints (&sum)[ROWS][2]) {
  return end.all->plain ? finish_pairs<true>(end, sum) : finish_pairs<false>(end, sum);
}

#endif

// One tile; `A` is Operands8 or Strip.
template <class A, int ROWS, int COLUMNS>
void tile8(const A& a, const End8& end) {
  constexpr int kWidth = COLUMNS * kLanes;
  Ints sum[ROWS][COLUMNS];
#pragma GCC unroll 2
  for (int j = 0; j < COLUMNS; ++j) {
    const Ints start = ints_at(end.all->start + end.k + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) sum[i][j] = start;
  }
  add_words(a, sum);
  asm("" ::: "memory");  // nothing that the end reads takes a register until here
  const Ends8& c = *end.all;
  if (c.y_narrow && (c.residual_narrow || c.residual == nullptr) && end.columns == kWidth && c.fits)
    return finish_bytes(end, sum);
  alignas(64) int32_t sums[ROWS * kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) *reinterpret_cast<IntsAt*>(sums + i * kWidth + j * kLanes) = sum[i][j];
  }
  const auto finish = c.residual_narrow ? (c.y_narrow ? finish8<uint8_t, uint8_t> : finish8<uint8_t, float>)
                                        : (c.y_narrow ? finish8<float, uint8_t> : finish8<float, float>);
  finish(end, sums, ROWS, kWidth);
}

}  // namespace
}  // namespace FR_ISA
}  // namespace fused_resnet
