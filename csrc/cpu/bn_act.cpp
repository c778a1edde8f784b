// Families bn_act, bn_act_sums, bn_act_grad on the CPU: one pass each over [N * H * W, C] matrices.
#include <algorithm>
#include <array>
#include <memory>
#include <tuple>

#include "cpu/pick.h"

namespace fused_resnet {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread
constexpr int64_t kStrips = 256;     // at most so many partial sums: their number must not depend on threads

int64_t rows_of(const Tensor& x) {
  return x.size(0) * x.size(2) * x.size(3);
}

// Calls f(first row, last row, flags) in parallel; rows come in whole octets, so that no byte of a mask is shared.
template <class F>
void by_rows(int64_t rows, int64_t C, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kOctet * C));
  torch::stable::parallel_for(0, ceil_div<int64_t>(rows, kOctet), grain, [&](int64_t first, int64_t last) {
    const std::unique_ptr<uint8_t[]> flags(new uint8_t[kOctet * C + 8]);
    f(first * kOctet, std::min(last * kOctet, rows), flags.get());
  });
}

template <class T>
BnAct<T> problem_of(const Tensor& x, const Maybe& residual) {
  BnAct<T> a{};
  a.x = data<T>(x);
  a.residual = data<T>(residual);
  a.rows = rows_of(x);
  a.C = x.size(1);
  return a;
}

std::tuple<Tensor, Tensor> bn_act(const Tensor& x, const Maybe& gamma, const Maybe& beta, const Tensor& mean,
                                  const Tensor& var, double eps, const std::string& activation, const Maybe& residual,
                                  const Maybe& r_gamma, const Maybe& r_beta, const Maybe& r_mean, const Maybe& r_var,
                                  double r_eps) {
  check_image(x, x, "x");
  check_norm(x, x.size(1), gamma, beta, mean, var);
  check_shortcut(x, residual, r_mean, r_var);
  check_norm(x, x.size(1), r_gamma, r_beta, r_mean, r_var);
  const Activation kind = kink_of(activation);
  Tensor y = image_like(x);
  Tensor mask = make({kind == Activation::identity ? 0 : mask_bytes(x.numel())}, ScalarType::Byte, x);
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    BnAct<T> a = problem_of<T>(x, residual);
    const NormVectors<A> norm(a.C, gamma, beta, mean, var, eps), r_norm(a.C, r_gamma, r_beta, r_mean, r_var, r_eps);
    a.y = data_out<T>(y);
    a.mask = data_out<uint8_t>(mask);
    a.activation = kind;
    a.shortcut = r_var ? Shortcut::norm : residual ? Shortcut::tensor : Shortcut::none;
    a.norm = norm.view();
    a.r_norm = r_norm.view();
    by_rows(a.rows, a.C,
            [&](int64_t first, int64_t last, uint8_t* flags) { loops<T>().bn_act(a, first, last, flags); });
  });
  return {y, mask};
}

// Adds up strips of rows whose bounds depend on the sizes alone, so that every run gives the same bits.
template <class T>
void sum_strips(const BnAct<T>& a, int64_t count, const std::array<const Accumulator<T>*, 3>& factors,
                Accumulator<T>* out) {
  const int64_t octets = ceil_div<int64_t>(a.rows, kOctet);
  const int64_t worth = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kOctet * a.C));
  const int64_t step = std::max(worth, ceil_div(octets, kStrips));
  const int64_t strips = ceil_div(octets, step), width = count * a.C;
  std::vector<double> parts(strips * width, 0.0);
  torch::stable::parallel_for(0, strips, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<uint8_t[]> flags(new uint8_t[kOctet * a.C + 8]);
    std::vector<Accumulator<T>> part(width);
    for (int64_t i = first; i < last; ++i) {
      loops<T>().bn_act_sums(a, i * step * kOctet, std::min((i + 1) * step * kOctet, a.rows), flags.get(), part.data(),
                             parts.data() + i * width);
    }
  });
  for (int64_t i = 0; i < width; ++i) {
    double total = 0;
    for (int64_t strip = 0; strip < strips; ++strip) total += parts[strip * width + i];
    const Accumulator<T>* factor = factors[i / a.C];
    out[i] = static_cast<Accumulator<T>>(factor == nullptr ? total : total * factor[i % a.C]);
  }
}

Tensor bn_act_sums(const Tensor& dy, const Maybe& mask, const Tensor& x, const Tensor& mean, const Tensor& var,
                   double eps, const Maybe& residual, const Maybe& r_mean, const Maybe& r_var, double r_eps) {
  check_backward(x, dy, mask, residual, r_mean, r_var);
  check_norm(x, x.size(1), std::nullopt, std::nullopt, mean, var);
  check_norm(x, x.size(1), std::nullopt, std::nullopt, r_mean, r_var);
  const int64_t count = r_var.has_value() ? 3 : 2;
  Tensor sums = make({count, x.size(1)}, accumulator_type(x), x);
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    BnAct<T> a = problem_of<T>(x, residual);
    const NormVectors<A> norm(a.C, {}, {}, mean, var, eps), r_norm(a.C, {}, {}, r_mean, r_var, r_eps);
    a.dy = data<T>(dy);
    a.given_mask = data<uint8_t>(mask);
    a.shortcut = r_var ? Shortcut::norm : Shortcut::none;
    a.norm = norm.view();
    a.r_norm = r_norm.view();
    sum_strips<T>(a, count, {nullptr, norm.inverse.data(), r_norm.inverse.data()}, data_out<A>(sums));
  });
  return sums;
}

std::tuple<Tensor, Tensor> bn_act_grad(const Tensor& dy, const Maybe& mask, const Tensor& x, const Maybe& gamma,
                                       const Tensor& mean, const Tensor& var, double eps, const Tensor& means,
                                       bool shortcut, const Maybe& residual, const Maybe& r_gamma, const Maybe& r_mean,
                                       const Maybe& r_var, double r_eps, const Maybe& r_means) {
  check_backward(x, dy, mask, residual, r_mean, r_var);
  check_means(x, means, shortcut, r_var, r_means);
  check_norm(x, x.size(1), gamma, std::nullopt, mean, var);
  check_norm(x, x.size(1), r_gamma, std::nullopt, r_mean, r_var);
  Tensor dx = image_like(x);
  Tensor dr = shortcut ? image_like(x) : make({0}, x.scalar_type(), x);
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    BnAct<T> a = problem_of<T>(x, residual);
    NormVectors<A> norm(a.C, gamma, {}, mean, var, eps), r_norm(a.C, r_gamma, {}, r_mean, r_var, r_eps);
    norm.through(means, a.C);
    r_norm.through(r_means, a.C);
    a.dy = data<T>(dy);
    a.given_mask = data<uint8_t>(mask);
    a.dx = data_out<T>(dx);
    a.dr = data_out<T>(dr);
    a.shortcut = r_var ? Shortcut::norm : shortcut ? Shortcut::tensor : Shortcut::none;
    a.grad = norm.grad_view();
    a.r_grad = r_norm.grad_view();
    by_rows(a.rows, a.C,
            [&](int64_t first, int64_t last, uint8_t* flags) { loops<T>().bn_act_grad(a, first, last, flags); });
  });
  return {dx, dr};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("_bn_act", TORCH_BOX(&fused_resnet::bn_act));
  m.impl("_bn_act_sums", TORCH_BOX(&fused_resnet::bn_act_sums));
  m.impl("_bn_act_grad", TORCH_BOX(&fused_resnet::bn_act_grad));
}
