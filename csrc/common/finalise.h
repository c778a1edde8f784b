// Joining the moments of tiles (Chan, Golub and LeVeque 1983) to a batch's mean and variance, for the CPU and for CUDA.
#pragma once

#include "common/elements.h"

namespace fused_resnet {

// Elements of tile t: `span`, the last tile has what is left of `count`.
FR_HD int64_t tile_elements(int64_t count, int64_t span, int64_t t) {
  return count - t * span < span ? count - t * span : span;
}

// Of a channel: number of elements, mean, and sum of squared differences from it.
struct Moments {
  double count, mean, square;
};

FR_HD Moments join(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0) return a;
  const double apart = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + apart * share, a.square + b.square + apart * apart * a.count * share};
}

// Weight of the batch in the running statistics: `momentum`, or where it is negative 1 / the number of batches so far.
FR_HD double batch_weight(double momentum, int64_t batches) {
  return momentum < 0 ? 1.0 / static_cast<double>(batches) : momentum;
}

// PyTorch's running statistics: (1 - weight) * old + weight * new, the variance with count - 1.
template <class A>
FR_HD A running_mean_of(A old, const Moments& m, double weight) {
  return static_cast<A>((1 - weight) * old + weight * m.mean);
}
template <class A>
FR_HD A running_var_of(A old, const Moments& m, double weight) {
  return static_cast<A>((1 - weight) * old + weight * (m.square / (m.count - 1)));
}

}  // namespace fused_resnet
