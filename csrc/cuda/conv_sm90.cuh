// Family conv_bn_act for sm_90a, bf16 and fp16: y = act(norm(conv(x, w) + bias) + residual).
//
// The implicit matrix product of conv.cuh, made by specialised warps. The first warpgroup starts copies and no more:
// patches by TMA in im2col mode, which finds the pixels of a tap and fills zeros outside of the image, weights by TMA
// to all blocks of a cluster, residuals by TMA. Two more multiply with wgmma from shared memory, in fp32, and finish
// their part of a tile: residual, norm, activation, one rounding, TMA store. Blocks stay: each takes tile after tile,
// and copies for the next tiles go on while one is finished.
//
// Barriers: a stage is `full` when its bytes have landed and `empty` when all warps that read it, in every block of the
// cluster, have arrived; a group's residual is `loaded` and `stored` likewise. Stages go round over all tiles, so that
// use i is of stage i % stages and phase i / stages. A wait tells a phase from the next alone, not from the one after
// it: a group whose `turn` it is not may not wait for its stages yet, which are several phases ahead.
#pragma once

#include <algorithm>
#include <utility>

#include "cuda/hopper.h"
#include "cuda/norm.cuh"

namespace fused_resnet {

struct Sm90Maps {
  TensorMap patches, weights, residual, y;
};

struct Sm90Args {
  Sm90Maps maps;
  ConvShape shape;
  Sm90Work work;
  const float* bias;  // [K]; null where absent, as the norm's
  NormArgs<float> norm;
  Activation activation;
  bool residual;
};

// Where a tile's parts lie in this block's shared memory.
template <int TILE>
struct Sm90Shared {
  static constexpr Sm90Plan kPlan = sm90_plan(kConvTiles[TILE]);
  char* base;

  FR_MEMBER Sm90Shared()
      : base(block_memory() + (kSwizzleBytes - shared_address(block_memory()) % kSwizzleBytes) % kSwizzleBytes) {}
  FR_MEMBER char* patches(int stage) const { return base + stage * kPlan.patch_bytes(); }
  FR_MEMBER char* weights(int stage) const { return base + kPlan.weights_at() + stage * kPlan.weight_bytes(); }
  FR_MEMBER char* output(int group) const { return base + kPlan.outputs_at() + group * kPlan.output_bytes(); }
  FR_MEMBER float* vectors(int group) const {
    return reinterpret_cast<float*>(base + kPlan.vectors_at() + group * kPlan.vector_bytes());
  }
  FR_MEMBER Barrier* full(int stage) const { return reinterpret_cast<Barrier*>(base + kPlan.barriers_at()) + stage; }
  FR_MEMBER Barrier* empty(int stage) const { return full(kPlan.stages) + stage; }
  FR_MEMBER Barrier* loaded(int group) const { return full(2 * kPlan.stages) + group; }
  FR_MEMBER Barrier* stored(int group) const { return loaded(kGroups) + group; }
  FR_MEMBER Barrier* turn(int group) const { return stored(kGroups) + group; }
};

// The tiles of this block, one after the other.
template <int TILE>
struct Sm90Tiles {
  static constexpr Sm90Plan kPlan = sm90_plan(kConvTiles[TILE]);
  const Sm90Work& work;
  int32_t at, stride, rank, count = 0;

  FR_MEMBER explicit Sm90Tiles(const Sm90Work& w)
      : work(w),
        at(cluster_index<kPlan.cluster>()),
        stride(grid_clusters<kPlan.cluster>()),
        rank(kPlan.cluster == 1 ? 0 : cluster_rank()) {}
  FR_MEMBER bool left() const { return at < work.tiles; }
  FR_MEMBER void next() {
    at += stride;
    ++count;
  }
  FR_MEMBER int32_t first_pixel() const { return (at / work.filter_tiles * kPlan.cluster + rank) * kPlan.pixels; }
  FR_MEMBER int32_t first_filter() const { return at % work.filter_tiles * kPlan.filters; }
  // Whether a group works on this tile, as its how manieth, and at which pixel its part begins.
  FR_MEMBER bool is_of(int group) const { return kPlan.shared_tile || count % kGroups == group; }
  FR_MEMBER int32_t round() const { return kPlan.shared_tile ? count : count / kGroups; }
  FR_MEMBER int32_t first_pixel(int group) const {
    return first_pixel() + (kPlan.shared_tile ? group * kGroupPixels : 0);
  }
};

// One thread fills stage after stage.
template <int TILE>
FR_DEVICE void fill_stages(const Sm90Args& a, const Sm90Shared<TILE>& shared) {
  constexpr Sm90Plan kPlan = Sm90Shared<TILE>::kPlan;
  constexpr int kPart = kPlan.filters / kPlan.cluster;  // of the weights, which this block copies to all
  const ConvShape& s = a.shape;
  uint32_t use = 0;
  for (Sm90Tiles<TILE> tile(a.work); tile.left(); tile.next()) {
    const Pixel pixel = near_pixel_of(tile.first_pixel(), s.P, s.Q);
    const int32_t h = tap(pixel.p, 0, s.stride_h, s.pad_h, 1), w = tap(pixel.q, 0, s.stride_w, s.pad_w, 1);
    const int32_t filter = tile.first_filter() + tile.rank * kPart;
    for (int32_t cell = 0; cell < s.R * s.S; ++cell) {
      const int32_t down = cell / s.S * s.dilation_h, right = cell % s.S * s.dilation_w;
      for (int32_t c = 0; c < s.C; c += kRowElements, ++use) {
        const int stage = use % kPlan.stages;
        barrier_wait(shared.empty(stage), (use / kPlan.stages & 1) ^ 1);
        barrier_expect(shared.full(stage), kPlan.stage_bytes());
        load_patches(shared.patches(stage), a.maps.patches, shared.full(stage), c, w, h, pixel.n, right, down);
        load_weights<kPlan.cluster>(shared.weights(stage) + tile.rank * kPart * kRowBytes, a.maps.weights,
                                    shared.full(stage), c, cell, filter);
      }
    }
  }
}

// Another thread fetches each group's part of the residual as soon as the group's last y has left its place.
template <int TILE>
FR_DEVICE void fetch_residuals(const Sm90Args& a, const Sm90Shared<TILE>& shared) {
  constexpr Sm90Plan kPlan = Sm90Shared<TILE>::kPlan;
  for (Sm90Tiles<TILE> tile(a.work); tile.left(); tile.next()) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (!tile.is_of(group)) continue;
      barrier_wait(shared.stored(group), (tile.round() & 1) ^ 1);
      barrier_expect(shared.loaded(group), kPlan.output_bytes());
#pragma unroll
      for (int panel = 0; panel < kPlan.panels(); ++panel) {
        load_panel(shared.output(group) + panel * kPlan.panel_bytes(), a.maps.residual, shared.loaded(group),
                   tile.first_filter() + panel * kRowElements, tile.first_pixel(group));
      }
    }
  }
}

// One filter's vectors: read before the products and used after them, so that nothing waits for memory.
struct Sm90Filter {
  float bias, gamma, beta, mean, var;
};

FR_DEVICE Sm90Filter read_filter(const Sm90Args& a, int32_t k) {
  const NormArgs<float>& n = a.norm;
  const bool live = k < a.shape.K;
  auto at = [&](const float* vector, float absent) { return live && vector != nullptr ? vector[k] : absent; };
  return {at(a.bias, 0.f), at(n.gamma, 1.f), at(n.beta, 0.f), at(n.mean, 0.f), at(n.var, 1.f)};
}

// The norm with the bias in its mean, as rows of [3, filters].
FR_DEVICE void keep_norm(const Sm90Args& a, const Sm90Filter& f, float* vectors, int filter, int filters) {
  ChannelNorm<float> norm{0.f, 1.f, 0.f};
  if (a.norm.var != nullptr)
    norm = channel_norm(NormArgs<float>{&f.gamma, &f.beta, &f.mean, &f.var, nullptr, a.norm.eps}, 0);
  vectors[filter] = norm.mean - f.bias;
  vectors[filters + filter] = norm.scale;
  vectors[2 * filters + filter] = norm.shift;
}

// Two neighbours of 16 bits in a word.
template <class T>
FR_DEVICE void unpack(uint32_t word, float (&out)[2]) {
  T pair[2];
  memcpy(pair, &word, sizeof pair);
  out[0] = widen(pair[0]);
  out[1] = widen(pair[1]);
}
template <class T>
FR_DEVICE uint32_t pack(float low, float high) {
  T pair[2];
  round_to(pair[0], low);
  round_to(pair[1], high);
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
}

// One branch for all, instead of one for each.
template <size_t N>
FR_DEVICE void activate_all(float (&z)[N], Activation activation) {
  auto each = [&](auto kind) {
#pragma unroll
    for (size_t i = 0; i < N; ++i) z[i] = activate(z[i], decltype(kind)::value);
  };
  switch (activation) {
    case Activation::relu:
      return each(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu6:
      return each(std::integral_constant<Activation, Activation::relu6>{});
    case Activation::silu:
      return each(std::integral_constant<Activation, Activation::silu>{});
    case Activation::hardswish:
      return each(std::integral_constant<Activation, Activation::hardswish>{});
    default:
      return;
  }
}

// All sums of a stage's products: 128 pixels of a group as two times 64.
template <int TILE, class T, size_t N>
FR_DEVICE void start_stage(const Sm90Shared<TILE>& shared, int stage, int row, bool add, float (&sums)[2][N], T t) {
  const uint64_t patches = matrix_descriptor(shared_address(shared.patches(stage) + row * kRowBytes));
  const uint64_t weights = matrix_descriptor(shared_address(shared.weights(stage)));
  begin_products();
#pragma unroll
  for (int d = 0; d < kRowElements / 16; ++d) {  // 16 elements of the depth are 32 bytes, 2 of a descriptor's units
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      start_product(sums[half], patches + half * (64 * kRowBytes / 16) + 2 * d, weights + 2 * d, add || d > 0, t);
    }
  }
  commit_products();
}

// norm, residual, activation and rounding of a group's sums, to the group's place in shared memory.
template <int TILE, class T, size_t N>
FR_DEVICE void finish_sums(const Sm90Args& a, const Sm90Shared<TILE>& shared, int group, const float (&sums)[2][N]) {
  constexpr Sm90Plan kPlan = Sm90Shared<TILE>::kPlan;
  const int thread = block_thread() % kGroupThreads, row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  const float* const vectors = shared.vectors(group) + column;
#pragma unroll
  for (int j = 0; j < kPlan.filters / 8; ++j) {
    char* const panel = shared.output(group) + j / 8 * kPlan.panel_bytes();
    const FloatPair mean = load_pair(vectors + 8 * j), scale = load_pair(vectors + kPlan.filters + 8 * j),
                    shift = load_pair(vectors + 2 * kPlan.filters + 8 * j);
    const ChannelNorm<float> norm[2] = {{mean.low, scale.low, shift.low}, {mean.high, scale.high, shift.high}};
    float z[8];
    char* at[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows row, row + 8 and both + 64
      at[i] = panel + swizzled_byte(i / 2 * 64 + i % 2 * 8 + row, j % 8 * 16 + column * 2);
      float residual[2] = {};
      if (a.residual) unpack<T>(load_shared(at[i]), residual);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        z[2 * i + e] = normalised(sums[i / 2][4 * j + i % 2 * 2 + e], norm[e]) + residual[e];
      }
    }
    activate_all(z, a.activation);
#pragma unroll
    for (int i = 0; i < 4; ++i) store_shared(at[i], pack<T>(z[2 * i], z[2 * i + 1]));
  }
}

// A warpgroup multiplies and finishes its parts of tiles.
template <int TILE, class T>
FR_DEVICE void make_tiles(const Sm90Args& a, const Sm90Shared<TILE>& shared, int group) {
  constexpr Sm90Plan kPlan = Sm90Shared<TILE>::kPlan;
  const int thread = block_thread() % kGroupThreads, row = kPlan.shared_tile ? group * kGroupPixels : 0;
  auto release = [&](uint32_t use) {
    if (thread % 32 < kPlan.cluster) barrier_arrive<kPlan.cluster>(shared.empty(use % kPlan.stages), thread % 32);
  };
  uint32_t use = 0;
  for (Sm90Tiles<TILE> tile(a.work); tile.left(); tile.next()) {
    if (!tile.is_of(group)) {
      use += a.work.steps;
      continue;
    }
    const Sm90Filter filter = read_filter(a, tile.first_filter() + thread % kPlan.filters);
    float sums[2][kPlan.filters / 2];
    if (!kPlan.shared_tile) barrier_wait(shared.turn(group), (tile.round() & 1) ^ (group == 0));
    for (int32_t step = 0; step < a.work.steps; ++step, ++use) {
      barrier_wait(shared.full(use % kPlan.stages), use / kPlan.stages & 1);
      hold(sums);
      start_stage(shared, use % kPlan.stages, row, step > 0, sums, T{});
      hold(sums);
      wait_products<1>();
      if (step > 0) release(use - 1);  // its products are done: only this step's are under way
    }
    if (!kPlan.shared_tile && thread % 32 == 0) barrier_arrive<1>(shared.turn(1 - group), 0);
    wait_products<0>();
    hold(sums);
    release(use - 1);

    if (thread < kPlan.filters) keep_norm(a, filter, shared.vectors(group), thread, kPlan.filters);
    if (thread == 0 && !a.residual) wait_stores();
    sync_group(group);  // the vectors are there, and the last y has left its place
    if (a.residual) barrier_wait(shared.loaded(group), tile.round() & 1);
    finish_sums<TILE, T>(a, shared, group, sums);
    fence_copies();
    sync_group(group);
    if (thread == 0) {
#pragma unroll
      for (int panel = 0; panel < kPlan.panels(); ++panel) {
        store_panel(shared.output(group) + panel * kPlan.panel_bytes(), a.maps.y,
                    tile.first_filter() + panel * kRowElements, tile.first_pixel(group));
      }
      commit_stores();
      if (a.residual) {
        wait_stores();
        barrier_arrive<1>(shared.stored(group), 0);
      }
    }
  }
  if (thread == 0) wait_stores();
}

template <class T, int TILE>
FR_WIDE_KERNEL(kSm90Threads, 1)
conv_bn_act_sm90(FR_GRID_CONSTANT Sm90Args a) {
  constexpr Sm90Plan kPlan = Sm90Shared<TILE>::kPlan;
  const Sm90Shared<TILE> shared;
  const int group = block_thread() / kGroupThreads;
  if (block_thread() == 0) {
    prefetch_map(a.maps.patches);
    prefetch_map(a.maps.weights);
    for (int stage = 0; stage < kPlan.stages; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), (kPlan.shared_tile ? kGroups : 1) * (kGroupThreads / 32) * kPlan.cluster);
    }
    for (int i = 0; i < kGroups; ++i) {
      barrier_init(shared.loaded(i), 1);
      barrier_init(shared.stored(i), 1);
      barrier_init(shared.turn(i), kGroupThreads / 32);
    }
    publish_barriers();
  }
  sync_cluster<kPlan.cluster>();
  // 65,536 registers, 168 a thread at first: 40 for those that copy leave 232 for those that multiply.
  if (group == 0) {
    give_registers<40>();
    if (block_thread() == 0) fill_stages(a, shared);
    if (block_thread() == 32 && a.residual) fetch_residuals(a, shared);
    sync_warp();
  } else {
    take_registers<232>();
    make_tiles<TILE, T>(a, shared, group - 1);
  }
  if constexpr (kPlan.cluster > 1)
    sync_cluster<kPlan.cluster>();  // a block stays until its neighbour's copies and arrivals have reached it
}

template <class T>
struct Sm90Tensors {
  const T *x, *weight, *residual;
  T* y;
};

template <class T, int TILE, class Launch>
void launch_sm90_tile(Sm90Args a, const Sm90Tensors<T>& tensors, const Launch& launch) {
  constexpr Sm90Plan kPlan = sm90_plan(kConvTiles[TILE]);
  const ConvShape& s = a.shape;
  a.work = sm90_work(s, kPlan.pixels, kPlan.filters, kPlan.cluster);
  a.maps.patches = launch.map(patches_plan(s, kPlan.pixels), tensors.x);
  a.maps.weights = launch.map(weight_plan(s, kPlan.filters / kPlan.cluster), tensors.weight);
  a.maps.y = launch.map(output_plan(s), tensors.y);
  a.residual = tensors.residual != nullptr;
  a.maps.residual = a.residual ? launch.map(output_plan(s), tensors.residual) : a.maps.y;
  const int clusters = std::min(a.work.tiles, std::max(launch.multiprocessors() / kPlan.cluster, 1));
  launch(conv_bn_act_sm90<T, TILE>, clusters, kPlan.cluster, kSm90Threads, kPlan.shared_bytes(), a);
}

// `tile` is the index of one of this kernel's tiles in kConvTiles; a.work and a.maps are filled here.
template <class T, class Launch, int... I>
void launch_conv_sm90(const Sm90Args& a, const Sm90Tensors<T>& tensors, int64_t tile, const Launch& launch,
                      std::integer_sequence<int, I...>) {
  auto try_tile = [&](auto index) {
    constexpr int kTile = decltype(index)::value;
    if constexpr (kConvTiles[kTile].sm90) {
      if (tile == kTile) launch_sm90_tile<T, kTile>(a, tensors, launch);
    }
  };
  (try_tile(std::integral_constant<int, I>{}), ...);
}

template <class T, class Launch>
void launch_conv_sm90(const Sm90Args& a, const Sm90Tensors<T>& tensors, int64_t tile, const Launch& launch) {
  launch_conv_sm90(a, tensors, tile, launch, std::make_integer_sequence<int, kConvTileCount>{});
}

}  // namespace fused_resnet
