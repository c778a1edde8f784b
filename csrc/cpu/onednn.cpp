// A convolution by PyTorch with what stands around it, in the cheaper of two ways:
//
//   folded:    w' = w * scale, then conv(x, w') + shift [+ residual] [+ activation] in one oneDNN call;
//   finished:  conv(x, w), then one pass over its result.
//
// Nothing is kept between calls, so that nothing goes stale. oneDNN's ReLU makes 0 of NaN: it is called where all that
// it reads was found to be finite. 16-bit weights are never folded, that would round them once more than stock does.
#include "cpu/onednn.h"

#include <algorithm>
#include <array>
#include <type_traits>

#include "cpu/finite.h"

namespace fused_resnet {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

template <size_t N>
Tensor call(const char* name, const char* overload, std::array<StableIValue, N> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// What an operator without arguments says; no where this PyTorch has no such operator.
bool says_yes(const char* name) {
  std::array<StableIValue, 1> stack{};
  return torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) == 0 && to<bool>(stack[0]);
}

// Whether oneDNN convolves elements of type T here. Its operators are called by name: some builds have none.
template <class T>
bool onednn_takes() {
  static const bool taken = [] {
    std::array<StableIValue, 1> stack{};
    if (std::is_same_v<T, bf16>) return says_yes("mkldnn::_is_mkldnn_bf16_supported");
    if (std::is_same_v<T, fp16>) return says_yes("mkldnn::_is_mkldnn_fp16_supported");
    return torch_call_dispatcher("mkldnn::_is_mkldnn_bf16_supported", "", stack.data(), TORCH_ABI_VERSION) == 0;
  }();
  return taken;
}

Tensor channels_last(const Tensor& x) {
  return is_channels_last(x) ? x : torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

// What oneDNN calls an activation, or null where it has none that we use.
const char* post_op(Activation activation, bool residual) {
  switch (activation) {
    case Activation::identity:
      return "none";
    case Activation::relu:
      return "relu";
    case Activation::silu:
      return residual ? nullptr : "swish";
    case Activation::hardswish:
      return residual ? nullptr : "hardswish";
    default:
      return nullptr;
  }
}

template <class T>
bool run_pass(const Pass<T>& pass, const Tensor& y) {
  const int64_t rows = y.numel() / pass.C;
  return all_of(rows, kGrain / pass.C, [&](int64_t first, int64_t last) { return loops<T>().pass(pass, first, last); });
}

// The norm with `given`, a bias, in front of it, whose parts are absent as in the call.
template <class A>
NormVectors<A> norm_of(const ConvShape& s, const ConvCall& o, const Maybe& given) {
  NormVectors<A> norm(s.K, o.gamma, o.beta, o.mean, o.var, o.var.has_value() ? o.eps : 0);
  const std::vector<A> bias = channels<A>(given, s.K, 0);
  for (int64_t k = 0; k < s.K; ++k) norm.mean[k] -= bias[k];
  return norm;
}

// weight * scale by filter, and whether it is finite.
template <class T>
std::pair<Tensor, bool> folded(const Tensor& given, const std::vector<Accumulator<T>>& scale) {
  const Tensor weight = given.is_contiguous() || is_channels_last(given) ? given : torch::stable::contiguous(given);
  Tensor out = torch::stable::empty_like(weight);
  const int64_t size = weight.numel() / weight.size(0);
  const bool finite = all_of(weight.size(0), kGrain / std::max<int64_t>(1, size), [&](int64_t first, int64_t last) {
    bool all = true;
    for (int64_t k = first; k < last; ++k) {
      all &= loops<T>().scale(data<T>(weight) + k * size, size, scale[k], data_out<T>(out) + k * size);
    }
    return all;
  });
  return {out, finite};
}

Tensor convolution(const ConvCall& o, const Tensor& x, const Tensor& weight, const Maybe& bias,
                   const std::string& activation) {
  const Sizes none;
  return call<10>("mkldnn::_convolution_pointwise", "",
                  {from(x), from(weight), from(bias), from(o.padding), from(o.stride), from(o.dilation), from(o.groups),
                   from(activation), from(none), from(std::nullopt)});
}

// One oneDNN call, or nothing where something is not finite and the activation would hide it.
template <class T>
Maybe fold(const ConvCall& o, const Tensor& x, bool finite, NormVectors<T>& norm, const char* activation) {
  const bool clips = std::string_view(activation) == "relu";
  if (clips && !finite && !is_finite<T>(x)) return std::nullopt;
  if (clips && o.residual.has_value() && !is_finite<T>(*o.residual)) return std::nullopt;
  Tensor weight = o.weight;
  if (o.mean.has_value() || clips) {
    auto [scaled, weights_finite] = folded<T>(o.weight, norm.scale);
    if (clips && !weights_finite) return std::nullopt;
    weight = scaled;
  }
  const auto K = static_cast<int64_t>(norm.scale.size());
  Tensor shift = make({K}, x.scalar_type(), x);
  T* out = data_out<T>(shift);
  for (int64_t k = 0; k < K; ++k) out[k] = norm.shift[k] - norm.mean[k] * norm.scale[k];
  if (clips && !loops<T>().finite(out, K)) return std::nullopt;
  const std::string name = activation;
  if (!o.residual.has_value()) return convolution(o, x, weight, shift, name);
  const Sizes none;
  return call<13>("mkldnn::_convolution_pointwise", "binary",
                  {from(x), from(*o.residual), from(weight), from(Maybe(shift)), from(o.padding), from(o.stride),
                   from(o.dilation), from(o.groups), from(std::string("add")), from(std::nullopt),
                   from(clips ? std::optional<std::string>(name) : std::nullopt), from(none), from(std::nullopt)});
}

template <class T>
Tensor launch(const ConvShape& s, const ConvCall& o) {
  using A = Accumulator<T>;
  const Activation activation = activation_of(o.activation);
  Tensor x = channels_last(o.x);
  bool finite = false;
  if (!o.prologue.empty()) {
    const NormVectors<A> pre(s.C, o.pre_gamma, o.pre_beta, o.pre_mean, o.pre_var, o.pre_eps);
    Tensor passed = image_like(x);
    finite =
        run_pass<T>({data<T>(x), nullptr, data_out<T>(passed), s.C, pre.view(), activation_of(o.prologue)}, passed);
    x = passed;
  }
  if constexpr (std::is_same_v<T, float>) {
    const char* name = post_op(activation, o.residual.has_value());
    const int64_t results = int64_t{s.N} * s.P * s.Q * s.K;
    int64_t moved = o.mean.has_value() ? 2 * o.weight.numel() : 0;
    if (activation == Activation::relu) moved += (finite ? 0 : x.numel()) + (o.residual ? results : 0);
    if (name != nullptr && moved <= 2 * results && onednn_takes<T>()) {
      NormVectors<A> norm = norm_of<A>(s, o, o.bias);
      if (const Maybe y = fold<T>(o, x, finite, norm, name)) return channels_last(*y);
    }
  }
  // aten::convolution takes another road than oneDNN for some sizes on one thread, at a quarter of the speed.
  const Sizes zero{0, 0};
  // As in stock the bias, in x's type, is added before the result is rounded.
  const Maybe bias = o.bias.has_value() ? Maybe(torch::stable::to(*o.bias, x.scalar_type())) : Maybe();
  Tensor y = onednn_takes<T>() ? convolution(o, x, o.weight, bias, "none")
                               : call<9>("aten::convolution", "",
                                         {from(x), from(o.weight), from(bias), from(o.stride), from(o.padding),
                                          from(o.dilation), from(false), from(zero), from(o.groups)});
  y = channels_last(y);
  const NormVectors<A> norm = norm_of<A>(s, o, std::nullopt);
  run_pass<T>({data<T>(y), data<T>(o.residual), data_out<T>(y), s.K, norm.view(), activation}, y);
  return y;
}

}  // namespace

Maybe conv_by_onednn(const ConvShape& s, const ConvCall& o) {
  if (int64_t{s.N} * s.P * s.Q * s.K * s.C == 0) return std::nullopt;
  switch (o.x.scalar_type()) {
    case ScalarType::Float:
      return launch<float>(s, o);
    case ScalarType::BFloat16:
      return launch<bf16>(s, o);
    case ScalarType::Half:
      return launch<fp16>(s, o);
    default:
      return std::nullopt;
  }
}

}  // namespace fused_resnet
