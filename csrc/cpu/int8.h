// The CPU's launches on 8-bit values: no torch, one table of functions for every instruction set. See gemm8.h for how
// they compute, and convs.h for the layout. A value q stands for (q - zero) * scale.
#pragma once

#include "cpu/convs.h"

namespace fused_resnet {

// y = clamp(sums * scale + shift + (residual - residual_zero) * residual_scale, low, high), as fp32, or rounded +
// y_zero as uint8. Sums start with -x_zero * (sum of the filter).
struct Int8Run {
  ConvShape shape;
  const uint8_t* x;
  int32_t x_zero;           // what borders hold
  const uint32_t* weights;  // packed: panels [depth][1 or 2 vectors] of words
  const int32_t* start;     // [K], as are scale and shift: readable up to a whole vector
  const float *scale, *shift;
  const void* residual;  // may be null
  bool residual_narrow;  // uint8, else fp32
  int32_t residual_zero;
  float residual_scale, low, high;
  int32_t y_zero;
  bool y_narrow;  // uint8, else fp32
  void* y;
};

// Words of depth.
inline int64_t depth_of(const Segments& seg) {
  return int64_t{seg.count} * seg.words;
}

struct Int8s {
  const char* isa;
  int lanes, rows;                                    // 32-bit words of a vector; rows of a tile of sums
  int64_t (*scratch)(const ConvShape&, const Part&);  // bytes
  void (*conv)(const Int8Run&, const Part&, void* scratch);
  void (*quantize)(const float* x, int64_t count, float inverse, int32_t zero, uint8_t* y);
  void (*max_pool)(const ConvShape&, const uint8_t* x, uint8_t* y, int64_t n, int32_t p);  // as in Convs
};

#define FR_DECLARE_INT8S(isa) \
  namespace isa {             \
  Int8s int8s();              \
  }
FR_DECLARE_INT8S(baseline)
FR_DECLARE_INT8S(avx2)
FR_DECLARE_INT8S(avx512)
FR_DECLARE_INT8S(avx512dot)
#undef FR_DECLARE_INT8S

}  // namespace fused_resnet
