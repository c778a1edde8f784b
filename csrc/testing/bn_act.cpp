// The kernels of bn_act* on the emulation.
#include "cuda/bn_act.cuh"

#include "testing/kernels.h"

namespace fused_resnet {
namespace {

template <class T>
void run(const std::string& kernel, const Addresses& a, int64_t rows, int32_t C, int activation, double eps,
         double r_eps, bool aligned, int64_t limit, unsigned seed) {
  using A = Accumulator<T>;
  BnActArgs<T> args{};
  args.x = at<const T>(a, "x");
  args.residual = at<const T>(a, "residual");
  args.dy = at<const T>(a, "dy");
  args.given_mask = at<const uint8_t>(a, "given_mask");
  args.mask = at<uint8_t>(a, "mask");
  args.y = at<T>(a, "y");
  args.dx = at<T>(a, "dx");
  args.dr = at<T>(a, "dr");
  args.norm = norm_args<A>(a, "", eps);
  args.r_norm = norm_args<A>(a, "r_", r_eps);
  args.sums = at<A>(a, "sums");
  args.rows = rows;
  args.C = C;
  args.elements = rows * C;
  args.activation = static_cast<Activation>(activation);
  args.aligned = aligned;
  if (kernel == "forward") return launch_forward(args, limit, Emulated{seed});
  if (kernel == "gradient") return launch_gradient(args, limit, Emulated{seed});
  std::vector<A> parts(sum_plan(rows, C).strips * 3 * C);
  args.parts = parts.data();
  launch_sums(args, Emulated{seed});
}

}  // namespace

void emulate_bn_act(const std::string& kernel, const std::string& dtype, const Addresses& addresses, int64_t rows,
                    int32_t C, int activation, double eps, double r_eps, bool aligned, int64_t limit, unsigned seed) {
  by_name(dtype, [&](auto element) {
    run<decltype(element)>(kernel, addresses, rows, C, activation, eps, r_eps, aligned, limit, seed);
  });
}

}  // namespace fused_resnet
