// The emulated launches, each family in a file of its own that knows nothing of Python, so that a change of one kernel
// compiles in two seconds.
#pragma once

#include <array>
#include <map>
#include <string>
#include <vector>

#include "cuda/conv_epilogue.cuh"

namespace fused_resnet {

using Addresses = std::map<std::string, uintptr_t>;  // of tensors; absent ones are null
using Numbers = std::vector<int32_t>;

void emulate_bn_act(const std::string& kernel, const std::string& dtype, const Addresses& addresses, int64_t rows,
                    int32_t C, int activation, double eps, double r_eps, bool aligned, int64_t limit, unsigned seed);
void emulate_conv(const std::string& dtype, const Addresses& addresses, const Numbers& sizes, int activation,
                  double eps, int pre_activation, double pre_eps, bool aligned, unsigned seed, int32_t filters);
int64_t emulate_finalise(const std::string& dtype, const Addresses& addresses, int64_t count, int64_t span, int32_t K,
                         double momentum, double eps, unsigned seed);
int64_t emulate_stem(const std::string& dtype, const Addresses& addresses, const Numbers& sizes,
                     const std::array<int64_t, 4>& strides, int activation, double eps, bool aligned, int64_t limit,
                     unsigned seed);
std::array<int64_t, 5> stem_tile_place(const Numbers& sizes, int64_t tile);
std::array<int64_t, 5> tile_place(const Numbers& sizes, int64_t block, int32_t tile_n, int32_t bundle);
int32_t chunk_number(int32_t row, int32_t chunk);
std::array<int32_t, 3> depth_behind(int32_t r, int32_t s, int32_t c, int32_t S, int32_t channels);

template <class T>
T* at(const Addresses& addresses, const std::string& name) {
  const auto found = addresses.find(name);
  return found == addresses.end() ? nullptr : reinterpret_cast<T*>(found->second);
}

// Runs a kernel as the GPU would, one block after the other.
struct Emulated {
  unsigned seed;

  template <class Kernel, class Args>
  void operator()(Kernel kernel, int64_t blocks, int threads, size_t bytes, const Args& args) const {
    host::launch(blocks, threads, bytes, seed, [&] { kernel(args); });
  }
};

template <class A>
NormArgs<A> norm_args(const Addresses& a, const std::string& prefix, double eps) {
  auto vector = [&](const char* name) { return at<const A>(a, prefix + name); };
  return {vector("gamma"), vector("beta"), vector("mean"), vector("var"), vector("means"), static_cast<A>(eps)};
}

inline ConvShape shape_of(const Numbers& s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15]};
}

template <class T>
ConvArgs<T> conv_args(const Addresses& a, const Numbers& sizes, int activation, double eps) {
  ConvArgs<T> args{};
  args.shape = shape_of(sizes);
  args.x = at<const T>(a, "x");
  args.weight = at<const T>(a, "weight");
  args.residual = at<const T>(a, "residual");
  args.y = at<T>(a, "y");
  args.bias = at<const Accumulator<T>>(a, "bias");
  const NormArgs<Accumulator<T>> norm = norm_args<Accumulator<T>>(a, "", eps);
  args.gamma = norm.gamma;
  args.beta = norm.beta;
  args.mean = norm.mean;
  args.var = norm.var;
  args.eps = norm.eps;
  args.activation = static_cast<Activation>(activation);
  return args;
}

template <class F>
void by_name(const std::string& dtype, const F& f) {
  if (dtype == "fp32") return f(float{});
  if (dtype == "fp64") return f(double{});
  if (dtype == "bf16") return f(bf16{});
  f(fp16{});
}

}  // namespace fused_resnet
