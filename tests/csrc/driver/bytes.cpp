// 8-bit convolutions, pools and quantisation on every instruction set, which must give what plain loops give, to the
// last bit; and the memory that serves again.
#include <cmath>

#include "calls.h"
#include "cpu/memory.h"
#include "cpu/parts.h"

namespace fused_resnet {
namespace {

// Sums times 1/8 plus eighths: exact, and full of ties when they are rounded.
constexpr float kScale = 0.125f, kResidualScale = 0.5f;
constexpr int32_t kXZero = 5, kResidualZero = 11;

std::vector<Int8s> tables() {
  std::vector<Int8s> found;
  for (const Convs<float>& own : convs<float>()) {
    const std::string isa = own.isa;
#if defined(FR_HAS_AVX512DOT)
    if (isa == "avx512dot") found.push_back(avx512dot::int8s());
#endif
#if defined(FR_HAS_AVX512)
    if (isa == "avx512") found.push_back(avx512::int8s());
#endif
#if defined(FR_HAS_AVX2)
    if (isa == "avx2") found.push_back(avx2::int8s());
#endif
    if (isa == "baseline") found.push_back(baseline::int8s());
  }
  return found;
}

struct Case {
  int64_t N, H, W, C, K, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

constexpr Case kCases[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1},    {1, 5, 4, 1, 3, 2, 2, 1, 1, 0, 0, 1, 1},
    {2, 9, 7, 3, 17, 3, 3, 1, 1, 1, 1, 1, 1},   {2, 4, 5, 17, 24, 1, 1, 1, 1, 0, 0, 1, 1},
    {2, 6, 5, 24, 48, 3, 3, 2, 1, 1, 1, 1, 1},  {1, 13, 12, 3, 24, 7, 7, 2, 2, 3, 3, 1, 1},
    {1, 9, 9, 16, 40, 5, 5, 3, 2, 0, 4, 1, 1},  {1, 3, 8, 17, 17, 6, 6, 1, 1, 4, 3, 1, 1},
    {2, 7, 7, 3, 5, 2, 2, 1, 1, 1, 1, 2, 3},    {1, 7, 5, 17, 48, 1, 3, 1, 1, 0, 3, 1, 1},
    {1, 6, 6, 12, 20, 3, 3, 1, 1, 2, 2, 2, 2},  {2, 5, 9, 64, 33, 1, 1, 1, 1, 0, 0, 1, 1},
    {2, 5, 5, 256, 48, 1, 1, 1, 1, 0, 0, 1, 1}, {1, 6, 6, 65, 50, 1, 1, 2, 2, 0, 0, 1, 1},
    {2, 3, 5, 130, 24, 3, 3, 1, 1, 1, 1, 1, 1}, {1, 3, 3, 604, 17, 1, 1, 1, 1, 0, 0, 1, 1},
    {3, 19, 13, 4, 8, 1, 1, 1, 1, 0, 0, 1, 1},  {1, 5, 5, 21, 24, 3, 3, 1, 1, 4, 4, 1, 1},
    {2, 5, 12, 24, 40, 3, 3, 1, 1, 1, 1, 1, 1}, {1, 25, 31, 48, 17, 3, 3, 2, 2, 1, 1, 1, 1},
    {1, 2, 2, 7, 96, 7, 7, 1, 1, 3, 3, 1, 1},   {1, 9, 5, 40, 33, 3, 3, 1, 1, 3, 3, 3, 2},
    {0, 4, 4, 8, 40, 3, 3, 1, 1, 1, 1, 1, 1},   {1, 4, 4, 300, 64, 3, 3, 1, 1, 1, 1, 1, 1},
    {1, 4, 4, 17, 24, 1, 1, 1, 1, 0, 0, 1, 1},
};

constexpr Case kFar{1, 3, 5, 4, 64, 1, 1, 1, 1, 0, 0, 1, 1};  // sums that end outside of int32

struct Trial {
  ConvShape s;
  Tensor x, weight, scale, shift, narrow, wide;  // two residuals
  float unit;                                    // of the scale

  Trial(const Case& c, int64_t offset, float unit = kScale)
      : s(conv_sizes({c.N, c.C, c.H, c.W}, {c.K, c.C, c.R, c.S}, {c.stride_h, c.stride_w}, {c.pad_h, c.pad_w},
                     {c.dilation_h, c.dilation_w}, 1)),
        x(filled<uint8_t>({c.N, c.C, c.H, c.W}, ScalarType::Byte, true, 0, 255, 1, offset)),
        weight(filled<int8_t>({c.K, c.C, c.R, c.S}, ScalarType::Char, false, -127, 127)),
        scale(filled<float>({c.K}, ScalarType::Float, false, 1, 1, unit)),
        shift(filled<float>({c.K}, ScalarType::Float, false, -999, 999, kScale)),
        narrow(filled<uint8_t>({s.N, s.K, s.P, s.Q}, ScalarType::Byte, true, 0, 255, 1, offset)),
        wide(filled<float>({s.N, s.K, s.P, s.Q}, ScalarType::Float, true, -999, 999, 0.25f, offset)),
        unit(unit) {
    if (wide.numel() > 1) data_out<float>(wide)[1] = NAN;
  }

  // What plain loops make of element [n, p, q, k], before its end.
  int64_t sum(const Pixel& at, int32_t k) const {
    int64_t out = 0;
    for (int32_t i = 0; i < s.C * s.R * s.S; ++i) {
      const Depth d = depth_of(i, s.S, s.C);
      const int32_t h = tap(at.p, d.r, s.stride_h, s.pad_h, s.dilation_h);
      const int32_t w = tap(at.q, d.s, s.stride_w, s.pad_w, s.dilation_w);
      if (!inside(h, s.H) || !inside(w, s.W)) continue;
      out += (data<uint8_t>(x)[nhwc(at.n, h, w, d.c, s.H, s.W, s.C)] - kXZero) *
             data<int8_t>(weight)[((int64_t{k} * s.C + d.c) * s.R + d.r) * s.S + d.s];
    }
    return out;
  }

  std::vector<int64_t> sums() const {
    std::vector<int64_t> out;
    for (int64_t i = 0; i < pixels(s); ++i) {
      for (int32_t k = 0; k < s.K; ++k) out.push_back(sum(pixel_of(i, s.P, s.Q), k));
    }
    return out;
  }

  float answer(int64_t sum, int64_t i, const Tensor* residual) const {
    float z = static_cast<float>(sum) * unit + data<float>(shift)[i % s.K];
    if (residual == &narrow) z += static_cast<float>(data<uint8_t>(narrow)[i] - kResidualZero) * kResidualScale;
    if (residual == &wide) z += data<float>(wide)[i] * kResidualScale;
    return z;
  }
};

uint8_t narrowed(float z, float low, float high, int32_t zero) {
  low = std::fmax(low, static_cast<float>(-zero));
  high = std::fmin(high, static_cast<float>(255 - zero));
  return static_cast<uint8_t>(std::nearbyint(z > low ? (z < high ? z : high) : low) + static_cast<float>(zero));
}

// What an end of the sums is.
struct End {
  const Tensor* residual;
  bool narrow;
  float low, high;
  int32_t zero;
};

void judge(const Trial& o, const std::vector<int64_t>& sums, const End& end, const Tensor& y, const char* isa,
           size_t index) {
  for (size_t i = 0; i < sums.size(); ++i) {
    const float z = o.answer(sums[i], static_cast<int64_t>(i), end.residual);
    float found, wanted;
    if (end.narrow) {
      found = data<uint8_t>(y)[i];
      wanted = narrowed(z, end.low, end.high, end.zero);
    } else {
      found = data<float>(y)[i];
      wanted = z < end.low ? end.low : z > end.high ? end.high : z;
    }
    if (found != wanted && !(found != found && wanted != wanted))
      fail("%s, int8 case %d, element %d: %g, should be %g", isa, static_cast<int>(index), static_cast<int>(i), found,
           wanted);
  }
}

// Part by part, each with scratch of exactly the size that is asked for.
void by_parts(const Trial& o, const Int8s& own, const End& end, const Tensor& pack, const Tensor& y) {
  const int64_t filters = padded(o.s.K, own.lanes), panels = ceil_div<int64_t>(o.s.K, 2 * own.lanes);
  const auto* start = reinterpret_cast<const int32_t*>(data<uint8_t>(pack) + 64);
  const Int8Run run{o.s,
                    data<uint8_t>(o.x),
                    kXZero,
                    reinterpret_cast<const uint32_t*>(start + 3 * filters),
                    start,
                    reinterpret_cast<const float*>(start + filters),
                    reinterpret_cast<const float*>(start + 2 * filters),
                    end.residual == nullptr ? nullptr : end.residual->const_data_ptr(),
                    end.residual == &o.narrow,
                    kResidualZero,
                    kResidualScale,
                    end.low,
                    end.high,
                    end.zero,
                    end.narrow,
                    y.mutable_data_ptr()};
  const Grid grid{pixels(o.s), panels, std::min<int64_t>(pixels(o.s), 3), std::min<int64_t>(panels, 2)};
  for (int64_t i = 0; i < grid.size(); ++i) {
    const Part part = grid[i];
    const Tensor room({own.scratch(o.s, part)}, ScalarType::Byte, false);
    own.conv(run, part, room.mutable_data_ptr());
  }
}

void check_convs(const Case& c, size_t index, float unit = kScale) {
  const Trial o(c, static_cast<int64_t>(index % 2), unit);
  const std::vector<int64_t> sums = o.sums();
  const Sizes stride{c.stride_h, c.stride_w}, padding{c.pad_h, c.pad_w}, dilation{c.dilation_h, c.dilation_w};
  for (const Int8s& own : tables()) {
    const Tensor pack = torch::stable::find_operator<Int8Pack>("_conv_int8_pack")(o.weight, o.scale, o.shift,
                                                                                  c.dilation_w, kXZero, own.isa);
    for (const Tensor* residual : {static_cast<const Tensor*>(nullptr), &o.narrow, &o.wide}) {
      for (bool narrow : {true, false}) {
        const End end{residual, narrow, index % 3 == 0 ? -90.5f : -INFINITY, index % 3 == 1 ? 99.0f : INFINITY,
                      narrow && index % 4 != 0 ? 93 : 0};
        const Maybe given = residual == nullptr ? Maybe{} : Maybe{*residual};
        for (int64_t threads : {1, 3}) {
          torch::stable::threads = threads;
          const Tensor y = torch::stable::find_operator<ConvInt8>("_conv_int8")(
              o.x, pack, given, {c.K, c.R, c.S}, stride, padding, dilation, kResidualScale, kResidualZero, end.zero,
              end.low, end.high, narrow);
          judge(o, sums, end, y, own.isa, index);
        }
        torch::stable::threads = 1;
        if (sums.empty()) continue;
        const Tensor y({o.s.N, o.s.K, o.s.P, o.s.Q}, narrow ? ScalarType::Byte : ScalarType::Float, true);
        by_parts(o, own, end, pack, y);
        judge(o, sums, end, y, own.isa, index);
      }
    }
  }
}

void check_quantize() {
  constexpr float kOdd[] = {NAN, INFINITY, -INFINITY, 1e30f, -1e30f, 0.5f, 1.5f, -0.5f, -0.0f, 254.5f};
  for (const Int8s& own : tables()) {
    for (int64_t count : {0, 1, 10, 15, 16, 17, 100}) {
      for (int32_t zero : {0, 93, 255}) {
        const Tensor x = filled<float>({count}, ScalarType::Float, false, -999, 999, 0.25f, count % 3);
        for (int64_t i = 0; i < std::min<int64_t>(count, 10); ++i) data_out<float>(x)[i] = kOdd[i];
        const Tensor y({count}, ScalarType::Byte, false, count % 5);
        own.quantize(data<float>(x), count, 2, zero, data_out<uint8_t>(y));
        for (int64_t i = 0; i < count; ++i) {
          const uint8_t wanted = narrowed(data<float>(x)[i] * 2, -INFINITY, INFINITY, zero);
          if (data<uint8_t>(y)[i] != wanted)
            fail("%s, quantize: %g is %d, should be %d", own.isa, data<float>(x)[i], data<uint8_t>(y)[i], wanted);
        }
      }
    }
  }
}

template <class T>
float value(const T& element) {
  if constexpr (sizeof(T) == 1) {
    return element;
  } else {
    return widen(element);
  }
}

// Row after row of max-pools over x, which holds NaN where there are any.
template <class T, class F>
void check_pool(const Tensor& x, const Case& c, const char* isa, const F& pool) {
  const ConvShape s =
      conv_sizes(sizes_of(x), {c.C, c.C, c.R, c.S}, {c.stride_h, c.stride_w}, {c.pad_h, c.pad_w}, {1, 1}, 1);
  const Tensor y({s.N, s.K, s.P, s.Q}, x.scalar_type(), true, 1);
  for (int64_t i = 0; i < int64_t{s.N} * s.P; ++i)
    pool(s, data<T>(x), data_out<T>(y), i / s.P, static_cast<int32_t>(i % s.P));
  for (int64_t i = 0; i < y.numel(); ++i) {
    const Pixel at = pixel_of(i / s.C, s.P, s.Q);
    float most = -INFINITY;
    for (int32_t j = 0; j < s.R * s.S; ++j) {
      const int32_t h = tap(at.p, j / s.S, s.stride_h, s.pad_h, 1), w = tap(at.q, j % s.S, s.stride_w, s.pad_w, 1);
      if (!inside(h, s.H) || !inside(w, s.W)) continue;
      const float one = value(data<T>(x)[nhwc(at.n, h, w, static_cast<int32_t>(i % s.C), s.H, s.W, s.C)]);
      if (one > most || one != one) most = one;
    }
    const float found = value(data<T>(y)[i]);
    if (found != most && !(found != found && most != most))
      fail("%s, a pool of %d channels, %d bytes, element %d: %g, should be %g", isa, static_cast<int>(s.C),
           static_cast<int>(sizeof(T)), static_cast<int>(i), found, most);
  }
}

template <class T>
void check_pools(const Case& c, ScalarType type) {
  const Tensor x = filled<T>({c.N, c.C, c.H, c.W}, type, true, -9999, -1, 1, 1);
  round_to(data_out<T>(x)[x.numel() / 2], NAN);
  for (const Convs<T>& own : convs<T>()) {
    check_pool<T>(x, c, own.isa, own.max_pool);
    const int64_t count = 8;  // numbers whose mean is exact
    const Tensor pixels = filled<T>({count, c.C}, type, false, -99, 99, 1, 1), mean({c.C}, type, false, 1);
    own.mean_pool(data<T>(pixels), count, c.C, data_out<T>(mean));
    for (int64_t k = 0; k < c.C; ++k) {
      float sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += widen(data<T>(pixels)[i * c.C + k]);
      T wanted;
      round_to(wanted, sum / count);
      if (widen(data<T>(mean)[k]) != widen(wanted)) fail("%s, a mean of %d channels", own.isa, static_cast<int>(c.C));
    }
  }
}

void check_all_pools() {
  for (int64_t C : {1, 3, 4, 15, 16, 17, 40, 63, 64, 65, 130}) {
    for (const Case& c : {Case{2, 7, 6, C, C, 3, 3, 2, 2, 1, 1, 1, 1}, Case{1, 5, 9, C, C, 2, 4, 1, 3, 1, 2, 1, 1},
                          Case{1, 1, 3, C, C, 1, 1, 1, 2, 0, 0, 1, 1}}) {
      const Tensor x = filled<uint8_t>({c.N, C, c.H, c.W}, ScalarType::Byte, true, 0, 255, 1, 1);
      for (const Int8s& own : tables()) check_pool<uint8_t>(x, c, own.isa, own.max_pool);
      check_pools<float>(c, ScalarType::Float);
      check_pools<bf16>(c, ScalarType::BFloat16);
    }
  }
}

}  // namespace

void check_bytes() {
  for (size_t i = 0; i < std::size(kCases); ++i) check_convs(kCases[i], i);
  check_convs(kFar, 2, 0x1p22f);
  check_quantize();
  check_all_pools();
}

}  // namespace fused_resnet
