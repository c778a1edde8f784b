// Launches that were recorded on a tape, played in one call: between two of them no interpreter runs.
#include "cpu/launches.h"
#include "cpu/memory.h"

namespace fused_resnet {
namespace {

enum class Kind : int64_t { conv, conv_int8, max_pool, quantize };

// One launch. Values are numbered: those given first, then one result a launch.
struct Entry {
  Kind kind;
  int64_t x, residual, pack;  // -1 where there is none
  int64_t filters[3];         // K, R, S
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups, activation;
  int64_t reuse;                        // the result is written over the residual
  int64_t residual_zero, zero, narrow;  // of 8-bit values
};

// `inverse` stands in the first place where a launch quantises.
struct Numbers {
  double residual_scale, low, high;
};

constexpr int64_t kWords = sizeof(Entry) / sizeof(int64_t), kNumbers = sizeof(Numbers) / sizeof(double);

Sizes pair(const int64_t (&of)[2]) {
  return {of[0], of[1]};
}

Tensor play_one(const Entry& e, const Numbers& n, const Tensor& x, const Maybe& residual, const Maybe& pack) {
  const Sizes filters{e.filters[0], e.filters[1], e.filters[2]}, kernel{e.filters[1], e.filters[2]};
  const Sizes stride = pair(e.stride), padding = pair(e.padding), dilation = pair(e.dilation);
  switch (e.kind) {
    case Kind::conv: {
      STD_TORCH_CHECK(pack.has_value() && e.activation >= 0 &&
                          e.activation <= static_cast<int64_t>(Activation::hardswish) && e.groups > 0 &&
                          (!e.reuse || residual.has_value()),
                      "the tape is not whole");
      const ConvShape s =
          conv_sizes(x, {filters[0], x.size(1) / e.groups, kernel[0], kernel[1]}, stride, padding, dilation, e.groups);
      const Tensor y = e.reuse ? *residual : make_image(s.N, s.K, s.P, s.Q, x.scalar_type(), x);
      conv_packed(y, x, *pack, residual, kernel, stride, padding, dilation, e.groups,
                  static_cast<Activation>(e.activation));
      return y;
    }
    case Kind::conv_int8:
      STD_TORCH_CHECK(pack.has_value(), "the tape is not whole");
      return conv_int8(x, *pack, residual, filters, stride, padding, dilation, n.residual_scale, e.residual_zero,
                       e.zero, n.low, n.high, e.narrow);
    case Kind::max_pool:
      return max_pool(x, kernel, stride, padding);
    case Kind::quantize:
      return quantize(x, n.residual_scale, e.zero);
  }
  STD_TORCH_CHECK(false, "the tape holds no such launch");
}

// entries int64 [launches, kWords], numbers fp64 [launches, kNumbers]; returns the values that `results` names. A value
// lives until its last reader has run.
std::vector<Tensor> play(const std::vector<Tensor>& given, const std::vector<Tensor>& packs, const Tensor& entries,
                         const Tensor& numbers, const Sizes& results) {
  STD_TORCH_CHECK(entries.scalar_type() == ScalarType::Long && numbers.scalar_type() == ScalarType::Double &&
                      entries.is_contiguous() && numbers.is_contiguous() && entries.dim() == 2 &&
                      entries.size(1) == kWords && numbers.numel() == entries.size(0) * kNumbers,
                  "this is no tape");
  const int64_t first = static_cast<int64_t>(given.size()), count = entries.size(0), size = first + count;
  const auto* entry = static_cast<const Entry*>(entries.const_data_ptr());
  const auto* number = static_cast<const Numbers*>(numbers.const_data_ptr());
  std::vector<int64_t> last(size, -1);
  for (int64_t i = 0; i < count; ++i) {
    const Entry& e = entry[i];
    STD_TORCH_CHECK(e.x >= 0 && e.x < first + i && e.residual >= -1 && e.residual < first + i && e.pack >= -1 &&
                        e.pack < static_cast<int64_t>(packs.size()),
                    "launch ", i, " of the tape reads what is not there");
    last[e.x] = i;
    if (e.residual >= 0) last[e.residual] = i;
  }
  for (int64_t value : results) {
    STD_TORCH_CHECK(value >= 0 && value < size, "the tape has no value ", value);
    last[value] = count;
  }
  std::vector<Maybe> values(given.begin(), given.end());
  values.resize(size);
  for (int64_t i = 0; i < count; ++i) {
    const Entry& e = entry[i];
    values[first + i] = play_one(e, number[i], *values[e.x], e.residual < 0 ? Maybe{} : values[e.residual],
                                 e.pack < 0 ? Maybe{} : Maybe{packs[e.pack]});
    for (int64_t read : {e.x, e.residual}) {
      if (read >= 0 && last[read] == i) values[read].reset();
    }
  }
  std::vector<Tensor> out;
  for (int64_t value : results) out.push_back(*values[value]);
  return out;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("_play", TORCH_BOX(&fused_resnet::play));
}
