// What kernels ask of the GPU, as thin wrappers: kernels include this and no other, so that without nvcc they compile,
// source unchanged, for the emulation in testing/host_block.h, which runs them on a CPU.
#pragma once

#include "common/elements.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define FR_KERNEL(threads) __global__ void __launch_bounds__(threads)
// For kernels that need registers more than neighbours: `blocks` fit on a multiprocessor. Without a number ptxas (13.0)
// spilled a few bytes at 80, 128 and 168 registers, to reach the next step of occupancy.
#define FR_WIDE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FR_DEVICE static __device__ __forceinline__

namespace fused_resnet {

FR_DEVICE int thread_index() {
  return threadIdx.x;
}
FR_DEVICE int block_threads() {
  return blockDim.x;
}
FR_DEVICE int64_t block_index() {
  return blockIdx.x;
}
FR_DEVICE int64_t grid_blocks() {
  return gridDim.x;
}

// The block's dynamic shared memory, aligned to 128 bytes.
FR_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

FR_DEVICE void sync_block() {
  __syncthreads();
}

// 1 / sqrt(x) without a call, which would cost registers.
FR_DEVICE float inverse_root(float x) {
  return rsqrtf(x);
}
FR_DEVICE double inverse_root(double x) {
  return rsqrt(x);
}

FR_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 or 8 bytes to shared memory without registers, or writes zeros where `valid` is false.
template <int BYTES>
FR_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 8 : 0)
                 : "memory");
  }
}

FR_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING groups of this thread's copies are under way.
template <int PENDING>
FR_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8, and gets of each matrix
// the elements 2 * (lane % 4) and the next of row lane / 4.
FR_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] * b [16, 8], fragments as PTX lays them for mma.m16n8k16.
FR_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1, bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FR_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1, fp16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

}  // namespace fused_resnet

#else
#include "testing/host_block.h"
#endif

namespace fused_resnet {

// Elements [at, at + COUNT) of a dense tensor of `size` elements in the accumulator's type, 0 beyond its end. `aligned`
// says that the tensor starts at a multiple of 16 bytes; `at` is a multiple of COUNT.
template <int COUNT, class T>
FR_DEVICE void load_elements(const T* from, int64_t at, int64_t size, bool aligned, Accumulator<T> (&out)[COUNT]) {
  constexpr int kChunk = 16 / sizeof(T);
  if constexpr (COUNT % kChunk == 0) {
    if (aligned && at + COUNT <= size) {
#pragma unroll
      for (int i = 0; i < COUNT / kChunk; ++i) {
        const Bytes16 bytes = reinterpret_cast<const Bytes16*>(from + at)[i];
        T chunk[kChunk];
        memcpy(chunk, &bytes, 16);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) out[i * kChunk + j] = widen(chunk[j]);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) out[i] = at + i < size ? widen(from[at + i]) : Accumulator<T>(0);
}

template <int COUNT, class T>
FR_DEVICE void store_elements(T* to, int64_t at, int64_t size, bool aligned, const Accumulator<T> (&values)[COUNT]) {
  constexpr int kChunk = 16 / sizeof(T);
  if constexpr (COUNT % kChunk == 0) {
    if (aligned && at + COUNT <= size) {
#pragma unroll
      for (int i = 0; i < COUNT / kChunk; ++i) {
        T chunk[kChunk];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) round_to(chunk[j], values[i * kChunk + j]);
        Bytes16 bytes;
        memcpy(&bytes, chunk, 16);
        reinterpret_cast<Bytes16*>(to + at)[i] = bytes;
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (at + i < size) round_to(to[at + i], values[i]);
  }
}

}  // namespace fused_resnet
