// Whether values are finite, found by all threads.
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu/pick.h"

namespace fused_resnet {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// Whether f(first, last) is true of every part of `count` elements.
template <class F>
bool all_of(int64_t count, int64_t grain, const F& f) {
  std::atomic<bool> all{true};
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, grain), [&](int64_t first, int64_t last) {
    if (!f(first, last)) all.store(false, std::memory_order_relaxed);
  });
  return all.load(std::memory_order_relaxed);
}

template <class T>
bool is_finite(const Tensor& t) {
  const T* from = data<T>(t);
  return all_of(t.numel(), kGrain,
                [&](int64_t first, int64_t last) { return loops<T>().finite(from + first, last - first); });
}

}  // namespace
}  // namespace fused_resnet
