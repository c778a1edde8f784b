// Family conv_bn_act on the CPU by our own kernels, with weights that are packed once: _conv_pack and _conv_packed.
#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/launches.h"
#include "cpu/parts.h"
#include "cpu/pick.h"
#include "cpu/winograd_tiles.h"

namespace fused_resnet {
namespace {

enum class Method : int64_t { direct, winograd2, winograd4, grouped };

Method method_of(const std::string& name) {
  constexpr const char* kNames[] = {"direct", "winograd2", "winograd4", "grouped"};
  for (int i = 0; i < 4; ++i) {
    if (name == kNames[i]) return static_cast<Method>(i);
  }
  STD_TORCH_CHECK(false, "unknown method '", name, "'");
}

int pixels_of(Method method) {
  return method == Method::winograd4 ? 4 : 2;
}

// The first 64 bytes of packed weights: what they were packed for.
struct Header {
  int64_t method, bytes, isa, K, C, R, S, groups;

  bool operator==(const Header&) const = default;
};

constexpr int64_t kHeader = sizeof(Header);
static_assert(kHeader == 64);

template <class T>
Header header_of(const ConvShape& s, Method method, int64_t isa) {
  return {static_cast<int64_t>(method), sizeof(T), isa, s.K, s.C, s.R, s.S, s.groups};
}

// Place of an instruction set among those that can run here; "" stands for the widest.
template <class T>
int64_t isa_of(const std::string& name) {
  const std::vector<Convs<T>>& sets = convs<T>();
  for (size_t i = 0; i < sets.size(); ++i) {
    if (name.empty() || name == sets[i].isa) return static_cast<int64_t>(i);
  }
  STD_TORCH_CHECK(false, "this processor or this build has no '", name, "'");
}

template <class T>
int64_t weight_words(const ConvShape& s, Method method, int64_t lanes) {
  if (method == Method::grouped) return ceil_div<int64_t>(s.C, lanes) * s.R * s.S * (s.C / s.groups) * lanes;
  const int64_t filters = s.groups * padded(s.K / s.groups, lanes);
  if (method != Method::direct) {
    const int64_t n = pixels_of(method) + 2;
    return n * n * s.C * filters;
  }
  const Segments seg = segments_of<T>(s);
  return int64_t{seg.count} * seg.words * filters;
}

// weight [K, C / groups, R, S] -> for each group and panel [depth][filters], see convs.h.
template <class T>
void pack_direct(const ConvShape& s, int64_t lanes, const T* weight, T* out) {
  const Segments seg = segments_of<T>(s);
  const int64_t per_word = 4 / sizeof(T), channels = s.C / s.groups;
  const int64_t filters = s.K / s.groups, rows = padded(filters, lanes), depth = int64_t{seg.count} * seg.words;
  const int64_t elements = channels * s.R * s.S;
  for (int64_t k = 0; k < s.K; ++k) {
    const int64_t column = k % filters, panel = column / (2 * lanes) * 2 * lanes;
    const int64_t width = std::min(rows - panel, 2 * lanes);
    T* to = out + (depth * (k / filters * rows + panel) + column - panel) * per_word;
    for (int64_t e = 0; e < elements; ++e) {
      const int64_t c = e / (s.R * s.S), cell = e % (s.R * s.S);
      const int64_t place = cell * channels + c, within = place % seg.elements;
      const int64_t word = place / seg.elements * seg.words + within / per_word;
      to[word * width * per_word + within % per_word] = weight[k * elements + e];
    }
  }
}

template <class T>
void pack_winograd(const ConvShape& s, int64_t lanes, int m, const T* weight, float* out) {
  const int64_t positions = (m + 2) * (m + 2);
  double points[6][3];
  winograd_points(m, points);
  torch::stable::parallel_for(0, s.K, 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t panel = k / (2 * lanes) * 2 * lanes, width = std::min<int64_t>(s.K - panel, 2 * lanes);
      for (int64_t c = 0; c < s.C; ++c) {
        float kernel[9], u[6][6];
        for (int i = 0; i < 9; ++i) kernel[i] = widen(weight[(k * s.C + c) * 9 + i]);
        winograd_weight(m, points, kernel, u);
        for (int64_t at = 0; at < positions; ++at)
          out[(positions * panel + at * width) * s.C + c * width + k - panel] = u[at / (m + 2)][at % (m + 2)];
      }
    }
  });
}

// For each vector of channels [R][S][channel of the group][lanes]; the last one is whole and ends with the channels.
template <class T>
void pack_grouped(const ConvShape& s, int64_t lanes, const T* weight, float* out) {
  const int64_t channels = s.C / s.groups, cells = int64_t{s.R} * s.S;
  for (int64_t start = 0; start < s.K; start += lanes) {
    const T* from = weight + std::min(start, s.K - lanes) * channels * cells;
    for (int64_t cell = 0; cell < cells; ++cell) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t lane = 0; lane < lanes; ++lane) *out++ = widen(from[(lane * channels + c) * cells + cell]);
      }
    }
  }
}

constexpr const char* kOther = "the weights were packed for another convolution, method or processor";

Method known_method(const Header& header) {
  STD_TORCH_CHECK(header.method >= 0 && header.method <= static_cast<int64_t>(Method::grouped), kOther);
  return static_cast<Method>(header.method);
}

const uint8_t* check_pack(const Tensor& pack) {
  STD_TORCH_CHECK(pack.scalar_type() == ScalarType::Byte && pack.is_contiguous() && pack.numel() > kHeader,
                  "pack must be what _conv_pack returned");
  return data<uint8_t>(pack);
}

// What Winograd's algorithm asks of a convolution.
void check_winograd(const ConvShape& s, int lanes) {
  STD_TORCH_CHECK(s.R == 3 && s.S == 3 && s.groups == 1 && s.C % lanes == 0 && s.K % lanes == 0,
                  "Winograd's algorithm takes 3x3 kernels without groups, and channels in multiples of ", lanes);
}

void check_grouped(const ConvShape& s, int lanes) {
  const int32_t channels = s.C / s.groups;
  STD_TORCH_CHECK(s.K == s.C && s.C >= lanes && channels <= kMostOfGroup && (channels & (channels - 1)) == 0,
                  "grouped takes groups of 1, 2, 4 or 8 channels and as many filters, and at least ", lanes,
                  " channels");
}

Tensor conv_pack(const Tensor& given, const Maybe& bias, const Maybe& gamma, const Maybe& beta, const Maybe& mean,
                 const Maybe& var, double eps, const Sizes& dilation, int64_t groups, const std::string& name,
                 const std::string& isa) {
  STD_TORCH_CHECK(given.dim() == 4 && given.numel() > 0 && groups > 0 && given.size(0) % groups == 0,
                  "weight must be [K, C / groups, R, S], and not empty");
  STD_TORCH_CHECK(dilation.size() == 2, "dilation is a pair");
  const Tensor weight = torch::stable::contiguous(given);
  const Method method = method_of(name);
  ConvShape s{};
  s.K = static_cast<int32_t>(weight.size(0));
  s.C = static_cast<int32_t>(weight.size(1) * groups);
  s.R = static_cast<int32_t>(weight.size(2));
  s.S = static_cast<int32_t>(weight.size(3));
  s.groups = static_cast<int32_t>(groups);
  s.dilation_h = static_cast<int32_t>(dilation[0]);
  s.dilation_w = static_cast<int32_t>(dilation[1]);
  check_vector(bias, s.K, weight, "bias");
  check_norm(weight, s.K, gamma, beta, mean, var);
  const NormVectors<float> norm(s.K, gamma, beta, mean, var, var.has_value() ? eps : 0);
  const std::vector<float> own = channels<float>(bias, s.K, 0);
  Tensor pack;
  by_dtype(weight, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
      const int64_t set = isa_of<T>(isa), lanes = convs<T>()[set].lanes, vector = padded(s.K, 16);
      const int64_t bytes = kHeader + 8 * vector + 4 * weight_words<T>(s, method, lanes);
      pack = make_pack(bytes, weight);
      auto* start = data_out<uint8_t>(pack);
      memset(start, 0, static_cast<size_t>(bytes));
      const Header header = header_of<T>(s, method, set);
      memcpy(start, &header, kHeader);
      auto* scale = reinterpret_cast<float*>(start + kHeader);
      float *shift = scale + vector, *words = shift + vector;
      for (int64_t k = 0; k < s.K; ++k) {
        scale[k] = norm.scale[k];
        shift[k] = (own[k] - norm.mean[k]) * norm.scale[k] + norm.shift[k];
      }
      if (method == Method::direct) {
        pack_direct<T>(s, lanes, data<T>(weight), reinterpret_cast<T*>(words));
      } else if (method == Method::grouped) {
        check_grouped(s, static_cast<int>(lanes));
        pack_grouped<T>(s, lanes, data<T>(weight), words);
      } else {
        check_winograd(s, static_cast<int>(lanes));
        pack_winograd<T>(s, lanes, pixels_of(method), data<T>(weight), words);
      }
    } else {
      STD_TORCH_CHECK(false, "our kernels on the CPU compute fp32 and bf16");
    }
  });
  return pack;
}

// How the threads share the work of a batch, and how one of them takes rows of a single image.
template <class T>
void all_direct(const ConvRun<T>& c, const Convs<T>& own) {
  const ConvShape& s = c.shape;
  const int64_t panels = s.groups * ceil_div<int64_t>(s.K / s.groups, 2 * own.lanes);
  Grid grid = in_strips(s) ? grid_of(pixels(s), panels, strip_rows(s, own.rows), own.rows)
                           : grid_of(pixels(s), panels, 8 * own.rows, 4 * own.rows);
  // Unfinished sums of one part stay in the second cache.
  if (!in_strips(s)) grid.columns = std::max(grid.columns, ceil_div<int64_t>(panels, 16));
  run_parts(grid, [&](const Part& part) { own.direct(c, part, scratch(own.direct_scratch(s, part))); });
}

template <class T>
void rows_direct(const ConvRun<T>& c, const Convs<T>& own, int32_t first, int32_t last) {
  const ConvShape& s = c.shape;
  const int64_t panels = s.groups * ceil_div<int64_t>(s.K / s.groups, 2 * own.lanes);
  const int64_t columns = in_strips(s) ? 1 : ceil_div<int64_t>(panels, 16);
  const int64_t start = int64_t{first} * s.Q, count = (int64_t{last} - first) * s.Q;
  const Grid grid{count, panels, in_strips(s) ? 1 : ceil_div<int64_t>(count, 8 * own.rows), columns};
  for (int64_t i = 0; i < grid.size(); ++i) {
    Part part = grid[i];
    part.first_row += start;
    part.last_row += start;
    own.direct(c, part, scratch(own.direct_scratch(s, part)));
  }
}

template <class T>
void all_winograd(const ConvRun<T>& c, const Convs<T>& own, int m, const Tensor& pack) {
  const ConvShape& s = c.shape;
  const int64_t tiles = winograd_tiles(s, m).count, panels = ceil_div<int64_t>(s.K, 2 * own.lanes);
  const int64_t threads = torch::stable::get_num_threads();
  // Few tiles of many channels: all threads transform them, then each reads its own share of the weights, once.
  if (tiles >= 2 * own.rows * threads && s.C <= 256) {
    const Grid grid = grid_of(tiles, panels, 2 * own.rows, 1);
    run_parts(grid, [&](const Part& part) {
      own.winograd(c, m, part, nullptr, scratch(own.winograd_scratch(s, m, part, false)));
    });
    return;
  }
  const int64_t floats = (m + 2) * (m + 2) * winograd_chunks(s) * kChunk * tiles + 16;
  Tensor shared = make_image({{1, floats, 1, 1}, ScalarType::Float}, pack);
  auto* v = reinterpret_cast<float*>(padded(reinterpret_cast<int64_t>(data_out<float>(shared)), 64));
  torch::stable::parallel_for(0, tiles, 1,
                              [&](int64_t first, int64_t last) { own.winograd_input(c, m, first, last, v); });
  const Grid grid{tiles, panels, ceil_div<int64_t>(tiles, 4 * own.rows), std::min(panels, threads)};
  run_parts(grid,
            [&](const Part& part) { own.winograd(c, m, part, v, scratch(own.winograd_scratch(s, m, part, true))); });
}

template <class T>
void rows_winograd(const ConvRun<T>& c, const Convs<T>& own, int m, int32_t first, int32_t last) {
  const ConvShape& s = c.shape;
  const int64_t across = winograd_tiles(s, m).columns, panels = ceil_div<int64_t>(s.K, 2 * own.lanes);
  const int64_t end = across * ceil_div(last, m);
  for (int64_t tile = across * (first / m); tile < end; tile += 2 * own.rows) {
    const Part part{tile, std::min<int64_t>(tile + 2 * own.rows, end), 0, panels};
    own.winograd(c, m, part, nullptr, scratch(own.winograd_scratch(s, m, part, false)));
  }
}

// Parts of `grouped`: panels are the vectors of whole groups, as many at a time as the second cache has room for the
// rows of x under the kernel.
template <class T>
void grouped_parts(const ConvRun<T>& c, const Convs<T>& own, int64_t first, int64_t last, bool all) {
  const ConvShape& s = c.shape;
  constexpr int64_t kWindow = 256 << 10;
  const int64_t threads = torch::stable::get_num_threads(), one = own.grouped_scratch(s, Part{0, 1, 0, 1});
  const int64_t unit = std::max(s.C / s.groups / own.lanes, 1);  // vectors of one group
  const int64_t panels = ceil_div<int64_t>(s.C, own.lanes * unit), rows = last - first;
  const int64_t columns = ceil_div(panels, std::max<int64_t>(kWindow / (one * unit), 1));
  const int64_t row_parts = std::min(rows, columns % threads == 0 ? s.N : padded(s.N, threads));
  const Grid grid{rows, panels, all ? row_parts : 1, columns};
  const auto run = [&](Part part) {
    const Part own_part{part.first_row + first, part.last_row + first, part.first_panel * unit, part.last_panel * unit};
    own.grouped(c, own_part, scratch(own.grouped_scratch(s, own_part)));
  };
  if (all) return run_parts(grid, run);
  for (int64_t i = 0; i < grid.size(); ++i) run(grid[i]);
}

template <class T>
Launch launch_of(ConvRun<T> c, const Convs<T>& own, Method method, const Tensor& pack) {
  ConvRun<T> one = c;
  one.shape.N = 1;
  const auto with = [](ConvRun<T> run, const void* x, const void* residual, void* y) {
    run.x = static_cast<const T*>(x);
    run.residual = static_cast<const T*>(residual);
    run.y = static_cast<T*>(y);
    return run;
  };
  const ConvShape& s = c.shape;
  const bool nothing = pixels(s) * s.K == 0;
  const int m = pixels_of(method);
  Launch launch{s, {{s.N, s.K, s.P, s.Q}, sizeof(T) == 4 ? ScalarType::Float : ScalarType::BFloat16}, {}, {}};
  launch.all = [=, &own](const void* x, const void* residual, void* y) {
    const ConvRun<T> run = with(c, x, residual, y);
    if (nothing) return;
    if (method == Method::direct) return all_direct(run, own);
    if (method == Method::grouped) return grouped_parts(run, own, 0, int64_t{run.shape.N} * run.shape.P, true);
    all_winograd(run, own, m, pack);
  };
  launch.rows = [=, &own](const void* x, const void* residual, void* y, int32_t first, int32_t last) {
    const ConvRun<T> run = with(one, x, residual, y);
    if (nothing) return;
    if (method == Method::direct) return rows_direct(run, own, first, last);
    if (method == Method::grouped) return grouped_parts(run, own, first, last, false);
    rows_winograd(run, own, m, first, last);
  };
  if (method == Method::winograd2 || method == Method::winograd4) launch.step = m;
  return launch;
}

}  // namespace

Launch conv_packed(const Image& x, const Tensor& pack, int64_t K, const Sizes& kernel, const Sizes& stride,
                   const Sizes& padding, const Sizes& dilation, int64_t groups, Activation activation) {
  STD_TORCH_CHECK(x.size.size() == 4 && kernel.size() == 2 && groups > 0, "the kernel is a pair, groups are positive");
  const ConvShape s =
      conv_sizes(x.size, {K, x.size[1] / groups, kernel[0], kernel[1]}, stride, padding, dilation, groups);
  const auto make = [&](auto element) {
    using T = decltype(element);
    const Header header = *reinterpret_cast<const Header*>(check_pack(pack));
    const Method method = known_method(header);
    const bool known = header.isa >= 0 && header.isa < static_cast<int64_t>(convs<T>().size());
    STD_TORCH_CHECK(known && header == header_of<T>(s, method, header.isa), kOther);
    const Convs<T>& own = convs<T>()[header.isa];
    const int64_t vector = padded(s.K, 16);
    STD_TORCH_CHECK(pack.numel() == kHeader + 8 * vector + 4 * weight_words<T>(s, method, own.lanes),
                    "the packed weights are not whole");
    STD_TORCH_CHECK(method == Method::direct || method == Method::grouped ||
                        s.stride_h * s.stride_w * s.dilation_h * s.dilation_w == 1,
                    "Winograd's algorithm takes neither strides nor dilation");
    const auto* scale = reinterpret_cast<const float*>(data<uint8_t>(pack) + kHeader);
    const auto* weights = reinterpret_cast<const uint32_t*>(scale + 2 * vector);
    return launch_of(ConvRun<T>{s, nullptr, nullptr, nullptr, weights, scale, scale + vector, activation}, own, method,
                     pack);
  };
  if (x.dtype == ScalarType::BFloat16) return make(bf16{});
  STD_TORCH_CHECK(x.dtype == ScalarType::Float, "our kernels on the CPU compute fp32 and bf16");
  return make(float{});
}

namespace {

void conv_packed_op(Tensor y, const Tensor& x, const Tensor& pack, const Maybe& residual, const Sizes& kernel,
                    const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                    const std::string& activation, const std::string& name) {
  check_image(x, x, "x");
  const auto* header = reinterpret_cast<const Header*>(check_pack(pack));
  STD_TORCH_CHECK(known_method(*header) == method_of(name), kOther);
  const Launch launch =
      conv_packed(image_of(x), pack, y.size(1), kernel, stride, padding, dilation, groups, activation_of(activation));
  check_result(y, launch.shape, x, "y");
  if (residual.has_value()) check_result(*residual, launch.shape, x, "residual");
  launch.all(x.const_data_ptr(), residual.has_value() ? residual->const_data_ptr() : nullptr, y.mutable_data_ptr());
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("_conv_pack", TORCH_BOX(&fused_resnet::conv_pack));
  m.impl("_conv_packed", TORCH_BOX(&fused_resnet::conv_packed_op));
}
