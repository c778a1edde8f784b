// For the tests, never shipped: the index arithmetic, and the GPU's kernels on the emulation of host_block.h. Tensors
// come as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/index.h"
#include "cuda/bn_act.cuh"
#include "cuda/conv.cuh"

namespace py = pybind11;
using namespace fused_resnet;

namespace {

using Addresses = std::map<std::string, uintptr_t>;

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

template <class T>
void bn_act_of(const std::string& kernel, const Addresses& a, int64_t rows, int32_t C, int activation, double eps,
               double r_eps, bool aligned, int64_t limit, unsigned seed) {
  using A = Accumulator<T>;
  BnActArgs<T> args{};
  args.x = at<const T>(a, "x");
  args.residual = at<const T>(a, "residual");
  args.dy = at<const T>(a, "dy");
  args.given_mask = at<const uint8_t>(a, "given_mask");
  args.mask = at<uint8_t>(a, "mask");
  args.y = at<T>(a, "y");
  args.dx = at<T>(a, "dx");
  args.dr = at<T>(a, "dr");
  args.norm = norm_args<A>(a, "", eps);
  args.r_norm = norm_args<A>(a, "r_", r_eps);
  args.sums = at<A>(a, "sums");
  args.rows = rows;
  args.C = C;
  args.elements = rows * C;
  args.activation = static_cast<Activation>(activation);
  args.aligned = aligned;
  if (kernel == "forward") return launch_forward(args, limit, Emulated{seed});
  if (kernel == "gradient") return launch_gradient(args, limit, Emulated{seed});
  std::vector<A> parts(sum_plan(rows, C).strips * 3 * C);
  args.parts = parts.data();
  launch_sums(args, Emulated{seed});
}

ConvShape shape_of(const std::vector<int32_t>& s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15]};
}

template <class T>
void conv_of(const Addresses& a, const std::vector<int32_t>& sizes, int activation, double eps, bool aligned,
             unsigned seed, int64_t tile) {
  ConvArgs<T> args{};
  args.shape = shape_of(sizes);
  args.x = at<const T>(a, "x");
  args.weight = at<const T>(a, "weight");
  args.residual = at<const T>(a, "residual");
  args.y = at<T>(a, "y");
  args.bias = at<const float>(a, "bias");
  const NormArgs<float> norm = norm_args<float>(a, "", eps);
  args.gamma = norm.gamma;
  args.beta = norm.beta;
  args.mean = norm.mean;
  args.var = norm.var;
  args.eps = norm.eps;
  args.activation = static_cast<Activation>(activation);
  args.aligned = aligned;
  launch_conv(args, tile, Emulated{seed});
}

template <class F>
void by_name(const std::string& dtype, const F& f) {
  if (dtype == "fp32") return f(float{});
  if (dtype == "fp64") return f(double{});
  if (dtype == "bf16") return f(bf16{});
  f(fp16{});
}

void bind_index(py::module_& m) {
  m.def("pixel_of", [](int64_t at, int32_t P, int32_t Q) {
    const Pixel pixel = pixel_of(at, P, Q);
    return std::tuple(pixel.n, pixel.p, pixel.q);
  });
  m.def("depth_of", [](int32_t e, int32_t S, int32_t channels) {
    const Depth depth = depth_of(e, S, channels);
    return std::tuple(depth.r, depth.s, depth.c);
  });
  m.def("conv_tiles", [] {
    std::vector<std::string> names;
    for (const ConvTile& tile : kConvTiles) names.emplace_back(tile.name);
    return names;
  });
  m.def("tap", &tap);
  m.def("inside", &inside);
  m.def("nhwc", &nhwc);
  m.def("pooled", &pooled);
  m.def("swizzled", &swizzled);
  m.def("mask_bytes", &mask_bytes);
  m.def("octet_blocks", &octet_blocks);
  m.def("octet_channel", &octet_channel);
  m.def("sum_plan", [](int64_t rows, int32_t C) {
    const SumPlan plan = sum_plan(rows, C);
    return std::tuple(plan.vector, plan.columns, plan.strip_rows, plan.strips, plan.tiles);
  });
  // Every bit pattern of a 16-bit type there and back.
  m.def("round_trip", [](const std::string& dtype, uint16_t bits) {
    uint16_t out = 0;
    by_name(dtype, [&](auto element) {
      if constexpr (sizeof(element) == 2) {
        element.bits = bits;
        round_to(element, widen(element));
        out = element.bits;
      }
    });
    return out;
  });
  m.def("rounded", [](const std::string& dtype, float value) {
    uint16_t out = 0;
    by_name(dtype, [&](auto element) {
      if constexpr (sizeof(element) == 2) {
        round_to(element, value);
        out = element.bits;
      }
    });
    return out;
  });
}

}  // namespace

PYBIND11_MODULE(fused_resnet_testing, m) {
  bind_index(m);
  m.def("bn_act", [](const std::string& kernel, const std::string& dtype, const Addresses& addresses, int64_t rows,
                     int32_t C, int activation, double eps, double r_eps, bool aligned, int64_t limit, unsigned seed) {
    by_name(dtype, [&](auto element) {
      bn_act_of<decltype(element)>(kernel, addresses, rows, C, activation, eps, r_eps, aligned, limit, seed);
    });
  });
  m.def("conv", [](const std::string& dtype, const Addresses& addresses, const std::vector<int32_t>& sizes,
                   int activation, double eps, bool aligned, unsigned seed, int64_t tile) {
    if (dtype == "bf16") return conv_of<bf16>(addresses, sizes, activation, eps, aligned, seed, tile);
    conv_of<fp16>(addresses, sizes, activation, eps, aligned, seed, tile);
  });
}
