// For the tests, never shipped: the index arithmetic, and the GPU's kernels on the emulation of host_block.h. Tensors
// come as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/conv_tiles.h"
#include "cuda/bn_act.cuh"
#include "testing/kernels.h"

namespace py = pybind11;
using namespace fused_resnet;

namespace {

void bind_index(py::module_& m) {
  m.def("pixel_of", [](int64_t at, int32_t P, int32_t Q) {
    const Pixel pixel = pixel_of(at, P, Q);
    return std::tuple(pixel.n, pixel.p, pixel.q);
  });
  m.def("pixel_behind", [](const std::tuple<int32_t, int32_t, int32_t>& first, int32_t offset, int32_t P, int32_t Q) {
    const Pixel pixel = pixel_behind({std::get<0>(first), std::get<1>(first), std::get<2>(first)}, offset, P, Q);
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
  m.def("swizzled", &chunk_number);
  m.def("tile_place", [](const Numbers& sizes, int64_t block, int32_t tile_n, int32_t bundle) {
    return py::tuple(py::cast(tile_place(sizes, block, tile_n, bundle)));
  });
  m.def("stem_place",
        [](const Numbers& sizes, int64_t tile) { return py::tuple(py::cast(stem_tile_place(sizes, tile))); });
  m.def("next_depth", [](int32_t r, int32_t s, int32_t c, int32_t S, int32_t channels) {
    return py::tuple(py::cast(depth_behind(r, s, c, S, channels)));
  });
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
  m.def("bn_act", &emulate_bn_act);
  m.def("conv", &emulate_conv);
  m.def("finalise", &emulate_finalise);
  m.def("stem", &emulate_stem);
}
