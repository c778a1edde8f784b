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
    auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, x.get_device_index()));
      return value;
    };
    multiprocessors_ = attribute(cudaDevAttrMultiProcessorCount);
    shared_memory_ = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    capability_ = attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor);
  }

  int shared_memory() const { return shared_memory_; }  // bytes that a block can have
  int multiprocessors() const { return multiprocessors_; }
  int capability() const { return capability_; }  // 90 for 9.0
  cudaStream_t get() const { return stream_; }

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
  int multiprocessors_ = 1, shared_memory_ = 0, capability_ = 0;
};

// Whether all of them start at a multiple of 16 bytes; null does.
template <class... Pointer>
bool aligned(const Pointer*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// Vectors in the accumulator's type, which kernels read as they are; what had to be converted lives as long as this.
class Vectors {
 public:
  explicit Vectors(const Tensor& x) : x_(x) {}

  template <class A>
  const A* of(const Maybe& v, int64_t size, const char* name) {
    check_vector(v, size, x_, name);
    if (!v.has_value() || v->scalar_type() == accumulator_type(x_)) return data<A>(v);
    kept_.push_back(torch::stable::to(*v, accumulator_type(x_)));
    return data<A>(kept_.back());
  }

 private:
  const Tensor& x_;
  std::vector<Tensor> kept_;
};

// What follows the sums of a convolution with K filters: bias, norm and activation.
template <class A, class Args>
void set_epilogue(Args& a, Vectors& vectors, int64_t K, const Maybe& bias, const Maybe& gamma, const Maybe& beta,
                  const Maybe& mean, const Maybe& var, double eps, const std::string& activation) {
  a.bias = vectors.of<A>(bias, K, "bias");
  a.gamma = vectors.of<A>(gamma, K, "gamma");
  a.beta = vectors.of<A>(beta, K, "beta");
  a.mean = vectors.of<A>(mean, K, "mean");
  a.var = vectors.of<A>(var, K, "var");
  a.eps = static_cast<A>(eps);
  a.activation = activation_of(activation);
}

}  // namespace fused_resnet
