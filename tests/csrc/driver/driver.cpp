// Runs the convolutions of csrc/cpu on every instruction set that the processor has, over small integers, whose sums
// are exact: results must be those of plain loops to the last bit, but for F(4x4, 3x3) and smooth activations, whose
// error is printed as lines of "instruction set, bytes of an element, error over the largest sum". Exits with 1 at the
// first mismatch.
#include <cstdio>

#include "cpu/conv_packed.cpp"
#include "numbers.h"

using namespace fused_resnet;

namespace {

struct Case {
  int32_t N, H, W, C, K, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};

constexpr Case kDirect[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1},    {1, 5, 4, 1, 3, 2, 2, 1, 1, 0, 0, 1, 1, 1},
    {2, 9, 7, 3, 17, 3, 3, 1, 1, 1, 1, 1, 1, 1},   {2, 4, 5, 17, 24, 1, 1, 1, 1, 0, 0, 1, 1, 1},
    {2, 6, 5, 24, 48, 3, 3, 2, 1, 1, 1, 1, 1, 1},  {1, 12, 12, 3, 24, 7, 7, 2, 2, 3, 3, 1, 1, 1},
    {1, 9, 9, 16, 40, 5, 5, 3, 2, 0, 4, 1, 1, 1},  {1, 3, 8, 17, 17, 6, 6, 1, 1, 4, 3, 1, 1, 1},
    {2, 7, 7, 3, 5, 2, 2, 1, 1, 1, 1, 2, 3, 1},    {1, 7, 5, 17, 48, 1, 3, 1, 1, 0, 1, 1, 1, 1},
    {1, 5, 7, 48, 17, 3, 1, 1, 2, 1, 0, 1, 1, 1},  {2, 6, 6, 24, 24, 3, 3, 1, 1, 1, 1, 1, 1, 24},
    {1, 5, 5, 17, 34, 3, 3, 2, 2, 1, 1, 1, 1, 17}, {1, 6, 6, 12, 20, 3, 3, 1, 1, 2, 2, 2, 2, 4},
    {1, 4, 3, 6, 102, 3, 3, 1, 1, 1, 1, 1, 1, 3},  {2, 5, 9, 64, 33, 1, 1, 1, 1, 0, 0, 1, 1, 1},
    {2, 5, 5, 128, 48, 1, 1, 1, 1, 0, 0, 1, 1, 1}, {1, 6, 6, 65, 50, 1, 1, 2, 2, 0, 0, 1, 1, 1},
    {2, 3, 5, 130, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1}, {1, 3, 3, 600, 17, 1, 1, 1, 1, 0, 0, 1, 1, 1},
    {3, 19, 13, 4, 8, 1, 1, 1, 1, 0, 0, 1, 1, 1},  {3, 1, 1, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1},
    {2, 9, 11, 3, 40, 7, 7, 2, 2, 3, 3, 1, 1, 1},  {2, 6, 5, 5, 17, 3, 2, 1, 1, 2, 0, 1, 1, 1},
    {1, 5, 5, 21, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1},  {1, 12, 40, 200, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1},
    {2, 5, 12, 24, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1}, {1, 25, 31, 48, 17, 3, 3, 2, 2, 1, 1, 1, 1, 1},
    {2, 5, 40, 16, 32, 2, 3, 2, 3, 0, 1, 1, 1, 1}, {1, 2, 2, 7, 96, 7, 7, 1, 1, 3, 3, 1, 1, 1},
    {0, 4, 4, 8, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1},
};
constexpr Case kWinograd[] = {
    {1, 1, 1, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1},  {2, 2, 3, 16, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1},
    {2, 5, 9, 32, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1},  {1, 8, 6, 48, 80, 3, 3, 1, 1, 1, 1, 1, 1, 1},
    {1, 7, 13, 80, 48, 3, 3, 1, 1, 0, 2, 1, 1, 1}, {1, 9, 4, 16, 32, 3, 3, 1, 1, 3, 0, 1, 1, 1},
    {1, 4, 5, 272, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1}, {1, 23, 19, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1},
};

template <class T>
constexpr ScalarType kType = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::BFloat16;

template <class T>
void fill(const Tensor& t, int low, int high) {
  for (int64_t i = 0; i < t.numel(); ++i) round_to(data_out<T>(t)[i], static_cast<float>(number(low, high)));
}

Tensor vector_of(int32_t size, int low, int high) {
  Tensor t({size}, ScalarType::Float, false);
  fill<float>(t, low, high);
  return t;
}

template <class T>
struct Trial {
  Case c;
  ConvShape s;
  Tensor x, weight, residual, bias, gamma, beta, mean, var;
  std::vector<float> sums;  // [pixels][K]

  Trial(const Case& given, int64_t offset) : c(given) {
    x = Tensor({c.N, c.C, c.H, c.W}, kType<T>, true, offset);
    s = conv_sizes(sizes_of(x), {c.K, c.C / c.groups, c.R, c.S}, {c.stride_h, c.stride_w}, {c.pad_h, c.pad_w},
                   {c.dilation_h, c.dilation_w}, c.groups);
    weight = Tensor({c.K, c.C / c.groups, c.R, c.S}, kType<T>, false);
    residual = image(offset);
    fill<T>(x, -2, 2);
    fill<T>(weight, -1, 1);
    fill<T>(residual, -4, 4);
    bias = vector_of(c.K, -2, 2);
    gamma = vector_of(c.K, -2, 2);
    beta = vector_of(c.K, -3, 3);
    mean = vector_of(c.K, -2, 2);
    var = vector_of(c.K, 1, 1);
    for (int64_t i = 0; i < pixels(s); ++i) {
      for (int32_t k = 0; k < c.K; ++k) sums.push_back(sum(pixel_of(i, s.P, s.Q), k));
    }
  }

  Tensor image(int64_t offset) const { return Tensor({s.N, s.K, s.P, s.Q}, kType<T>, true, offset); }

  Tensor pack(const std::string& method, const char* isa) const {
    return conv_pack(weight, bias, gamma, beta, mean, var, 0.0, {c.dilation_h, c.dilation_w}, c.groups, method, isa);
  }

  void launch(const Tensor& y, const Tensor& packed, const Maybe& r, const std::string& activation,
              const std::string& method) const {
    conv_packed_op(y, x, packed, r, {c.R, c.S}, {c.stride_h, c.stride_w}, {c.pad_h, c.pad_w},
                   {c.dilation_h, c.dilation_w}, c.groups, activation, method);
  }

  // What plain loops over the cells of the kernel add up, which is exact.
  float sum(Pixel at, int32_t k) const {
    const int32_t channels = c.C / c.groups, first = k / (c.K / c.groups) * channels, cells = c.R * c.S;
    const T* own = data<T>(weight) + int64_t{k} * channels * cells;
    float sum = 0;
    for (int32_t cell = 0; cell < cells; ++cell) {
      const int32_t h = tap(at.p, cell / c.S, c.stride_h, c.pad_h, c.dilation_h);
      const int32_t w = tap(at.q, cell % c.S, c.stride_w, c.pad_w, c.dilation_w);
      if (!inside(h, c.H) || !inside(w, c.W)) continue;
      const T* from = data<T>(x) + nhwc(at.n, h, w, first, c.H, c.W, c.C);
      for (int32_t i = 0; i < channels; ++i) sum += widen(from[i]) * widen(own[i * cells + cell]);
    }
    return sum;
  }

  // Exact before the activation.
  std::vector<float> answers(bool add, Activation activation) const {
    std::vector<float> out;
    for (size_t i = 0; i < sums.size(); ++i) {
      const size_t k = i % static_cast<size_t>(c.K);
      float z = (sums[i] + data<float>(bias)[k] - data<float>(mean)[k]) * data<float>(gamma)[k] + data<float>(beta)[k];
      if (add) z += widen(data<T>(residual)[i]);
      out.push_back(activate(z, activation));
    }
    return out;
  }
};

// Exactly the numbers that are `wanted`, or, where the results' sums are as large as `largest`, as near as is printed.
template <class T>
void judge(const Tensor& y, const std::vector<float>& wanted, float largest, const char* isa, const char* what,
           size_t index) {
  const bool exact = largest == 0;
  float worst = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const float found = widen(data<T>(y)[i]);
    T rounded;
    round_to(rounded, wanted[i]);
    if (exact ? widen(rounded) != found : found != found) {
      std::fprintf(stderr, "%s, %d bytes, %s, case %zu, element %zu: %g, should be %g\n", isa,
                   static_cast<int>(sizeof(T)), what, index, i, found, widen(rounded));
      std::exit(1);
    }
    worst = std::max(worst, std::fabs(found - wanted[i]));
  }
  if (!exact) std::printf("%s %d %g\n", isa, static_cast<int>(sizeof(T)), worst / largest);
}

// Part by part, each with scratch of exactly the size that is asked for.
template <class T>
void by_parts(const Trial<T>& o, const Convs<T>& own, Method method, const Tensor& packed, const Tensor& y,
              Activation activation, bool shared) {
  const auto* scale = reinterpret_cast<const float*>(data<uint8_t>(packed) + kHeader);
  const int64_t vector = padded(o.s.K, 16);
  const ConvRun<T> run{
      o.s,   data<T>(o.x),   data<T>(o.residual), data_out<T>(y), reinterpret_cast<const uint32_t*>(scale + 2 * vector),
      scale, scale + vector, activation};
  const int m = pixels_of(method);
  const bool direct = method == Method::direct;
  const int64_t rows = direct ? pixels(o.s) : winograd_tiles(o.s, m).count;
  const int64_t panels = o.s.groups * ceil_div<int64_t>(o.s.K / o.s.groups, 2 * own.lanes);
  Tensor tiles;
  if (shared) {
    tiles = Tensor({(m + 2) * (m + 2) * winograd_chunks(o.s) * kChunk * rows}, ScalarType::Float, false);
    own.winograd_input(run, m, 0, rows / 2, data_out<float>(tiles));
    own.winograd_input(run, m, rows / 2, rows, data_out<float>(tiles));
  }
  const Grid grid{rows, panels, std::min<int64_t>(rows, 3), std::min<int64_t>(panels, 2)};
  for (int64_t i = 0; i < grid.size(); ++i) {
    const Part part = grid[i];
    const int64_t bytes = direct ? own.direct_scratch(o.s, part) : own.winograd_scratch(o.s, m, part, shared);
    const Tensor room({bytes}, ScalarType::Byte, false);
    if (direct) {
      own.direct(run, part, data_out<uint8_t>(room));
    } else {
      own.winograd(run, m, part, shared ? data<float>(tiles) : nullptr, data_out<uint8_t>(room));
    }
  }
}

template <class T>
void check(const Case& c, const std::string& name, size_t index) {
  constexpr const char* kActivations[] = {"relu", "identity", "relu6", "silu", "hardswish"};
  const Method method = method_of(name);
  const bool exact = method != Method::winograd4;
  for (int64_t offset : {0, 1}) {
    const Trial<T> o(c, offset);
    const std::string activation = kActivations[(index + static_cast<size_t>(offset)) % 5];
    const Activation kind = activation_of(activation);
    const std::vector<float> plain = o.answers(false, kind), added = o.answers(true, kind);
    float largest = 0;
    for (float z : o.answers(true, Activation::identity))
      largest = exact && kind <= Activation::relu6 ? 0 : std::max(largest, std::fabs(z));
    for (const Convs<T>& own : convs<T>()) {
      const bool tiled = method == Method::winograd2 || method == Method::winograd4;
      if (tiled && c.C % own.lanes != 0) continue;
      Tensor packed;
      try {
        packed = o.pack(name, own.isa);
      } catch (const std::runtime_error&) {
        if (method != Method::grouped) throw;
        continue;  // it takes some groups only
      }
      for (int64_t threads : {1, 3}) {
        torch::stable::threads = threads;
        const Tensor y = o.image(offset), sum = o.image(offset), in_place = o.image(offset);
        o.launch(y, packed, std::nullopt, activation, name);
        judge<T>(y, plain, largest, own.isa, name.c_str(), index);
        o.launch(sum, packed, o.residual, activation, name);
        judge<T>(sum, added, largest, own.isa, "with a residual", index);
        if (in_place.numel() != 0)
          memcpy(in_place.mutable_data_ptr(), o.residual.const_data_ptr(), sizeof(T) * static_cast<size_t>(y.numel()));
        o.launch(in_place, packed, in_place, activation, name);
        judge<T>(in_place, added, largest, own.isa, "into the residual", index);
      }
      for (bool shared : {false, true}) {
        if (pixels(o.s) == 0 || method == Method::grouped || (shared && !tiled)) continue;
        const Tensor y = o.image(offset);
        by_parts<T>(o, own, method, packed, y, kind, shared);
        judge<T>(y, added, largest, own.isa, "part by part", index);
      }
    }
  }
}

template <class T>
void check_all() {
  for (size_t i = 0; i < std::size(kDirect); ++i) {
    check<T>(kDirect[i], "direct", i);
    if (kDirect[i].groups > 1) check<T>(kDirect[i], "grouped", i);
  }
  for (size_t i = 0; i < std::size(kWinograd); ++i) {
    check<T>(kWinograd[i], "winograd2", i);
    check<T>(kWinograd[i], "winograd4", i);
  }
}

}  // namespace

int main() {
  check_all<float>();
  check_all<bf16>();
  std::printf("done\n");
  return 0;
}
