// The raw operators _bn_act, _bn_act_sums and _bn_act_grad for CUDA.
#include <tuple>

#include "cuda/bn_act.cuh"
#include "cuda/launch.h"

namespace fused_resnet {
namespace {

constexpr int64_t kBlocks = 8;  // of a multiprocessor: 2048 threads

template <class T>
BnActArgs<T> args_of(const Tensor& x, const Maybe& residual) {
  BnActArgs<T> a{};
  a.x = data<T>(x);
  a.residual = data<T>(residual);
  a.elements = x.numel();
  a.rows = x.size(0) * x.size(2) * x.size(3);
  a.C = narrow_size(x.size(1), "C");
  STD_TORCH_CHECK(a.C < 1 << 20, "more than 2^20 channels");
  return a;
}

template <class T>
NormArgs<Accumulator<T>> norm_of(Vectors& vectors, const Tensor& x, const Maybe& gamma, const Maybe& beta,
                                 const Maybe& mean, const Maybe& var, const Maybe& means, double eps) {
  using A = Accumulator<T>;
  const int64_t C = x.size(1);
  return {vectors.of<A>(gamma, C, "gamma"), vectors.of<A>(beta, C, "beta"),       vectors.of<A>(mean, C, "mean"),
          vectors.of<A>(var, C, "var"),     vectors.of<A>(means, 2 * C, "means"), static_cast<A>(eps)};
}

std::tuple<Tensor, Tensor> bn_act(const Tensor& x, const Maybe& gamma, const Maybe& beta, const Tensor& mean,
                                  const Tensor& var, double eps, const std::string& activation, const Maybe& residual,
                                  const Maybe& r_gamma, const Maybe& r_beta, const Maybe& r_mean, const Maybe& r_var,
                                  double r_eps) {
  check_image(x, x, "x");
  check_shortcut(x, residual, r_mean, r_var);
  const Activation kind = kink_of(activation);
  const Stream stream(x);
  Vectors vectors(x);
  Tensor y = image_like(x);
  Tensor mask = make({kind == Activation::identity ? 0 : mask_bytes(x.numel())}, ScalarType::Byte, x);
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    BnActArgs<T> a = args_of<T>(x, residual);
    a.norm = norm_of<T>(vectors, x, gamma, beta, mean, var, {}, eps);
    a.r_norm = norm_of<T>(vectors, x, r_gamma, r_beta, r_mean, r_var, {}, r_eps);
    a.y = data_out<T>(y);
    a.mask = kind == Activation::identity ? nullptr : data_out<uint8_t>(mask);
    a.activation = kind;
    a.aligned = aligned(a.x, a.residual, a.y);
    launch_forward(a, stream.multiprocessors() * kBlocks, stream);
  });
  return {y, mask};
}

Tensor bn_act_sums(const Tensor& dy, const Maybe& mask, const Tensor& x, const Tensor& mean, const Tensor& var,
                   double eps, const Maybe& residual, const Maybe& r_mean, const Maybe& r_var, double r_eps) {
  check_backward(x, dy, mask, residual, r_mean, r_var);
  const Stream stream(x);
  Vectors vectors(x);
  const int64_t count = r_var.has_value() ? 3 : 2;
  Tensor sums = make({count, x.size(1)}, accumulator_type(x), x);
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    BnActArgs<T> a = args_of<T>(x, residual);
    a.norm = norm_of<T>(vectors, x, {}, {}, mean, var, {}, eps);
    a.r_norm = norm_of<T>(vectors, x, {}, {}, r_mean, r_var, {}, r_eps);
    a.dy = data<T>(dy);
    a.given_mask = data<uint8_t>(mask);
    a.aligned = aligned(a.x, a.residual, a.dy);
    Tensor parts = make({sum_plan(a.rows, a.C).strips, count, a.C}, accumulator_type(x), x);
    a.parts = data_out<A>(parts);
    a.sums = data_out<A>(sums);
    launch_sums(a, stream);
  });
  return sums;
}

std::tuple<Tensor, Tensor> bn_act_grad(const Tensor& dy, const Maybe& mask, const Tensor& x, const Maybe& gamma,
                                       const Tensor& mean, const Tensor& var, double eps, const Tensor& means,
                                       bool shortcut, const Maybe& residual, const Maybe& r_gamma, const Maybe& r_mean,
                                       const Maybe& r_var, double r_eps, const Maybe& r_means) {
  check_backward(x, dy, mask, residual, r_mean, r_var);
  check_means(x, means, shortcut, r_var, r_means);
  const Stream stream(x);
  Vectors vectors(x);
  Tensor dx = image_like(x);
  Tensor dr = shortcut ? image_like(x) : make({0}, x.scalar_type(), x);
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    BnActArgs<T> a = args_of<T>(x, residual);
    a.norm = norm_of<T>(vectors, x, gamma, {}, mean, var, means, eps);
    a.r_norm = norm_of<T>(vectors, x, r_gamma, {}, r_mean, r_var, r_means, r_eps);
    a.dy = data<T>(dy);
    a.given_mask = data<uint8_t>(mask);
    a.dx = data_out<T>(dx);
    a.dr = shortcut ? data_out<T>(dr) : nullptr;
    a.aligned = aligned(a.x, a.residual, a.dy, a.dx, a.dr);
    launch_gradient(a, stream.multiprocessors() * kBlocks, stream);
  });
  return {dx, dr};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CUDA, m) {
  m.impl("_bn_act", TORCH_BOX(&fused_resnet::bn_act));
  m.impl("_bn_act_sums", TORCH_BOX(&fused_resnet::bn_act_sums));
  m.impl("_bn_act_grad", TORCH_BOX(&fused_resnet::bn_act_grad));
}
