// What the sm_90a kernel asks of the GPU beyond device.h: tensor maps and the copies that they describe, barriers in
// shared memory that count copies, clusters, wgmma. CuTe brings the instructions. Without nvcc all of it is the
// emulation of testing/host_hopper.h, so that the kernel runs, source unchanged, on a CPU.
#pragma once

#include "common/conv_sm90.h"
#include "cuda/device.h"

#if defined(__CUDACC__)

#include <cuda.h>

#include <utility>

#include "cute/arch/cluster_sm90.hpp"
#include "cute/arch/copy_sm90_desc.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/arch/mma_sm90_gmma.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/arch/reg_reconfig.h"

#define FR_GRID_CONSTANT const __grid_constant__
#define FR_MEMBER __device__ __forceinline__

namespace fused_resnet {

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

FR_DEVICE int block_thread() {
  return thread_index();
}
FR_DEVICE int cluster_rank() {
  return static_cast<int>(cute::block_rank_in_cluster());
}
template <int CLUSTER>
FR_DEVICE int cluster_index() {
  return blockIdx.x / CLUSTER;
}
template <int CLUSTER>
FR_DEVICE int grid_clusters() {
  return gridDim.x / CLUSTER;
}
FR_DEVICE char* block_memory() {
  return shared_memory();
}
FR_DEVICE void sync_warp() {
  __syncwarp();
}

template <int CLUSTER>
FR_DEVICE void sync_cluster() {
  if constexpr (CLUSTER == 1) {
    sync_block();
  } else {
    cute::cluster_sync();
  }
}

// Waits for the other threads of a warpgroup, each of which gives the same number.
FR_DEVICE void sync_group(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}

// How many registers the threads of a warpgroup may have from here on.
template <int COUNT>
FR_DEVICE void give_registers() {
  cutlass::arch::warpgroup_reg_dealloc<COUNT>();
}
template <int COUNT>
FR_DEVICE void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<COUNT>();
}

FR_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  cutlass::arch::ClusterBarrier::init(barrier, arrivals);
}

// Makes the barriers that this thread has set known to the cluster and to copies.
FR_DEVICE void publish_barriers() {
  cutlass::arch::fence_barrier_init();
}

// Arrives at the barrier of the same address in block `rank` of the cluster.
template <int CLUSTER>
FR_DEVICE void barrier_arrive(Barrier* barrier, int rank) {
  if constexpr (CLUSTER == 1) {
    cutlass::arch::ClusterBarrier::arrive(barrier);
  } else {
    cutlass::arch::ClusterBarrier::arrive(barrier, rank, 1u);
  }
}

// Arrives, and lets the phase wait for so many bytes of copies.
FR_DEVICE void barrier_expect(Barrier* barrier, int bytes) {
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, bytes);
}

// Waits until the phase of the given parity is over.
FR_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  cutlass::arch::ClusterBarrier::wait(barrier, parity);
}

FR_DEVICE void prefetch_map(const TensorMap& map) {
  cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
}

// Patches of the windows from (n, h, w) on, `down` and `right` of their corners, channels from c on.
FR_DEVICE void load_patches(char* to, const TensorMap& map, Barrier* barrier, int c, int w, int h, int n, int right,
                            int down) {
  cute::SM90_TMA_LOAD_IM2COL_4D::copy(&map, barrier, to, c, w, h, n, static_cast<uint16_t>(right),
                                      static_cast<uint16_t>(down));
}

// Weights of one cell; to the same place in all blocks of the cluster.
template <int CLUSTER>
FR_DEVICE void load_weights(char* to, const TensorMap& map, Barrier* barrier, int c, int cell, int filter) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
  if constexpr (CLUSTER == 1) {
    cute::SM90_TMA_LOAD_3D::copy(&map, barrier, kHint, to, c, cell, filter);
  } else {
    cute::SM90_TMA_LOAD_MULTICAST_3D::copy(&map, barrier, (1 << CLUSTER) - 1, kHint, to, c, cell, filter);
  }
}

FR_DEVICE void load_panel(char* to, const TensorMap& map, Barrier* barrier, int k, int pixel) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  cute::SM90_TMA_LOAD_2D::copy(&map, barrier, kHint, to, k, pixel);
}

// Copies a panel to memory; it belongs to the thread's open group of copies.
FR_DEVICE void store_panel(const char* from, const TensorMap& map, int k, int pixel) {
  cute::SM90_TMA_STORE_2D::copy(&map, from, k, pixel);
}
FR_DEVICE void commit_stores() {
  cute::tma_store_arrive();
}
// Waits until the thread's stores have read shared memory.
FR_DEVICE void wait_stores() {
  cute::tma_store_wait<0>();
}

FR_DEVICE uint32_t load_shared(const char* from) {
  return *reinterpret_cast<const uint32_t*>(from);
}
FR_DEVICE void store_shared(char* to, uint32_t value) {
  *reinterpret_cast<uint32_t*>(to) = value;
}
// Orders this thread's writes to shared memory before copies that are started after it.
FR_DEVICE void fence_copies() {
  cute::tma_store_fence();
}

template <int FILTERS, class T>
struct Wgmma;
namespace gmma = cute::SM90::GMMA;
template <>
struct Wgmma<64, bf16> : gmma::MMA_64x64x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Wgmma<128, bf16> : gmma::MMA_64x128x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Wgmma<64, fp16> : gmma::MMA_64x64x16_F32F16F16_SS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Wgmma<128, fp16> : gmma::MMA_64x128x16_F32F16F16_SS<gmma::Major::K, gmma::Major::K> {};

// Starts sums [64, FILTERS] = or += patches [64, 16] * weights [FILTERS, 16]^T of descriptors. Of every eight filters a
// thread has filters 2 * (lane % 4) and the next, of rows lane / 4 and lane / 4 + 8 of its warp's sixteen.
template <class T, size_t... I>
FR_DEVICE void start_product(float (&sums)[sizeof...(I)], uint64_t patches, uint64_t weights, bool add, T,
                             std::index_sequence<I...>) {
  Wgmma<2 * sizeof...(I), T>::fma(patches, weights, sums[I]..., add ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}
template <class T, size_t N>
FR_DEVICE void start_product(float (&sums)[N], uint64_t patches, uint64_t weights, bool add, T element) {
  start_product(sums, patches, weights, add, element, std::make_index_sequence<N>{});
}

// Between products: what was in registers is there for the first, what was started is one group of copies' size, and
// all but the last PENDING groups are done.
FR_DEVICE void begin_products() {
  cute::warpgroup_arrive();
}
FR_DEVICE void commit_products() {
  cute::warpgroup_commit_batch();
}
template <int PENDING>
FR_DEVICE void wait_products() {
  cute::warpgroup_wait<PENDING>();
}
// Keeps the compiler from moving what it does with the sums across.
template <size_t M, size_t N>
FR_DEVICE void hold(float (&sums)[M][N]) {
#pragma unroll
  for (size_t i = 0; i < M; ++i) {
#pragma unroll
    for (size_t j = 0; j < N; ++j) cute::warpgroup_fence_operand(sums[i][j]);
  }
}

}  // namespace fused_resnet

#else
#include "testing/host_hopper.h"
#endif

namespace fused_resnet {

struct alignas(8) FloatPair {
  float low, high;
};

FR_DEVICE FloatPair load_pair(const float* from) {
  return *reinterpret_cast<const FloatPair*>(from);
}

}  // namespace fused_resnet
