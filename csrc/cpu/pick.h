// The loops for this processor, and per-channel vectors for them.
#pragma once

#include <cmath>
#include <vector>

#include "common/checks.h"
#include "cpu/convs.h"
#include "cpu/loops.h"

namespace fused_resnet {

// The widest instruction set that the library was built for and the processor has.
template <class T>
const Loops<T>& loops() {
  static const Loops<T> chosen = [] {
#if defined(FR_HAS_AVX512)
    if (__builtin_cpu_supports("x86-64-v4")) return avx512::loops<T>();
#endif
#if defined(FR_HAS_AVX2)
    if (__builtin_cpu_supports("x86-64-v3")) return avx2::loops<T>();
#endif
    return baseline::loops<T>();
  }();
  return chosen;
}

// The convolutions of every instruction set that the library was built for and the processor has, the widest first.
template <class T>
const std::vector<Convs<T>>& convs() {
  static const std::vector<Convs<T>> found = [] {
    std::vector<Convs<T>> sets;
#if defined(FR_HAS_AVX512DOT)
    if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vnni"))
      sets.push_back(avx512dot::convs<T>());
#endif
#if defined(FR_HAS_AVX512)
    if (__builtin_cpu_supports("x86-64-v4")) sets.push_back(avx512::convs<T>());
#endif
#if defined(FR_HAS_AVX2)
    if (__builtin_cpu_supports("x86-64-v3")) sets.push_back(avx2::convs<T>());
#endif
    sets.push_back(baseline::convs<T>());
    return sets;
  }();
  return found;
}

// A vector of any floating dtype in the accumulator's type; `absent` where there is none.
template <class A>
std::vector<A> channels(const Maybe& v, int64_t size, A absent) {
  std::vector<A> out(size, absent);
  if (!v.has_value()) return out;
  by_dtype(*v, [&](auto element) {
    const auto* from = data<decltype(element)>(v);
    for (int64_t c = 0; c < size; ++c) out[c] = static_cast<A>(widen(from[c]));
  });
  return out;
}

// The vectors of one norm; `view` and `grad_view` point into it.
template <class A>
struct NormVectors {
  std::vector<A> mean, scale, shift, s0, slope;

  // gamma / sqrt(var + eps) and beta.
  NormVectors(int64_t C, const Maybe& gamma, const Maybe& beta, const Maybe& mean_, const Maybe& var, double eps)
      : mean(channels<A>(mean_, C, 0)), scale(channels<A>(gamma, C, 1)), shift(channels<A>(beta, C, 0)) {
    inverse = channels<A>(var, C, 1);
    for (int64_t c = 0; c < C; ++c) {
      inverse[c] = A(1) / std::sqrt(inverse[c] + static_cast<A>(eps));
      scale[c] *= inverse[c];
    }
  }

  // The part of a gradient that comes through the statistics: means [2, C].
  void through(const Maybe& means, int64_t C) {
    const std::vector<A> both = channels<A>(means, 2 * C, 0);
    s0.assign(both.begin(), both.begin() + C);
    slope.assign(both.begin() + C, both.end());
    for (int64_t c = 0; c < C; ++c) slope[c] *= inverse[c];
  }

  Affine<A> view() const { return {mean.data(), scale.data(), shift.data()}; }
  NormGrad<A> grad_view() const { return {mean.data(), scale.data(), s0.data(), slope.data()}; }

  std::vector<A> inverse;  // 1 / sqrt(var + eps)
};

}  // namespace fused_resnet
