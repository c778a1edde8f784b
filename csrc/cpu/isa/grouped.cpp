// Convolutions whose groups have as many filters as channels, G = 1 (depthwise), 2, 4 or 8: with so little depth a
// product of patches would be all copying. A vector of sums is kLanes consecutive channels of one pixel; each tap adds,
// for c = 0 ... G - 1, the pixel's vector with channel c of every group in all lanes of its group, times weights that
// were packed for these lanes. The rows of x under the kernel are copied once, in fp32 and with their padding, each
// vector of channels by itself; a block of 7 or 8 sums of one row of y stays in registers, and up to three neighbouring
// taps share what they load. Compiled once for every instruction set, as convs.cpp is.
#include <utility>

#include "cpu/gemm.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

constexpr int kTaps = 3;                             // of a row of the kernel that are added at once
constexpr int kTogether = kRegisters == 32 ? 4 : 2;  // channels of a group whose weights are in registers at once
constexpr int kMostOfBlock = 8;                      // sums

// The rows of x under the kernel: row h of the image is row h % `rows` here, column w is column w + pad_w.
struct Window {
  float* data;
  int64_t row, vector;  // floats from one row and from one vector of channels to the next
  int32_t rows;
};

template <int G, int CHANNEL, int... LANE>
FR_INLINE Floats spread(Floats x, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, (LANE / G * G + CHANNEL)...);
#else
  return __builtin_shuffle(x, Ints{(LANE / G * G + CHANNEL)...});
#endif
}

// Channels FIRST, ... of every group, each in all lanes of its group. A group longer than a vector goes on in the next.
template <int G, int FIRST, int... I>
FR_INLINE void read(const float* pixel, int64_t next, Floats* x, std::integer_sequence<int, I...>) {
  if constexpr (G >= kLanes) {
    ((x[I] = all(pixel[(FIRST + I) / kLanes * next + (FIRST + I) % kLanes])), ...);
  } else {
    const Floats vector = load(pixel);
    ((x[I] = spread<G, FIRST + I>(vector, std::make_integer_sequence<int, kLanes>())), ...);
  }
}

// sum[i] += TAPS neighbouring taps at column i * STRIDE, or i * `stride` where STRIDE is 0.
template <int G, int FIRST, int TAPS, int STRIDE, int BLOCK>
FR_INLINE void add_taps(Floats (&sum)[BLOCK][1], const float* x, int64_t next, int64_t stride, const float* weights) {
  constexpr int kCount = G < kTogether ? G : kTogether, kStep = STRIDE == 0 ? 1 : STRIDE;
  Floats weight[TAPS][kCount];
#pragma GCC unroll 4
  for (int t = 0; t < TAPS; ++t) {
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) weight[t][c] = load(weights + (t * G + FIRST + c) * kLanes);
  }
#pragma GCC unroll 32
  for (int j = 0; j < (BLOCK - 1) * kStep + TAPS; ++j) {
    Floats pixel[kCount];
    read<G, FIRST>(x + j * (STRIDE == 0 ? stride : 1) * kLanes, next, pixel, std::make_integer_sequence<int, kCount>());
#pragma GCC unroll 4
    for (int t = 0; t < TAPS; ++t) {
      if (j < t || (j - t) % kStep != 0 || (j - t) / kStep >= BLOCK) continue;
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) sum[(j - t) / kStep][0] += pixel[c] * weight[t][c];
    }
  }
  if constexpr (FIRST + kCount < G) add_taps<G, FIRST + kCount, TAPS, STRIDE>(sum, x, next, stride, weights);
}

// sum += one row of the kernel. STRIDE 0 stands for any stride and dilation.
template <int G, int STRIDE, int BLOCK>
FR_INLINE void add_row(Floats (&sum)[BLOCK][1], const ConvShape& s, const float* x, int64_t next, const float* w) {
  if constexpr (STRIDE == 0) {
    for (int32_t i = 0; i < s.S; ++i, w += G * kLanes, x += int64_t{s.dilation_w} * kLanes)
      add_taps<G, 0, 1, 0>(sum, x, next, s.stride_w, w);
  } else {
    int32_t left = s.S;
    for (; left >= kTaps; left -= kTaps, w += kTaps * G * kLanes, x += kTaps * kLanes)
      add_taps<G, 0, kTaps, STRIDE>(sum, x, next, 0, w);
    if (left == 2) add_taps<G, 0, 2, STRIDE>(sum, x, next, 0, w);
    if (left == 1) add_taps<G, 0, 1, STRIDE>(sum, x, next, 0, w);
  }
}

// First channel of a vector. The last one reaches back into the one before where channels are no multiple of kLanes.
FR_INLINE int32_t first_channel(const ConvShape& s, int64_t vector) {
  const auto own = static_cast<int32_t>(vector * kLanes);
  return own < s.C - kLanes ? own : s.C - kLanes;
}

// One vector of one row of y; x holds rows [first_r, last_r) of the kernel's.
template <int G, int STRIDE, int BLOCK, class T>
void grouped_row(const ConvRun<T>& c, int64_t row, int64_t vector, const float* const* x, int32_t first_r,
                 int32_t last_r, int64_t offset, int64_t next) {
  const ConvShape& s = c.shape;
  const int64_t cells = int64_t{s.S} * G * kLanes;  // weights of a row of the kernel
  const float* weights = reinterpret_cast<const float*>(c.weights) + (vector * s.R + first_r) * cells;
  // Outputs of the vector before may be written already: as a residual they must not be read again.
  const int32_t skip = c.residual == c.y ? static_cast<int32_t>(vector * kLanes) - first_channel(s, vector) : 0;
  const int32_t k = first_channel(s, vector) + skip;
  for (int32_t q = 0; q < s.Q; q += BLOCK, offset += int64_t{BLOCK} * s.stride_w * kLanes) {
    Floats sum[BLOCK][1] = {};
    const float* w = weights;
    for (int32_t r = first_r; r < last_r; ++r, w += cells) add_row<G, STRIDE>(sum, s, x[r] + offset, next, w);
    const int64_t at = (row * s.Q + q) * s.K + k;
    const Finish<T> finish{c.scale + k,   c.shift + k, c.residual == nullptr ? nullptr : c.residual + at, c.y + at, s.K,
                           kLanes - skip, c.activation};
    const int32_t count = s.Q - q < BLOCK ? s.Q - q : BLOCK;
    if (skip == 0 && finish.activation <= Activation::relu6) {
      finish_whole(sum, count, finish);
    } else {
      float buffer[BLOCK * kLanes];
#pragma GCC unroll 8
      for (int i = 0; i < BLOCK; ++i) store(buffer + i * kLanes, sum[i][0]);
      finish_slowly(buffer + skip, count, kLanes, finish);
    }
  }
}

inline Window window_of(const ConvShape& s, float* data) {
  const int32_t read = (s.Q + kMostOfBlock - 2) * s.stride_w + (s.S - 1) * s.dilation_w + 1, whole = s.W + s.pad_w;
  const int32_t rows = (s.R - 1) * s.dilation_h + 1;
  const int64_t row = int64_t{read > whole ? read : whole} * kLanes;
  return {data, row, rows * row, rows};
}

template <class T>
void copy_row(const ConvRun<T>& c, const Part& part, const Window& window, int32_t n, int32_t h) {
  const ConvShape& s = c.shape;
  const T* x = c.x + nhwc(n, h, 0, 0, s.H, s.W, s.C);
  float* to = window.data + h % window.rows * window.row + int64_t{s.pad_w} * kLanes;
  for (int32_t w = 0; w < s.W; ++w, x += s.C, to += kLanes) {
    float* vector = to;
    for (int64_t v = part.first_panel; v < part.last_panel; ++v, vector += window.vector)
      store(vector, load(x + first_channel(s, v)));
  }
}

template <int G, int STRIDE, int BLOCK, class T>
void grouped_part(const ConvRun<T>& c, const Part& part, void* scratch) {
  const ConvShape& s = c.shape;
  const Window window = window_of(s, static_cast<float*>(scratch));
  const int64_t vectors = part.last_panel - part.first_panel;
  auto** x = reinterpret_cast<const float**>(window.data + vectors * window.vector);
  memset(window.data, 0, static_cast<size_t>(4 * vectors * window.vector));
  int32_t ready = 0;  // rows of x that need no copy
  for (int64_t row = part.first_row; row < part.last_row; ++row) {
    const auto n = static_cast<int32_t>(row / s.P), p = static_cast<int32_t>(row % s.P);
    const int32_t h = tap(p, 0, s.stride_h, s.pad_h, 0);
    if (p == 0 || ready < h) ready = h > 0 ? h : 0;
    for (; ready < s.H && ready < h + window.rows; ++ready) copy_row(c, part, window, n, ready);
    int32_t first_r = 0, last_r = 0;
    for (int32_t r = 0; r < s.R; ++r) {
      const int32_t at = h + r * s.dilation_h;
      if (at < 0) first_r = r + 1;
      if (!inside(at, s.H)) continue;
      x[r] = window.data + at % window.rows * window.row;
      last_r = r + 1;
    }
    for (int64_t v = 0; v < vectors; ++v) {
      constexpr int kVectors = G > kLanes ? G / kLanes : 1;  // of a group
      grouped_row<G, STRIDE, BLOCK>(c, row, part.first_panel + v, x, first_r, last_r,
                                    v / kVectors * kVectors * window.vector, window.vector);
    }
  }
}

template <int G, class T>
void grouped_of(const ConvRun<T>& c, const Part& part, void* scratch) {
  const ConvShape& s = c.shape;
  const int stride = s.dilation_w == 1 && s.stride_w <= 2 ? s.stride_w : 0;
  const bool seven = ceil_div(s.Q, 7) == ceil_div(s.Q, 8);
  if (stride == 1) return seven ? grouped_part<G, 1, 7>(c, part, scratch) : grouped_part<G, 1, 8>(c, part, scratch);
  if (stride == 2) return seven ? grouped_part<G, 2, 7>(c, part, scratch) : grouped_part<G, 2, 8>(c, part, scratch);
  grouped_part<G, 0, 8>(c, part, scratch);
}

}  // namespace

int64_t grouped_scratch(const ConvShape& s, const Part& part) {
  return 4 * (part.last_panel - part.first_panel) * window_of(s, nullptr).vector + 8 * int64_t{s.R};
}

template <class T>
void grouped(const ConvRun<T>& c, const Part& part, void* scratch) {
  switch (c.shape.C / c.shape.groups) {
    case 1:
      return grouped_of<1>(c, part, scratch);
    case 2:
      return grouped_of<2>(c, part, scratch);
    case 4:
      return grouped_of<4>(c, part, scratch);
    default:
      return grouped_of<8>(c, part, scratch);
  }
}

template void grouped(const ConvRun<float>&, const Part&, void*);
template void grouped(const ConvRun<bf16>&, const Part&, void*);

}  // namespace FR_ISA
}  // namespace fused_resnet
