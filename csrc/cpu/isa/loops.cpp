// Compiled once for every instruction set, with -DFR_ISA=its name: see loops.h. Reads no header with inline functions
// but our own, whose functions have internal linkage.
#include "cpu/loops.h"

namespace fused_resnet {
namespace FR_ISA {
namespace {

#define FR_STRINGIFY(x) #x
#define FR_NAME(x) FR_STRINGIFY(x)

constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Eight flags of 0 or 1 -> the bits of one byte, the first lowest.
uint8_t pack(const uint8_t* flags) {
  uint64_t word;
  memcpy(&word, flags, sizeof word);
  return static_cast<uint8_t>(word * 0x0102040810204080u >> 56);
}

// The bits of a byte as eight bytes, zero where the bit is not set.
void unpack(uint8_t bits, uint8_t* flags) {
  const uint64_t word = bits * 0x0101010101010101u & 0x8040201008040201u;
  memcpy(flags, &word, sizeof word);
}

void pack_row(uint8_t* flags, int64_t count, uint8_t* mask) {
  for (int64_t i = count; i % 8; ++i) flags[i] = 0;
  for (int64_t b = 0; b < mask_bytes(count); ++b) mask[b] = pack(flags + 8 * b);
}

void unpack_row(const uint8_t* mask, int64_t count, uint8_t* flags) {
  if (mask == nullptr) {
    memset(flags, 1, static_cast<size_t>(count));
    return;
  }
  for (int64_t b = 0; b < mask_bytes(count); ++b) unpack(mask[b], flags + 8 * b);
}

template <class T, Shortcut SHORTCUT, Activation ACTIVATION>
void forward_rows(const BnAct<T>& a, int64_t first, int64_t last, uint8_t* flags) {
  using A = Accumulator<T>;
  const int64_t C = a.C;  // a copy: stores through uint8_t might change a member, for all that the compiler knows
  const A *mean = a.norm.mean, *scale = a.norm.scale, *shift = a.norm.shift;
  const A *r_mean = a.r_norm.mean, *r_scale = a.r_norm.scale, *r_shift = a.r_norm.shift;
  for (int64_t top = first; top < last; top += kOctet) {
    const int64_t end = least(top + kOctet, last);
    for (int64_t m = top; m < end; ++m) {
      const T* x = a.x + m * C;
      const T* residual = SHORTCUT == Shortcut::none ? nullptr : a.residual + m * C;
      T* y = a.y + m * C;
      uint8_t* flag = flags + (m - top) * C;
#pragma GCC ivdep
      for (int64_t c = 0; c < C; ++c) {
        A z = (widen(x[c]) - mean[c]) * scale[c] + shift[c];
        if constexpr (SHORTCUT == Shortcut::tensor) z += widen(residual[c]);
        if constexpr (SHORTCUT == Shortcut::norm) z += (widen(residual[c]) - r_mean[c]) * r_scale[c] + r_shift[c];
        round_to(y[c], activate(z, ACTIVATION));
        if constexpr (ACTIVATION != Activation::identity) flag[c] = passes(z, ACTIVATION);
      }
    }
    if constexpr (ACTIVATION != Activation::identity) pack_row(flags, (end - top) * C, a.mask + top * C / 8);
  }
}

template <class T, Shortcut SHORTCUT>
void forward_of(const BnAct<T>& a, int64_t first, int64_t last, uint8_t* flags) {
  switch (a.activation) {
    case Activation::relu:
      return forward_rows<T, SHORTCUT, Activation::relu>(a, first, last, flags);
    case Activation::relu6:
      return forward_rows<T, SHORTCUT, Activation::relu6>(a, first, last, flags);
    default:
      return forward_rows<T, SHORTCUT, Activation::identity>(a, first, last, flags);
  }
}

template <class T>
void bn_act(const BnAct<T>& a, int64_t first, int64_t last, uint8_t* flags) {
  switch (a.shortcut) {
    case Shortcut::tensor:
      return forward_of<T, Shortcut::tensor>(a, first, last, flags);
    case Shortcut::norm:
      return forward_of<T, Shortcut::norm>(a, first, last, flags);
    default:
      return forward_of<T, Shortcut::none>(a, first, last, flags);
  }
}

// One row's terms, added to `part` [2 or 3, C].
template <class T, bool NORM>
void add_row(const BnAct<T>& a, int64_t m, const uint8_t* flags, Accumulator<T>* part) {
  using A = Accumulator<T>;
  const int64_t C = a.C;
  const A *mean = a.norm.mean, *r_mean = a.r_norm.mean;
  const T *dy = a.dy + m * C, *x = a.x + m * C, *residual = NORM ? a.residual + m * C : nullptr;
  A *dot = part + C, *r_dot = NORM ? part + 2 * C : nullptr;
#pragma GCC ivdep
  for (int64_t c = 0; c < C; ++c) {
    const A dz = flags[c] ? widen(dy[c]) : A(0);
    part[c] += dz;
    dot[c] += dz * (widen(x[c]) - mean[c]);
    if constexpr (NORM) r_dot[c] += dz * (widen(residual[c]) - r_mean[c]);
  }
}

// Chains of kChain terms in T's accumulator join the long sums in fp64.
template <class T, bool NORM>
void sums_of(const BnAct<T>& a, int64_t first, int64_t last, uint8_t* flags, Accumulator<T>* part, double* sums) {
  const int64_t width = (NORM ? 3 : 2) * a.C;
  for (int64_t chain = first; chain < last; chain += kChain) {
    for (int64_t i = 0; i < width; ++i) part[i] = 0;
    for (int64_t top = chain; top < least(chain + kChain, last); top += kOctet) {
      const int64_t rows = least(kOctet, last - top);
      unpack_row(a.given_mask == nullptr ? nullptr : a.given_mask + top * a.C / 8, rows * a.C, flags);
      for (int64_t row = 0; row < rows; ++row) add_row<T, NORM>(a, top + row, flags + row * a.C, part);
    }
    for (int64_t i = 0; i < width; ++i) sums[i] += part[i];
  }
}

template <class T>
void bn_act_sums(const BnAct<T>& a, int64_t first, int64_t last, uint8_t* flags, Accumulator<T>* part, double* sums) {
  if (a.shortcut == Shortcut::norm) return sums_of<T, true>(a, first, last, flags, part, sums);
  sums_of<T, false>(a, first, last, flags, part, sums);
}

template <class T, Shortcut SHORTCUT>
void grad_rows(const BnAct<T>& a, int64_t first, int64_t last, uint8_t* flags) {
  using A = Accumulator<T>;
  const int64_t C = a.C;
  const NormGrad<A> g = a.grad, h = a.r_grad;
  for (int64_t top = first; top < last; top += kOctet) {
    const int64_t end = least(top + kOctet, last);
    unpack_row(a.given_mask == nullptr ? nullptr : a.given_mask + top * C / 8, (end - top) * C, flags);
    for (int64_t m = top; m < end; ++m) {
      const int64_t at = m * C;
      const T *dy = a.dy + at, *x = a.x + at, *residual = SHORTCUT == Shortcut::norm ? a.residual + at : nullptr;
      T *dx = a.dx + at, *dr = SHORTCUT == Shortcut::none ? nullptr : a.dr + at;
      const uint8_t* flag = flags + (m - top) * C;
#pragma GCC ivdep
      for (int64_t c = 0; c < C; ++c) {
        const A dz = flag[c] ? widen(dy[c]) : A(0);
        round_to(dx[c], (dz - g.s0[c] - (widen(x[c]) - g.mean[c]) * g.slope[c]) * g.scale[c]);
        if constexpr (SHORTCUT == Shortcut::tensor) round_to(dr[c], dz);
        if constexpr (SHORTCUT == Shortcut::norm)
          round_to(dr[c], (dz - h.s0[c] - (widen(residual[c]) - h.mean[c]) * h.slope[c]) * h.scale[c]);
      }
    }
  }
}

template <class T>
void bn_act_grad(const BnAct<T>& a, int64_t first, int64_t last, uint8_t* flags) {
  switch (a.shortcut) {
    case Shortcut::tensor:
      return grad_rows<T, Shortcut::tensor>(a, first, last, flags);
    case Shortcut::norm:
      return grad_rows<T, Shortcut::norm>(a, first, last, flags);
    default:
      return grad_rows<T, Shortcut::none>(a, first, last, flags);
  }
}

template <class T>
void conv_row(const Conv<T>& a, int64_t n, int32_t p, Accumulator<T>* row) {
  using A = Accumulator<T>;
  const ConvShape& s = a.shape;
  const int32_t channels = s.C / s.groups, filters = s.K / s.groups;
  for (int64_t i = 0; i < static_cast<int64_t>(s.Q) * s.K; ++i) row[i] = 0;
  for (int32_t q = 0; q < s.Q; ++q) {
    for (int32_t r = 0; r < s.R; ++r) {
      const int32_t h = tap(p, r, s.stride_h, s.pad_h, s.dilation_h);
      for (int32_t t = 0; t < s.S && inside(h, s.H); ++t) {
        const int32_t w = tap(q, t, s.stride_w, s.pad_w, s.dilation_w);
        if (!inside(w, s.W)) continue;
        const T* x = a.x + n * a.x_n + h * a.x_h + w * a.x_w;
        for (int32_t c = 0; c < s.C; ++c) {
          A value = widen(x[c * a.x_c]);
          if (a.prologue.mean != nullptr)
            value =
                activate((value - a.prologue.mean[c]) * a.prologue.scale[c] + a.prologue.shift[c], a.pre_activation);
          const int32_t group = c / channels;
          const A* weight =
              a.weight + (((static_cast<int64_t>(group) * s.R + r) * s.S + t) * channels + c % channels) * filters;
          A* sum = row + static_cast<int64_t>(q) * s.K + group * filters;
#pragma GCC ivdep
          for (int32_t k = 0; k < filters; ++k) sum[k] += value * weight[k];
        }
      }
    }
  }
  const T* residual = a.residual == nullptr ? nullptr : a.residual + nhwc(n, p, 0, 0, s.P, s.Q, s.K);
  for (int32_t q = 0; q < s.Q; ++q) {
    for (int32_t k = 0; k < s.K; ++k) {
      const int64_t i = static_cast<int64_t>(q) * s.K + k;
      A z = row[i];
      if (a.bias != nullptr) z += a.bias[k];
      if (a.norm.mean != nullptr) z = (z - a.norm.mean[k]) * a.norm.scale[k] + a.norm.shift[k];
      if (residual != nullptr) z += widen(residual[i]);
      row[i] = activate(z, a.activation);
    }
  }
}

template <class T>
void store_row(const Accumulator<T>* row, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) round_to(out[i], row[i]);
}

// NaN wins, as in stock's max-pool.
template <class T>
void pool_row(const T* const rows[3], int32_t Q, int64_t K, T* out) {
  for (int32_t at = 0; at < pooled(Q); ++at, out += K) {
    for (int64_t k = 0; k < K; ++k) round_to(out[k], -static_cast<Accumulator<T>>(INFINITY));
    for (int i = 0; i < 3; ++i) {
      for (int32_t q = 2 * at - 1; q <= 2 * at + 1 && rows[i] != nullptr; ++q) {
        if (!inside(q, Q)) continue;
        const T* row = rows[i] + q * K;
#pragma GCC ivdep
        for (int64_t k = 0; k < K; ++k) {
          const auto value = widen(row[k]);
          out[k] = value > widen(out[k]) || value != value ? row[k] : out[k];
        }
      }
    }
  }
}

// 0 for a finite value, NaN for NaN and Inf.
template <class A>
A unless_finite(A value) {
  return value - value;
}

template <class T, bool RESIDUAL, Activation ACTIVATION>
bool pass_rows(const Pass<T>& a, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const int64_t C = a.C;
  const A *mean = a.norm.mean, *scale = a.norm.scale, *shift = a.norm.shift;
  bool finite = true;
  for (int64_t m = first; m < last; ++m) {
    const T *x = a.x + m * C, *residual = RESIDUAL ? a.residual + m * C : nullptr;
    T* y = a.y + m * C;
    int32_t wrong = 0;
#pragma GCC ivdep
    for (int64_t c = 0; c < C; ++c) {
      A z = (widen(x[c]) - mean[c]) * scale[c] + shift[c];
      if constexpr (RESIDUAL) z += widen(residual[c]);
      z = activate(z, ACTIVATION);
      wrong |= unless_finite(z) != A(0);
      round_to(y[c], z);
    }
    finite &= wrong == 0;
  }
  return finite;
}

template <class T, bool RESIDUAL>
bool pass_of(const Pass<T>& a, int64_t first, int64_t last) {
  switch (a.activation) {
    case Activation::relu:
      return pass_rows<T, RESIDUAL, Activation::relu>(a, first, last);
    case Activation::relu6:
      return pass_rows<T, RESIDUAL, Activation::relu6>(a, first, last);
    case Activation::silu:
      return pass_rows<T, RESIDUAL, Activation::silu>(a, first, last);
    case Activation::hardswish:
      return pass_rows<T, RESIDUAL, Activation::hardswish>(a, first, last);
    default:
      return pass_rows<T, RESIDUAL, Activation::identity>(a, first, last);
  }
}

template <class T>
bool pass(const Pass<T>& a, int64_t first, int64_t last) {
  return a.residual == nullptr ? pass_of<T, false>(a, first, last) : pass_of<T, true>(a, first, last);
}

template <class T>
bool finite(const T* x, int64_t count) {
  int32_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto value = widen(x[i]);
    wrong |= unless_finite(value) != 0;
  }
  return wrong == 0;
}

template <class T>
bool scale(const T* x, int64_t count, Accumulator<T> factor, T* out) {
  int32_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Accumulator<T> value = widen(x[i]) * factor;
    wrong |= unless_finite(value) != 0;
    round_to(out[i], value);
  }
  return wrong == 0;
}

}  // namespace

template <class T>
Loops<T> loops() {
  return {FR_NAME(FR_ISA), bn_act<T>,   bn_act_sums<T>, bn_act_grad<T>, conv_row<T>,
          store_row<T>,    pool_row<T>, pass<T>,        finite<T>,      scale<T>};
}

template Loops<float> loops<float>();
template Loops<double> loops<double>();
template Loops<bf16> loops<bf16>();
template Loops<fp16> loops<fp16>();

}  // namespace FR_ISA
}  // namespace fused_resnet
