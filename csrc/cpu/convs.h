// Our own convolutions on the CPU: no torch, one table of functions for every instruction set. See gemm.h, direct.h,
// winograd.h and isa/grouped.cpp for how they compute.
#pragma once

#include "common/elements.h"
#include "common/index.h"

namespace fused_resnet {

constexpr int64_t kChunk = 64;               // words of depth that lie together, row after row
constexpr int64_t kWeightsAtHand = 1 << 16;  // words of weights that stay in the second cache while rows pass by
constexpr int kMostOfGroup = 8;              // channels of a group that `grouped` takes

// y [N, P, Q, K] = act(conv(x [N, H, W, C], weights) * scale + shift + residual), sums in fp32, rounded once.
template <class T>
struct ConvRun {
  ConvShape shape;
  const T *x, *residual;  // the residual may be null, and may be y
  T* y;
  const uint32_t* weights;     // packed
  const float *scale, *shift;  // [K], readable up to a whole panel
  Activation activation;
};

// How the depth of a direct convolution is laid out: segments that are contiguous in x, each padded to whole words.
struct Segments {
  int32_t count;     // R * S, or R where the columns of a row of the kernel touch in memory
  int32_t elements;  // of one segment
  int32_t words;
};

template <class T>
FR_HD Segments segments_of(const ConvShape& s) {
  const bool touch = s.groups == 1 && s.dilation_w == 1;
  const int32_t elements = s.C / s.groups * (touch ? s.S : 1), per_word = 4 / static_cast<int32_t>(sizeof(T));
  return Segments{touch ? s.R : s.R * s.S, elements, (elements + per_word - 1) / per_word};
}

// Bytes of a row of the copies of strips.h: from the first pixel's first column to the last one's last, and the rest of
// a word.
FR_HD int64_t strip_pitch(const ConvShape& s, int64_t element) {
  return ceil_div<int64_t>((int64_t{s.Q - 1} * s.stride_w + s.S) * s.C * element + 4, 64) * 64;
}

// Whether strips.h computes a convolution: its kernel reaches over pixels, rows of y fill a tile about as well as
// pixels that are gathered from several rows would, and the rows under the kernel stay in the second cache.
FR_HD bool in_strips(const ConvShape& s) {
  return s.groups == 1 && s.dilation_h == 1 && s.dilation_w == 1 && s.R * s.S > 1 && (s.Q >= 10 || s.C <= 16) &&
         s.R * strip_pitch(s, 4) <= 1 << 20;
}

// Whether the product reads x as it lies: whole words of one chunk. More would come from memory line by line.
FR_HD bool in_place(const ConvShape& s, int64_t element) {
  return s.R * s.S * s.groups * s.stride_h * s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0 &&
         s.C * element % 4 == 0 && s.C * element <= 4 * kChunk;
}

// A rectangle of work: rows are pixels of the output, or tiles of it for Winograd's algorithm; panels run through the
// groups.
struct Part {
  int64_t first_row, last_row, first_panel, last_panel;
};

template <class T>
struct Convs {
  const char* isa;
  int lanes, rows;                                           // floats of a vector; rows of a tile of sums
  int64_t (*direct_scratch)(const ConvShape&, const Part&);  // bytes
  void (*direct)(const ConvRun<T>&, const Part&, void* scratch);
  // F(m x m, 3 x 3), m = 2 or 4. Where `shared` is null the part transforms its own tiles, else it reads them there.
  int64_t (*winograd_scratch)(const ConvShape&, int m, const Part&, bool shared);
  void (*winograd)(const ConvRun<T>&, int m, const Part&, const float* shared, void* scratch);
  // Tiles [first, last) of x into `shared`, which holds [m + 2]^2 x all tiles x channels.
  void (*winograd_input)(const ConvRun<T>&, int m, int64_t first, int64_t last, float* shared);
  // Rows of the part are rows of pixels of the output, panels single vectors of channels, whole groups together.
  int64_t (*grouped_scratch)(const ConvShape&, const Part&);
  void (*grouped)(const ConvRun<T>&, const Part&, void* scratch);
  // Row p of image n of the pooled batch; of the shape K and the weights' side mean nothing.
  void (*max_pool)(const ConvShape&, const T* x, T* y, int64_t n, int32_t p);
  // The mean of `count` pixels of C channels, added up in fp32.
  void (*mean_pool)(const T* x, int64_t count, int64_t C, T* y);
};

#define FR_DECLARE_CONVS(isa) \
  namespace isa {             \
  template <class T>          \
  Convs<T> convs();           \
  }
FR_DECLARE_CONVS(baseline)
FR_DECLARE_CONVS(avx2)
FR_DECLARE_CONVS(avx512)
FR_DECLARE_CONVS(avx512dot)
#undef FR_DECLARE_CONVS

}  // namespace fused_resnet
