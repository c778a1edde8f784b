// The CPU's loops: no torch, no allocation on behalf of a caller, one table of functions for every instruction set.
#pragma once

#include "common/elements.h"
#include "common/index.h"

namespace fused_resnet {

// Rows are taken kOctet at a time, so that their mask starts and ends with a byte.
constexpr int64_t kChain = 32;  // terms that are added up before they join a sum in fp64

// (x - mean) * scale + shift by channel.
template <class A>
struct Affine {
  const A *mean, *scale, *shift;
};

// dz * scale by way of the norm: (dz - s0 - (x - mean) * slope) * scale by channel.
template <class A>
struct NormGrad {
  const A *mean, *scale, *s0, *slope;
};

enum class Shortcut : int { none, tensor, norm };

// [rows, C] matrices; what a launch does not need is null.
template <class T>
struct BnAct {
  const T *x, *residual, *dy;
  const uint8_t* given_mask;
  uint8_t* mask;
  T *y, *dx, *dr;
  int64_t rows, C;
  Activation activation;
  Shortcut shortcut;
  Affine<Accumulator<T>> norm, r_norm;
  NormGrad<Accumulator<T>> grad, r_grad;
};

// One convolution; weight is [groups, R, S, C / groups, K / groups] in the accumulator's type.
template <class T>
struct Conv {
  ConvShape shape;
  const T *x, *residual;
  int64_t x_n, x_h, x_w, x_c;  // strides of x
  const Accumulator<T>* weight;
  const Accumulator<T>* bias;
  Affine<Accumulator<T>> norm, prologue;  // mean is null without one
  Activation activation, pre_activation;
  T* y;
};

// y = act((x - mean) * scale + shift + residual) over [rows, C]; the residual may be null, y may be x.
template <class T>
struct Pass {
  const T *x, *residual;
  T* y;
  int64_t C;
  Affine<Accumulator<T>> norm;
  Activation activation;
};

template <class T>
struct Loops {
  const char* isa;
  void (*bn_act)(const BnAct<T>&, int64_t first_row, int64_t last_row, uint8_t* flags);
  // Adds to sums [2 or 3, C] of dz, dz * (x - mean), dz * (residual - mean); `part` is room for as many.
  void (*bn_act_sums)(const BnAct<T>&, int64_t first_row, int64_t last_row, uint8_t* flags, Accumulator<T>* part,
                      double* sums);
  void (*bn_act_grad)(const BnAct<T>&, int64_t first_row, int64_t last_row, uint8_t* flags);
  // Output row `p` of image `n`, before rounding: row [Q, K]; the residual is added where there is one.
  void (*conv_row)(const Conv<T>&, int64_t n, int32_t p, Accumulator<T>* row);
  void (*store_row)(const Accumulator<T>* row, int64_t count, T* out);
  // Pooled row [pooled(Q), K] of the rows given; null stands for rows outside.
  void (*pool_row)(const T* const rows[3], int32_t Q, int64_t K, T* out);
  // Rows of a pass; whether all of its results are finite.
  bool (*pass)(const Pass<T>&, int64_t first_row, int64_t last_row);
  bool (*finite)(const T* x, int64_t count);
  // out = x * scale; whether all of it is finite.
  bool (*scale)(const T* x, int64_t count, Accumulator<T> scale, T* out);
};

// Those of one instruction set: what compiling loops.cpp with FR_ISA=name makes.
#define FR_DECLARE_LOOPS(isa) \
  namespace isa {             \
  template <class T>          \
  Loops<T> loops();           \
  }
FR_DECLARE_LOOPS(baseline)
FR_DECLARE_LOOPS(avx2)
FR_DECLARE_LOOPS(avx512)
#undef FR_DECLARE_LOOPS

}  // namespace fused_resnet
