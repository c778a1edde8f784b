// For the tests, never shipped: the sm_90a kernel's arithmetic, and the kernel itself on the emulation of
// host_hopper.h. Tensors come as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/conv_sm90.cuh"
#include "testing/kernels.h"

namespace py = pybind11;
using namespace fused_resnet;

namespace {

// Runs a kernel as the GPU would, one cluster after the other.
struct EmulatedClusters {
  int processors;
  unsigned seed;

  int multiprocessors() const { return processors; }
  template <class T>
  TensorMap map(const TensorPlan& plan, const T* memory) const {
    return {plan, reinterpret_cast<char*>(const_cast<T*>(memory))};
  }
  template <class Kernel>
  void operator()(Kernel kernel, int clusters, int cluster, int threads, size_t bytes, const Sm90Args& args) const {
    host::Cluster::now().blocks = cluster;
    for (int i = 0; i < clusters; ++i) {
      std::mt19937 random(seed + i);
      host::Cluster::now().start(cluster, bytes, seed + i);
      try {
        host::Block::now().run([&] { kernel(args); }, i, clusters, threads * cluster, bytes * cluster, random);
      } catch (const std::runtime_error& error) {
        const std::string& fault = host::Cluster::now().fault;
        throw std::runtime_error(fault.empty() ? error.what() : fault);
      }
      if (!host::Cluster::now().done()) throw std::runtime_error("copies are under way after the last wait");
    }
  }
};

template <class T>
void conv_of(const Addresses& a, const Numbers& sizes, int activation, double eps, int64_t tile, int processors,
             unsigned seed) {
  Sm90Args args{};
  args.shape = shape_of(sizes);
  args.bias = at<const float>(a, "bias");
  args.norm = norm_args<float>(a, "", eps);
  args.activation = static_cast<Activation>(activation);
  const Sm90Tensors<T> tensors{at<const T>(a, "x"), at<const T>(a, "weight"), at<const T>(a, "residual"),
                               at<T>(a, "y")};
  launch_conv_sm90(args, tensors, tile, EmulatedClusters{processors, seed});
}

py::dict dict_of(const TensorPlan& p) {
  py::dict out;
  out["sizes"] = std::vector<uint64_t>(p.sizes, p.sizes + p.rank);
  out["strides"] = std::vector<uint64_t>(p.strides, p.strides + p.rank - 1);
  out["box"] = std::vector<uint32_t>(p.box, p.box + (p.im2col ? 2 : p.rank));
  out["steps"] = std::vector<uint32_t>(p.steps, p.steps + p.rank);
  out["lower"] = std::vector<int>(p.lower, p.lower + 2);
  out["upper"] = std::vector<int>(p.upper, p.upper + 2);
  return out;
}

py::dict dict_of(const Sm90Plan& p) {
  py::dict out;
  out["pixels"] = p.pixels;
  out["filters"] = p.filters;
  out["cluster"] = p.cluster;
  out["stages"] = p.stages;
  out["shared_bytes"] = p.shared_bytes();
  return out;
}

}  // namespace

PYBIND11_MODULE(fused_resnet_sm90, m) {
  m.def("patches_plan", [](const Numbers& s, int32_t pixels) { return dict_of(patches_plan(shape_of(s), pixels)); });
  m.def("weight_plan", [](const Numbers& s, int32_t filters) { return dict_of(weight_plan(shape_of(s), filters)); });
  m.def("output_plan", [](const Numbers& s) { return dict_of(output_plan(shape_of(s))); });
  m.def("plan", [](int tile) { return dict_of(sm90_plan(kConvTiles[tile])); });
  m.def("work", [](const Numbers& s, int32_t pixels, int32_t filters, int32_t cluster) {
    const Sm90Work work = sm90_work(shape_of(s), pixels, filters, cluster);
    return std::tuple(work.filter_tiles, work.tiles, work.steps);
  });
  m.def("swizzled_byte", &swizzled_byte);
  m.def("matrix_descriptor", &matrix_descriptor);
  m.def("near_pixel_of", [](int32_t at, int32_t P, int32_t Q) {
    const Pixel pixel = near_pixel_of(at, P, Q);
    return std::tuple(pixel.n, pixel.p, pixel.q);
  });
  m.def("refusal", [](const Numbers& s) -> py::object {
    const char* reason = sm90_refusal(shape_of(s));
    return reason == nullptr ? py::object(py::none()) : py::object(py::str(reason));
  });
  m.def("rule", [](const Numbers& s, int processors) { return sm90_rule(shape_of(s), processors); });
  m.def("conv", [](const std::string& dtype, const Addresses& addresses, const Numbers& sizes, int activation,
                   double eps, int64_t tile, int processors, unsigned seed) {
    if (dtype == "bf16") return conv_of<bf16>(addresses, sizes, activation, eps, tile, processors, seed);
    conv_of<fp16>(addresses, sizes, activation, eps, tile, processors, seed);
  });
}
