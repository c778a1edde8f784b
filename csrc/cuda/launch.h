// Launches on the current stream of a tensor's device.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "common/checks.h"

namespace fused_resnet {

// Kept alive while kernels are launched on the device of `x`.
class Stream {
 public:
  explicit Stream(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  }

  int multiprocessors() const { return multiprocessors_; }

  template <class Kernel, class Args>
  void operator()(Kernel kernel, int64_t blocks, int threads, size_t bytes, const Args& args) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks < int64_t{1} << 31, "a grid of ", blocks, " blocks is too large");
    if (bytes > 48 << 10) {
      STD_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    }
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream_>>>(args);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 1;
};

// Whether all of them start at a multiple of 16 bytes; null does.
template <class... Pointer>
bool aligned(const Pointer*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// A dense vector of `size` elements in the accumulator's type, which kernels read as it is.
template <class A>
const A* vector_of(const Maybe& v, int64_t size, const Tensor& x, const char* name) {
  check_vector(v, size, x, name);
  STD_TORCH_CHECK(!v.has_value() || v->scalar_type() == accumulator_type(x), name, " must be ",
                  sizeof(A) == 8 ? "fp64" : "fp32");
  return data<A>(v);
}

}  // namespace fused_resnet
