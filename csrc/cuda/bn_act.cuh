// Families bn_act, bn_act_sums, bn_act_grad, whose contracts stand in fused_resnet/ops/bn_act.py.
//
// Forward and gradient go through memory in octets: a thread takes 8 elements, which are one byte of the mask, in
// 16-byte vectors. Grids are sized so that, where C is a multiple of 8, a thread stays with its 8 channels; it loads
// their vectors once. The sums take two launches and no atomics: strips of rows, then the strips in a fixed order.
#pragma once

#include "common/index.h"
#include "cuda/norm.cuh"

namespace fused_resnet {

constexpr int kNormThreads = 256;

// What a launch does not need is null. var of r_norm says whether the shortcut has a norm.
template <class T>
struct BnActArgs {
  const T *x, *residual, *dy;
  const uint8_t* given_mask;
  uint8_t* mask;
  T *y, *dx, *dr;
  NormArgs<Accumulator<T>> norm, r_norm;
  Accumulator<T>*parts, *sums;
  int64_t elements, rows, strip_rows, strips;
  int32_t C, columns;  // columns: threads of a block side by side
  Activation activation;
  bool aligned;  // every image starts at a multiple of 16 bytes
};

template <class A>
struct ChannelGrad {
  A mean, scale, s0, slope;
};

template <class A>
FR_DEVICE ChannelGrad<A> channel_grad(const NormArgs<A>& n, int32_t c, int32_t C) {
  const A inverse = inverse_std(n, c);
  return {n.mean[c], (n.gamma == nullptr ? A(1) : n.gamma[c]) * inverse, n.means[c], n.means[C + c] * inverse};
}

template <class A>
FR_DEVICE A through_norm(A dz, A u, const ChannelGrad<A>& g) {
  return (dz - g.s0 - (u - g.mean) * g.slope) * g.scale;
}

FR_DEVICE int64_t first_octet() {
  return block_index() * block_threads() + thread_index();
}
FR_DEVICE int64_t octet_step() {
  return grid_blocks() * block_threads();
}
FR_DEVICE int32_t first_channel(int32_t C) {
  return octet_channel(block_index(), thread_index(), kNormThreads, C);
}
// How far the channel moves with a step.
FR_DEVICE int32_t channel_step(int32_t C) {
  return octet_channel(grid_blocks(), 0, kNormThreads, C);
}

// dz of an octet: dy where the mask is set.
template <class T>
FR_DEVICE void load_dz(const BnActArgs<T>& a, int64_t octet, Accumulator<T> (&dz)[kOctet]) {
  load_elements<kOctet>(a.dy, octet * kOctet, a.elements, a.aligned, dz);
  if (a.given_mask == nullptr) return;
  const int bits = a.given_mask[octet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) dz[i] = bits >> i & 1 ? dz[i] : Accumulator<T>(0);
}

// y and mask. WHOLE: C is a multiple of 8. SHORTCUT: 0 none, 1 a tensor, 2 a tensor with a norm.
template <class T, bool WHOLE, int SHORTCUT>
FR_KERNEL(kNormThreads)
bn_act_forward(const BnActArgs<T> a) {
  using A = Accumulator<T>;
  ChannelNorm<A> norm[kOctet], r_norm[kOctet];
  if (WHOLE) {
    const int32_t first = first_channel(a.C);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const int32_t c = first + i;
      norm[i] = channel_norm(a.norm, c);
      if (SHORTCUT == 2) r_norm[i] = channel_norm(a.r_norm, c);
    }
  }
  int32_t next = WHOLE ? 0 : first_channel(a.C);
  const int32_t step = WHOLE ? 0 : channel_step(a.C);
  for (int64_t octet = first_octet(); octet * kOctet < a.elements; octet += octet_step()) {
    const int64_t at = octet * kOctet;
    A z[kOctet], residual[kOctet];
    load_elements<kOctet>(a.x, at, a.elements, a.aligned, z);
    if (SHORTCUT) load_elements<kOctet>(a.residual, at, a.elements, a.aligned, residual);
    int bits = 0;
    int32_t c = next;
    if (!WHOLE) next = next + step >= a.C ? next + step - a.C : next + step;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (!WHOLE) {
        norm[i] = channel_norm(a.norm, c);
        if (SHORTCUT == 2) r_norm[i] = channel_norm(a.r_norm, c);
        c = c + 1 == a.C ? 0 : c + 1;
      }
      z[i] = normalised(z[i], norm[i]);
      if (SHORTCUT == 1) z[i] += residual[i];
      if (SHORTCUT == 2) z[i] += normalised(residual[i], r_norm[i]);
      bits |= (passes(z[i], a.activation) && at + i < a.elements) << i;
      z[i] = activate(z[i], a.activation);
    }
    store_elements<kOctet>(a.y, at, a.elements, a.aligned, z);
    if (a.mask != nullptr) a.mask[octet] = static_cast<uint8_t>(bits);
  }
}

// dx and, with a shortcut, dr.
template <class T, bool WHOLE, int SHORTCUT>
FR_KERNEL(kNormThreads)
bn_act_gradient(const BnActArgs<T> a) {
  using A = Accumulator<T>;
  ChannelGrad<A> norm[kOctet], r_norm[kOctet];
  if (WHOLE) {
    const int32_t first = first_channel(a.C);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const int32_t c = first + i;
      norm[i] = channel_grad(a.norm, c, a.C);
      if (SHORTCUT == 2) r_norm[i] = channel_grad(a.r_norm, c, a.C);
    }
  }
  int32_t next = WHOLE ? 0 : first_channel(a.C);
  const int32_t step = WHOLE ? 0 : channel_step(a.C);
  for (int64_t octet = first_octet(); octet * kOctet < a.elements; octet += octet_step()) {
    const int64_t at = octet * kOctet;
    A dz[kOctet], x[kOctet], residual[kOctet];
    load_dz(a, octet, dz);
    load_elements<kOctet>(a.x, at, a.elements, a.aligned, x);
    if (SHORTCUT == 2) load_elements<kOctet>(a.residual, at, a.elements, a.aligned, residual);
    int32_t c = next;
    if (!WHOLE) next = next + step >= a.C ? next + step - a.C : next + step;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (!WHOLE) {
        norm[i] = channel_grad(a.norm, c, a.C);
        if (SHORTCUT == 2) r_norm[i] = channel_grad(a.r_norm, c, a.C);
        c = c + 1 == a.C ? 0 : c + 1;
      }
      x[i] = through_norm(dz[i], x[i], norm[i]);
      if (SHORTCUT == 2) dz[i] = through_norm(dz[i], residual[i], r_norm[i]);
    }
    store_elements<kOctet>(a.dx, at, a.elements, a.aligned, x);
    if (SHORTCUT) store_elements<kOctet>(a.dr, at, a.elements, a.aligned, dz);
  }
}

// The sum of `value` over the threads of a column, in the threads of its first row.
template <class A>
FR_DEVICE A sum_column(A value, int columns, A* room) {
  room[thread_index()] = value;
  for (int half = block_threads() / columns / 2; half > 0; half /= 2) {
    sync_block();
    if (thread_index() < half * columns) room[thread_index()] += room[thread_index() + half * columns];
  }
  const A total = room[thread_index()];
  sync_block();
  return total;
}

// parts [strips, 2 or 3, C]: dz, dz * (x - mean), dz * (residual - mean). A thread takes V channels, `columns` threads
// stand side by side, the others take the next rows. Shared memory: block_threads() elements of A.
template <class T, int V, bool NORM>
FR_KERNEL(kNormThreads)
bn_act_sum_strips(const BnActArgs<T> a) {
  using A = Accumulator<T>;
  constexpr int kSums = NORM ? 3 : 2;
  const int32_t tiles = ceil_div(a.C, a.columns * V), block = static_cast<int32_t>(block_index());
  const int64_t strip = block / tiles;
  const int32_t first = (block % tiles * a.columns + thread_index() % a.columns) * V;
  const bool live = first < a.C;
  const int64_t last = (strip + 1) * a.strip_rows < a.rows ? (strip + 1) * a.strip_rows : a.rows;
  A sums[kSums][V] = {}, mean[V], r_mean[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    mean[i] = live ? a.norm.mean[first + i] : A(0);
    r_mean[i] = NORM && live ? a.r_norm.mean[first + i] : A(0);
  }
  const int rows = block_threads() / a.columns;
  for (int64_t m = strip * a.strip_rows + thread_index() / a.columns; live && m < last; m += rows) {
    const int64_t at = m * a.C + first;
    A dz[V], x[V], residual[V];
    load_elements<V>(a.dy, at, a.elements, a.aligned, dz);
    load_elements<V>(a.x, at, a.elements, a.aligned, x);
    if (NORM) load_elements<V>(a.residual, at, a.elements, a.aligned, residual);
    const int bits = a.given_mask == nullptr ? 0xff : a.given_mask[at >> 3] >> (at & 7);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dz[i] = bits >> i & 1 ? dz[i] : A(0);
      sums[0][i] += dz[i];
      sums[1][i] += dz[i] * (x[i] - mean[i]);
      if constexpr (NORM) sums[2][i] += dz[i] * (residual[i] - r_mean[i]);
    }
  }
  A* room = reinterpret_cast<A*>(shared_memory());
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A total = sum_column(sums[sum][i], a.columns, room);
      if (live && thread_index() < a.columns) a.parts[(strip * kSums + sum) * a.C + first + i] = total;
    }
  }
}

// sums [2 or 3, C] from parts: `columns` threads side by side, the others take the next strips; in fp64. Shared memory:
// block_threads() doubles.
template <class T>
FR_KERNEL(kNormThreads)
bn_act_add_strips(const BnActArgs<T> a) {
  const int sums = a.r_norm.var == nullptr ? 2 : 3;
  const int64_t width = int64_t{sums} * a.C, i = block_index() * a.columns + thread_index() % a.columns;
  double total = 0;
  for (int64_t strip = thread_index() / a.columns; i < width && strip < a.strips;
       strip += block_threads() / a.columns) {
    total += a.parts[strip * width + i];
  }
  total = sum_column(total, a.columns, reinterpret_cast<double*>(shared_memory()));
  if (i >= width || thread_index() >= a.columns) return;
  const int32_t sum = static_cast<int32_t>(i) / a.C, c = static_cast<int32_t>(i) % a.C;
  if (sum > 0) total *= inverse_std(sum == 1 ? a.norm : a.r_norm, c);
  a.sums[i] = static_cast<Accumulator<T>>(total);
}

// The launches: `launch(kernel, blocks, threads, bytes of shared memory, args)` is that of the GPU or of the emulation.

FR_HD int64_t greatest_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// Blocks for a walk over octets: about `limit`, but so many that a thread stays with its channels.
FR_HD int64_t octet_blocks(int64_t elements, int32_t C, int64_t limit) {
  const int64_t all = ceil_div(mask_bytes(elements), int64_t{kNormThreads});
  const int64_t unit = C / greatest_divisor(C, int64_t{kOctet} * kNormThreads);
  const int64_t some = ceil_div(limit, unit) * unit;
  return all < some ? all : some;
}

template <class T, class Launch>
void launch_forward(const BnActArgs<T>& a, int64_t limit, const Launch& launch) {
  const int64_t blocks = octet_blocks(a.elements, a.C, limit);
  const int shortcut = a.r_norm.var != nullptr ? 2 : a.residual != nullptr ? 1 : 0;
  auto go = [&](auto kernel) { launch(kernel, blocks, kNormThreads, 0, a); };
  if (a.C % kOctet == 0) {
    shortcut == 0   ? go(bn_act_forward<T, true, 0>)
    : shortcut == 1 ? go(bn_act_forward<T, true, 1>)
                    : go(bn_act_forward<T, true, 2>);
  } else {
    shortcut == 0   ? go(bn_act_forward<T, false, 0>)
    : shortcut == 1 ? go(bn_act_forward<T, false, 1>)
                    : go(bn_act_forward<T, false, 2>);
  }
}

template <class T, class Launch>
void launch_gradient(const BnActArgs<T>& a, int64_t limit, const Launch& launch) {
  const int64_t blocks = octet_blocks(a.elements, a.C, limit);
  const int shortcut = a.r_norm.var != nullptr ? 2 : a.dr != nullptr ? 1 : 0;
  auto go = [&](auto kernel) { launch(kernel, blocks, kNormThreads, 0, a); };
  if (a.C % kOctet == 0) {
    shortcut == 0   ? go(bn_act_gradient<T, true, 0>)
    : shortcut == 1 ? go(bn_act_gradient<T, true, 1>)
                    : go(bn_act_gradient<T, true, 2>);
  } else {
    shortcut == 0   ? go(bn_act_gradient<T, false, 0>)
    : shortcut == 1 ? go(bn_act_gradient<T, false, 1>)
                    : go(bn_act_gradient<T, false, 2>);
  }
}

// How the sums are cut up: depends on the sizes alone, so that every run gives the same bits.
struct SumPlan {
  int32_t vector, columns;
  int64_t strip_rows, strips, tiles;
};

FR_HD SumPlan sum_plan(int64_t rows, int32_t C) {
  SumPlan plan{C % kOctet == 0 ? kOctet : 1, 1, 0, 0, 0};
  while (plan.columns < 32 && plan.columns * plan.vector < C) plan.columns *= 2;
  plan.tiles = ceil_div<int64_t>(C, plan.columns * plan.vector);
  // A thread adds up 64 rows in one chain.
  plan.strip_rows = int64_t{64} * (kNormThreads / plan.columns);
  plan.strips = ceil_div(rows, plan.strip_rows);
  return plan;
}

// a.parts has room for strips * (2 or 3) * C.
template <class T, class Launch>
void launch_sums(BnActArgs<T> a, const Launch& launch) {
  const SumPlan plan = sum_plan(a.rows, a.C);
  const bool norm = a.r_norm.var != nullptr;
  a.columns = plan.columns;
  a.strip_rows = plan.strip_rows;
  a.strips = plan.strips;
  auto go = [&](auto kernel) {
    launch(kernel, plan.strips * plan.tiles, kNormThreads, kNormThreads * sizeof(Accumulator<T>), a);
  };
  if (plan.vector == kOctet) {
    norm ? go(bn_act_sum_strips<T, kOctet, true>) : go(bn_act_sum_strips<T, kOctet, false>);
  } else {
    norm ? go(bn_act_sum_strips<T, 1, true>) : go(bn_act_sum_strips<T, 1, false>);
  }
  a.columns = 32;
  launch(bn_act_add_strips<T>, ceil_div<int64_t>((norm ? 3 : 2) * int64_t{a.C}, a.columns), kNormThreads,
         kNormThreads * sizeof(double), a);
}

}  // namespace fused_resnet
