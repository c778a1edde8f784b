// Family conv_int8 on the CPU, and what goes with it: _quantize and _max_pool.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/int8.h"
#include "cpu/launches.h"
#include "cpu/memory.h"
#include "cpu/parts.h"
#include "cpu/pick.h"

namespace fused_resnet {
namespace {

// Of every instruction set that the library was built for and the processor has, the widest first.
const std::vector<Int8s>& int8s() {
  static const std::vector<Int8s> found = [] {
    std::vector<Int8s> sets;
#if defined(FR_HAS_AVX512DOT)
    if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vnni"))
      sets.push_back(avx512dot::int8s());
#endif
#if defined(FR_HAS_AVX512)
    if (__builtin_cpu_supports("x86-64-v4")) sets.push_back(avx512::int8s());
#endif
#if defined(FR_HAS_AVX2)
    if (__builtin_cpu_supports("x86-64-v3")) sets.push_back(avx2::int8s());
#endif
    sets.push_back(baseline::int8s());
    return sets;
  }();
  return found;
}

int64_t isa_of(const std::string& name) {
  for (size_t i = 0; i < int8s().size(); ++i) {
    if (name.empty() || name == int8s()[i].isa) return static_cast<int64_t>(i);
  }
  STD_TORCH_CHECK(false, "this processor has no instruction set '", name, "'");
}

// The first 64 bytes of packed weights; start, scale and shift follow, then the words.
struct Int8Header {
  int64_t isa, K, C, R, S, dilation_w, x_zero, depth;
};
static_assert(sizeof(Int8Header) == 64);

int64_t bytes_of(int64_t rows, int64_t depth) {
  return 64 + 12 * rows + 4 * depth * rows;
}

constexpr int64_t kBlockBytes = 1 << 19;  // of patches: half of a second cache

bool is_byte(int64_t value) {
  return value >= 0 && value <= 255;
}

// weight int8 [K, C, R, S] -> panels [depth][filters] of words, see int8.h.
Tensor conv_int8_pack(const Tensor& weight, const Tensor& scale, const Tensor& shift, int64_t dilation_w,
                      int64_t x_zero, const std::string& isa) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Char && weight.is_contiguous(),
                  "weight must be int8, [K, C, R, S] and dense");
  STD_TORCH_CHECK(is_byte(x_zero), "x_zero = ", x_zero, " is no uint8");
  ConvShape s{};
  s.K = narrow_size(weight.size(0), "K");
  s.C = narrow_size(weight.size(1), "C");
  s.R = narrow_size(weight.size(2), "R");
  s.S = narrow_size(weight.size(3), "S");
  s.dilation_w = narrow_size(dilation_w, "dilation");
  for (const Tensor* v : {&scale, &shift}) {
    STD_TORCH_CHECK(v->scalar_type() == ScalarType::Float && v->is_contiguous() && v->numel() == s.K,
                    "scale and shift must be fp32 of K");
  }
  s.groups = 1;
  const Segments seg = segments_of<uint8_t>(s);
  const int64_t depth = depth_of(seg), elements = weight.numel(), set = isa_of(isa), lanes = int8s()[set].lanes;
  STD_TORCH_CHECK(depth <= 16000, "a sum of ", 4 * depth, " products does not fit into 32 bits");
  const int64_t rows = padded(s.K, lanes), bytes = bytes_of(rows, depth);
  const Tensor pack = make_pack(bytes, weight);
  auto* to = data_out<uint8_t>(pack);
  memset(to, 0, static_cast<size_t>(bytes));
  const Int8Header header{set, s.K, s.C, s.R, s.S, s.dilation_w, x_zero, depth};
  memcpy(to, &header, sizeof header);
  auto* start = reinterpret_cast<int32_t*>(to + 64);
  memcpy(start + rows, scale.const_data_ptr(), sizeof(float) * s.K);
  memcpy(start + 2 * rows, shift.const_data_ptr(), sizeof(float) * s.K);
  auto* words = reinterpret_cast<int8_t*>(start + 3 * rows);
  const auto* from = data<int8_t>(weight);
  for (int64_t k = 0; k < s.K; ++k) {
    const int64_t panel = k / (2 * lanes) * 2 * lanes, width = std::min(rows - panel, 2 * lanes);
    int64_t sum = 0;
    for (int64_t e = 0, filter = elements / s.K; e < filter; ++e) {
      const int64_t c = e / (s.R * s.S), cell = e % (s.R * s.S), place = cell * s.C + c, within = place % seg.elements;
      const int64_t word = place / seg.elements * seg.words + within / 4;
      const int8_t value = from[k * filter + e];
      words[4 * (depth * panel + word * width + k - panel) + within % 4] = value;
      sum += value;
    }
    start[k] = static_cast<int32_t>(-x_zero * sum);
  }
  return pack;
}

Image bytes_image(const ConvShape& s, ScalarType dtype) {
  return {{s.N, s.K, s.P, s.Q}, dtype};
}

}  // namespace

Launch conv_int8(const Image& x, const Tensor& pack, std::optional<ScalarType> residual, const Sizes& filters,
                 const Sizes& stride, const Sizes& padding, const Sizes& dilation, const Int8Numbers& numbers) {
  STD_TORCH_CHECK(x.dtype == ScalarType::Byte && x.size.size() == 4, "x must be uint8 in channels_last memory");
  STD_TORCH_CHECK(pack.scalar_type() == ScalarType::Byte && pack.is_contiguous() && pack.numel() >= 64,
                  "the weights are not packed");
  STD_TORCH_CHECK(is_byte(numbers.residual_zero) && is_byte(numbers.y_zero), "a zero point is no uint8");
  STD_TORCH_CHECK(filters.size() == 3, "filters are K, R, S");
  STD_TORCH_CHECK(!residual.has_value() || residual == ScalarType::Byte || residual == ScalarType::Float,
                  "residual must be uint8 or fp32");
  Int8Header header;
  memcpy(&header, pack.const_data_ptr(), sizeof header);
  const ConvShape s = conv_sizes(x.size, {filters[0], x.size[1], filters[1], filters[2]}, stride, padding, dilation, 1);
  STD_TORCH_CHECK(header.isa >= 0 && header.isa < static_cast<int64_t>(int8s().size()) && header.K == s.K &&
                      header.C == s.C && header.R == s.R && header.S == s.S &&
                      (header.dilation_w == 1) == (s.dilation_w == 1) &&
                      pack.numel() == bytes_of(padded(s.K, int8s()[header.isa].lanes), header.depth),
                  "the weights were packed for another convolution or processor");
  const Int8s& own = int8s()[header.isa];
  const int64_t filter_rows = padded(s.K, own.lanes), panels = ceil_div<int64_t>(s.K, 2 * own.lanes);
  const auto* start = reinterpret_cast<const int32_t*>(data<uint8_t>(pack) + 64);
  const auto with = [=](const void* from, const void* also, void* to, int32_t images) {
    Int8Run run{s,
                static_cast<const uint8_t*>(from),
                static_cast<int32_t>(header.x_zero),
                reinterpret_cast<const uint32_t*>(start + 3 * filter_rows),
                start,
                reinterpret_cast<const float*>(start + filter_rows),
                reinterpret_cast<const float*>(start + 2 * filter_rows),
                also,
                residual == ScalarType::Byte,
                static_cast<int32_t>(numbers.residual_zero),
                static_cast<float>(numbers.residual_scale),
                static_cast<float>(numbers.low),
                static_cast<float>(numbers.high),
                static_cast<int32_t>(numbers.y_zero),
                numbers.narrow,
                to};
    run.shape.N = images;
    return run;
  };
  const int64_t tile = own.rows, row_bytes = 4 * header.depth;
  const int64_t most = std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(row_bytes, 1) / tile, 1, 36) * tile;
  Launch launch{s, bytes_image(s, numbers.narrow ? ScalarType::Byte : ScalarType::Float), {}, {}};
  // The packed weights live as long as the launch.
  launch.all = [=, keep = pack, &own](const void* from, const void* also, void* to) {
    const Int8Run run = with(from, also, to, s.N);
    if (pixels(s) * s.K == 0) return;
    const Grid grid = in_strips(s) ? grid_of(pixels(s), panels, strip_rows(s, tile), tile)
                                   : grid_of(pixels(s), panels, most, 2 * tile);
    run_parts(grid, [&](const Part& part) { own.conv(run, part, scratch(own.scratch(s, part))); });
  };
  launch.rows = [=, &own](const void* from, const void* also, void* to, int32_t first, int32_t last) {
    const Int8Run run = with(from, also, to, 1);
    const int64_t end = int64_t{last} * s.Q, block = in_strips(s) ? end : most;
    for (int64_t row = int64_t{first} * s.Q; row < end; row += block) {
      const Part part{row, std::min(row + block, end), 0, panels};
      own.conv(run, part, scratch(own.scratch(run.shape, part)));
    }
  };
  return launch;
}

Launch quantize(const Image& x, double inverse, int64_t zero) {
  STD_TORCH_CHECK(x.dtype == ScalarType::Float && x.size.size() == 4, "x must be fp32 in channels_last memory");
  STD_TORCH_CHECK(is_byte(zero), "zero = ", zero, " is no uint8");
  const ConvShape s = conv_sizes(x.size, {x.size[1], x.size[1], 1, 1}, {1, 1}, {0, 0}, {1, 1}, 1);
  const int64_t row = int64_t{s.W} * s.C;
  const auto some = [=](const void* from, void* to, int64_t first, int64_t last) {
    int8s()[0].quantize(static_cast<const float*>(from) + first, last - first, static_cast<float>(inverse),
                        static_cast<int32_t>(zero), static_cast<uint8_t*>(to) + first);
  };
  Launch launch{s, {x.size, ScalarType::Byte}, {}, {}};
  launch.all = [=](const void* from, const void*, void* to) {
    torch::stable::parallel_for(0, row * s.H * s.N, 1 << 15,
                                [&](int64_t first, int64_t last) { some(from, to, first, last); });
  };
  launch.rows = [=](const void* from, const void*, void* to, int32_t first, int32_t last) {
    some(from, to, row * first, row * last);
  };
  return launch;
}

Launch max_pool(const Image& x, const Sizes& kernel, const Sizes& stride, const Sizes& padding) {
  STD_TORCH_CHECK(x.size.size() == 4 && kernel.size() == 2, "kernel is a pair");
  const ConvShape s = conv_sizes(x.size, {x.size[1], x.size[1], kernel[0], kernel[1]}, stride, padding, {1, 1}, 1);
  STD_TORCH_CHECK(2 * s.pad_h <= s.R && 2 * s.pad_w <= s.S, "padding may be half of the kernel at most");
  Launch launch{s, bytes_image(s, x.dtype), {}, {}};
  const auto pool = [&](const auto& own, auto element) {
    using T = decltype(element);
    const auto row = [=, &own](const void* from, void* to, int64_t n, int32_t p) {
      own.max_pool(s, static_cast<const T*>(from), static_cast<T*>(to), n, p);
    };
    launch.all = [=](const void* from, const void*, void* to) {
      torch::stable::parallel_for(0, int64_t{s.N} * s.P, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) row(from, to, i / s.P, static_cast<int32_t>(i % s.P));
      });
    };
    launch.rows = [=](const void* from, const void*, void* to, int32_t first, int32_t last) {
      for (int32_t p = first; p < last; ++p) row(from, to, 0, p);
    };
    return launch;
  };
  if (x.dtype == ScalarType::Float) return pool(convs<float>()[0], float{});
  if (x.dtype == ScalarType::BFloat16) return pool(convs<bf16>()[0], bf16{});
  STD_TORCH_CHECK(x.dtype == ScalarType::Byte, "x must be uint8, fp32 or bf16");
  return pool(int8s()[0], uint8_t{});
}

namespace {

Tensor conv_int8_op(const Tensor& x, const Tensor& pack, const Maybe& residual, const Sizes& filters,
                    const Sizes& stride, const Sizes& padding, const Sizes& dilation, double residual_scale,
                    int64_t residual_zero, int64_t y_zero, double low, double high, bool narrow) {
  std::optional<ScalarType> kind;
  if (residual.has_value()) kind = residual->scalar_type();
  return run(conv_int8(image_of(x), pack, kind, filters, stride, padding, dilation,
                       {residual_scale, residual_zero, y_zero, low, high, narrow}),
             x, residual);
}

Tensor quantize_op(const Tensor& x, double inverse, int64_t zero) {
  return run(quantize(image_of(x), inverse, zero), x);
}

Tensor max_pool_op(const Tensor& x, const Sizes& kernel, const Sizes& stride, const Sizes& padding) {
  return run(max_pool(image_of(x), kernel, stride, padding), x);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("_conv_int8_pack", TORCH_BOX(&fused_resnet::conv_int8_pack));
  m.impl("_conv_int8", TORCH_BOX(&fused_resnet::conv_int8_op));
  m.impl("_quantize", TORCH_BOX(&fused_resnet::quantize_op));
  m.impl("_max_pool", TORCH_BOX(&fused_resnet::max_pool_op));
}
