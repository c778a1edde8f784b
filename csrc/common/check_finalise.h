// What _bn_finalise asks of its tensors, for the CPU and for CUDA.
#pragma once

#include "common/checks.h"

namespace fused_resnet {

inline void check_finalise(const Tensor& means, const Tensor& squares, int64_t count, int64_t span, const Maybe& pivot,
                           const Maybe& running_mean, const Maybe& running_var, const Maybe& batches,
                           std::optional<double> momentum) {
  const ScalarType dtype = means.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "means must be fp32 or fp64");
  STD_TORCH_CHECK(means.dim() == 2 && squares.dim() == 2 && squares.size(0) == means.size(0) &&
                      squares.size(1) == means.size(1) && means.is_contiguous() && squares.is_contiguous() &&
                      same_device(squares, means) && squares.scalar_type() == dtype,
                  "means and squares must be dense, [tiles, K], of one dtype and device");
  STD_TORCH_CHECK(count > 0 && span > 0 && (count - 1) / span + 1 == means.size(0), "count = ", count,
                  " and span = ", span, " do not make ", means.size(0), " tiles");
  const char* names[] = {"pivot", "running_mean", "running_var"};
  const Maybe* vectors[] = {&pivot, &running_mean, &running_var};
  for (int i = 0; i < 3; ++i) {
    check_vector(*vectors[i], means.size(1), means, names[i]);
    STD_TORCH_CHECK(!vectors[i]->has_value() || (*vectors[i])->scalar_type() == dtype, names[i],
                    " must have the dtype of means");
  }
  check_vector(batches, 1, means, "num_batches_tracked");
  STD_TORCH_CHECK(!batches.has_value() || batches->scalar_type() == ScalarType::Long,
                  "num_batches_tracked must be int64");
  STD_TORCH_CHECK(!momentum.has_value() || (*momentum >= 0 && *momentum <= 1), "momentum = ", momentum.value_or(0),
                  " is not between 0 and 1");
  STD_TORCH_CHECK(momentum.has_value() || batches.has_value() || !(running_mean.has_value() || running_var.has_value()),
                  "momentum None needs num_batches_tracked");
}

// Calls `f` with a value of the element type of `x`, fp32 or fp64.
template <class F>
void by_wide_dtype(const Tensor& x, const F& f) {
  x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace fused_resnet
