// The raw operator _bn_finalise: mean, variance and 1 / std of a batch from the moments of tiles, and the running
// statistics. Sums are kept in fp64 and joined in an order that the sizes fix: no atomics, the same bits every time.
// A block takes 32 channels, the tiles of a strip are dealt out to its rows of threads; where there are many tiles, a
// first launch joins strips of them.
#pragma once

#include "common/finalise.h"
#include "common/index.h"
#include "cuda/device.h"

namespace fused_resnet {

constexpr int kJoinThreads = 256, kJoinColumns = 32, kJoinRows = kJoinThreads / kJoinColumns;
constexpr int64_t kJoinAtOnce = 512;  // tiles that a block joins, 64 a thread

// A is fp32 or fp64; what is absent is null.
template <class A>
struct FinaliseArgs {
  const A *means, *squares, *pivot;  // [tiles, K] each; means count from the pivot
  int64_t tiles, span, count;
  int32_t K;
  double* parts;  // [3, strips, K]: count, mean, square
  int64_t strips;
  A *mean, *var, *inverse_std, *running_mean, *running_var;
  const int64_t* batches;
  double momentum, eps;
};

template <class A>
FR_DEVICE Moments tile_moments(const FinaliseArgs<A>& a, int64_t t, int32_t k) {
  const int64_t at = t * a.K + k;
  return {static_cast<double>(tile_elements(a.count, a.span, t)), a.means[at], a.squares[at]};
}

template <class A>
FR_DEVICE Moments strip_moments(const FinaliseArgs<A>& a, int64_t strip, int32_t k) {
  const int64_t at = strip * a.K + k, size = a.strips * a.K;
  return {a.parts[at], a.parts[size + at], a.parts[2 * size + at]};
}

// The threads of a column join what they have, in the threads of the first row. Shared memory: kJoinThreads Moments.
FR_DEVICE Moments join_column(const Moments& mine) {
  auto* const room = reinterpret_cast<Moments*>(shared_memory());
  room[thread_index()] = mine;
  for (int half = kJoinThreads / 2; half >= kJoinColumns; half /= 2) {
    sync_block();
    if (thread_index() < half) room[thread_index()] = join(room[thread_index()], room[thread_index() + half]);
  }
  return room[thread_index()];
}

// Everything that is made of a channel's moments.
template <class A>
FR_DEVICE void store_statistics(const FinaliseArgs<A>& a, Moments m, int32_t k) {
  if (a.pivot != nullptr) m.mean += a.pivot[k];
  const double var = m.square / m.count;
  a.mean[k] = static_cast<A>(m.mean);
  a.var[k] = static_cast<A>(var);
  a.inverse_std[k] = static_cast<A>(inverse_root(var + a.eps));
  const double weight = batch_weight(a.momentum, a.batches == nullptr ? 1 : *a.batches);
  if (a.running_mean != nullptr) a.running_mean[k] = running_mean_of(a.running_mean[k], m, weight);
  if (a.running_var != nullptr) a.running_var[k] = running_var_of(a.running_var[k], m, weight);
}

// parts of strips of kJoinAtOnce tiles.
template <class A>
FR_KERNEL(kJoinThreads)
join_tiles(const FinaliseArgs<A> a) {
  const int32_t columns = ceil_div(a.K, kJoinColumns), row = thread_index() / kJoinColumns;
  const auto block = static_cast<int32_t>(block_index());
  const int64_t strip = block / columns, first = strip * kJoinAtOnce;
  const int64_t last = first + kJoinAtOnce < a.tiles ? first + kJoinAtOnce : a.tiles;
  const int32_t k = block % columns * kJoinColumns + thread_index() % kJoinColumns;
  Moments mine{0, 0, 0};
  for (int64_t t = first + row; k < a.K && t < last; t += kJoinRows) mine = join(mine, tile_moments(a, t, k));
  mine = join_column(mine);
  if (row != 0 || k >= a.K) return;
  const int64_t at = strip * a.K + k, size = a.strips * a.K;
  a.parts[at] = mine.count;
  a.parts[size + at] = mine.mean;
  a.parts[2 * size + at] = mine.square;
}

// STRIPS: of what join_tiles has left, else of the tiles themselves.
template <class A, bool STRIPS>
FR_KERNEL(kJoinThreads)
finalise_statistics(const FinaliseArgs<A> a) {
  const int32_t k = static_cast<int32_t>(block_index()) * kJoinColumns + thread_index() % kJoinColumns;
  const int32_t row = thread_index() / kJoinColumns;
  Moments mine{0, 0, 0};
  for (int64_t t = row; k < a.K && t < (STRIPS ? a.strips : a.tiles); t += kJoinRows)
    mine = join(mine, STRIPS ? strip_moments(a, t, k) : tile_moments(a, t, k));
  mine = join_column(mine);
  if (row == 0 && k < a.K) store_statistics(a, mine, k);
}

// Strips that a first launch joins; 0 where one launch does it all.
FR_HD int64_t join_strips(int64_t tiles) {
  return tiles <= kJoinAtOnce ? 0 : ceil_div(tiles, kJoinAtOnce);
}

// a.parts has room for 3 * join_strips(tiles) * K.
template <class A, class Launch>
void launch_finalise(FinaliseArgs<A> a, const Launch& launch) {
  const int64_t columns = ceil_div(a.K, kJoinColumns);
  const size_t bytes = kJoinThreads * sizeof(Moments);
  a.strips = join_strips(a.tiles);
  if (a.strips == 0) return launch(finalise_statistics<A, false>, columns, kJoinThreads, bytes, a);
  launch(join_tiles<A>, a.strips * columns, kJoinThreads, bytes, a);
  launch(finalise_statistics<A, true>, columns, kJoinThreads, bytes, a);
}

}  // namespace fused_resnet
