// Compiled once for every instruction set, with -DFR_ISA=its name: see int8.h.
#include "cpu/gemm8.h"
#include "cpu/pool.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

FR_INLINE void copy8(uint32_t* to, const uint8_t* from, int64_t words) {
  int64_t i = 0;
  for (; i + kLanes <= words; i += kLanes) *reinterpret_cast<WordsAt*>(to + i) = words_at(from + 4 * i);
#if defined(__AVX512F__)
  if (i < words) {
    const auto some = static_cast<__mmask16>((1u << (words - i)) - 1);
    _mm512_mask_storeu_epi32(to + i, some, _mm512_maskz_loadu_epi32(some, from + 4 * i));
  }
#else
  for (; i < words; ++i) memcpy(to + i, from + 4 * i, 4);
#endif
}

// The patches of output pixels [first, last) -> chunks [..][rows][kChunk]. What is behind a segment in its last
// word meets weights of zero: it may be anything that can be read.
void gather8(const Int8Run& c, const Segments& depth, int64_t first, int64_t last, uint32_t* a) {
  const ConvShape& s = c.shape;
  const bool touch = depth.count == s.R;
  const int32_t columns = touch ? s.S : 1;
  const int64_t rows = last - first;
  const uint8_t* end = c.x + nhwc(s.N, 0, 0, 0, s.H, s.W, s.C);
  Pixel at = pixel_of(first, s.P, s.Q);
  for (int64_t m = 0; m < rows; ++m) {
    for (int32_t i = 0; i < depth.count; ++i) {
      const int32_t h = tap(at.p, touch ? i : i / s.S, s.stride_h, s.pad_h, s.dilation_h);
      const int32_t w = tap(at.q, touch ? 0 : i % s.S, s.stride_w, s.pad_w, s.dilation_w);
      const int32_t before = w < 0 ? -w : 0, inner = w + columns > s.W ? s.W - w : columns;  // columns inside
      const uint8_t* from = c.x + nhwc(at.n, h, w, 0, s.H, s.W, s.C);
      const bool row = inside(h, s.H);
      const bool whole = row && before == 0 && inner == columns && from + 4 * depth.words <= end;
      for (int64_t d = 0; d < depth.words;) {
        const int64_t place = int64_t{i} * depth.words + d, room = kChunk - place % kChunk;
        const int64_t count = depth.words - d < room ? depth.words - d : room;
        uint32_t* to = a + (place / kChunk * rows + m) * kChunk + place % kChunk;
        if (whole) {
          copy8(to, from + 4 * d, count);
        } else {
          memset(to, c.x_zero, static_cast<size_t>(4 * count));
          const int64_t low = before * s.C > 4 * d ? before * s.C : 4 * d;
          const int64_t high = inner * s.C < 4 * (d + count) ? inner * s.C : 4 * (d + count);
          if (row && low < high)
            memcpy(reinterpret_cast<uint8_t*>(to) + low - 4 * d, from + low, static_cast<size_t>(high - low));
        }
        d += count;
      }
    }
    if (++at.q == s.Q) {
      at.q = 0;
      if (++at.p == s.P) at = Pixel{at.n + 1, 0, 0};
    }
  }
}

int64_t scratch(const ConvShape& s, const Part& part) {
  if (in_strips(s)) return strip_scratch(s, 1);
  const int64_t chunks = ceil_div(depth_of(segments_of<uint8_t>(s)), kChunk);
  return 4 * (part.last_row - part.first_row) * chunks * kChunk;
}

// Panel p of `count` rows of y from row m on; `a` is for it to read.
template <class A>
FR_INLINE void run_tile8(const Ends8& ends, int64_t p, int64_t m, int64_t count, const A& a) {
  const int64_t K = ends.shape.K, padded = ceil_div<int64_t>(K, kLanes) * kLanes, k = p * kPanel8;
  const int64_t width = padded - k < kPanel8 ? kLanes : kPanel8, left = K - k;
  const End8 end{&ends, m * K + k, k, left < width ? left : width};
  with_tile<kRows8>(count, width == kPanel8, [&]<int ROWS, int COLUMNS>() { tile8<A, ROWS, COLUMNS>(a, end); });
}

// The lines in which a tile ends, while the one before it computes: y is written, the residual read.
void ask_for(const Int8Run& c, int64_t at, int64_t rows) {
  const int64_t y_bytes = c.y_narrow ? 1 : 4, residual_bytes = c.residual_narrow ? 1 : 4;
  for (int64_t i = 0; i < rows; ++i, at += c.shape.K) {
    __builtin_prefetch(static_cast<const char*>(c.y) + at * y_bytes, 1);
    if (c.residual != nullptr) __builtin_prefetch(static_cast<const char*>(c.residual) + at * residual_bytes);
  }
}

void conv(const Int8Run& c, const Part& part, void* scratch) {
  const Segments seg = segments_of<uint8_t>(c.shape);
  const int64_t depth = depth_of(seg), K = c.shape.K;
  const Ends8 ends = ends_of(c, depth, part);
  if (in_strips(c.shape)) {
    return by_strips(c.shape, c.x, static_cast<uint8_t>(c.x_zero), c.weights, part, kRows8, scratch,
                     [&](int64_t p, int64_t m, int64_t count, const Strip& strip) {
                       if (m + 2 * count <= part.last_row) ask_for(c, (m + count) * K + p * kPanel8, count);
                       run_tile8(ends, p, m, count, strip);
                     });
  }
  const int64_t rows = part.last_row - part.first_row;
  auto* a = static_cast<uint32_t*>(scratch);
  const bool plain = in_place(c.shape, 1);
  const int64_t row = plain ? c.shape.C : 4 * kChunk, chunk = plain ? kChunk : rows * kChunk;
  const auto* from = reinterpret_cast<const char*>(a);
  if (plain) {
    from = reinterpret_cast<const char*>(c.x) + part.first_row * row;
  } else {
    gather8(c, seg, part.first_row, part.last_row, a);
  }
  const int64_t sharers = c.y_narrow ? 2 : 1;  // panels whose results lie in one line
  const auto product = [&](int64_t p, int64_t t, int64_t count) {
    if (t + 2 * count <= rows && p % sharers == 0) ask_for(c, (part.first_row + t + count) * K + p * kPanel8, count);
    run_tile8(ends, p, part.first_row + t, count,
              Operands8{reinterpret_cast<const uint32_t*>(from + t * row), c.weights + depth * p * kPanel8, row, chunk,
                        depth});
  };
  if (depth * K <= kWeightsAtHand) {  // whole rows of y are written one after the other
    return by_tiles(rows, kRows8, [&](int64_t t, int64_t count, int64_t) {
      for (int64_t p = part.first_panel; p < part.last_panel; ++p) product(p, t, count);
    });
  }
  for (int64_t p = part.first_panel; p < part.last_panel; ++p)
    by_tiles(rows, kRows8, [&](int64_t t, int64_t count, int64_t) { product(p, t, count); });
}

void quantize(const float* x, int64_t count, float inverse, int32_t zero, uint8_t* y) {
  const Floats low = all(static_cast<float>(-zero)), high = all(static_cast<float>(255 - zero));
  for (int64_t i = 0; i < count; i += kLanes) {
    float some[kLanes] = {};
    uint8_t part[kLanes];
    const bool whole = i + kLanes <= count;
    if (!whole) memcpy(some, x + i, static_cast<size_t>(count - i) * sizeof(float));
    Floats z = load(whole ? x + i : some) * inverse;
    z = z > low ? z : low;
    store8(whole ? y + i : part, z < high ? z : high, zero);
    if (!whole) memcpy(y + i, part, static_cast<size_t>(count - i));
  }
}

}  // namespace

#define FR_STRINGIFY(x) #x
#define FR_NAME(x) FR_STRINGIFY(x)

Int8s int8s() {
  return {FR_NAME(FR_ISA), kLanes, kRows8, scratch, conv, quantize, max_pool<uint8_t>};
}

}  // namespace FR_ISA
}  // namespace fused_resnet
