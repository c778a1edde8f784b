// Launches of the sm_90a kernel of conv_bn_act.
#include "cuda/conv_sm90.cuh"
#include "cuda/conv_sm90.h"

namespace fused_resnet {
namespace {

// The driver's function, found at run time: the library links with the runtime alone.
template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
  STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess, "the driver has no ", name);
  return reinterpret_cast<Function>(found);
}

TensorMap encode(const TensorPlan& plan, CUtensorMapDataType type, const void* memory) {
  static const auto tiled = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  static const auto im2col = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  TensorMap map;
  void* const at = const_cast<void*>(memory);
  const CUresult result =
      plan.im2col ? im2col(&map, type, plan.rank, at, plan.sizes, plan.strides, plan.lower, plan.upper, plan.box[0],
                           plan.box[1], plan.steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
                  : tiled(&map, type, plan.rank, at, plan.sizes, plan.strides, plan.box, plan.steps,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "the driver refuses a tensor map: error ", static_cast<int>(result));
  return map;
}

struct Sm90Launch {
  const Stream& stream;

  int multiprocessors() const { return stream.multiprocessors(); }
  TensorMap map(const TensorPlan& plan, const bf16* memory) const {
    return encode(plan, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, memory);
  }
  TensorMap map(const TensorPlan& plan, const fp16* memory) const {
    return encode(plan, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, memory);
  }

  template <class Kernel>
  void operator()(Kernel kernel, int clusters, int cluster, int threads, size_t bytes, const Sm90Args& args) const {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    cudaLaunchAttribute shape;
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = bytes;
    config.stream = stream.get();
    config.attrs = &shape;
    config.numAttrs = 1;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
  }
};

// Why the kernel cannot take these tensors, or null.
template <class T>
const char* refusal(const ConvArgs<T>& a, const Stream& stream) {
  if (stream.capability() != 90) return "a device that is not of capability 9.0";
  if (a.pre.var != nullptr) return "a prologue";
  if (!a.aligned || !aligned(a.x, a.weight)) return "tensors that do not start at a multiple of 16 bytes";
  return sm90_refusal(a.shape);
}

template <class T>
bool launch(const ConvArgs<T>& a, int64_t tile, const Stream& stream) {
  if (is_tile(tile, false)) return false;
  const char* reason = refusal(a, stream);
  STD_TORCH_CHECK(tile == kNoTile || reason == nullptr, "tile ", kConvTiles[tile].name, " does not take ", reason);
  if (tile == kNoTile) tile = reason == nullptr ? sm90_rule(a.shape, stream.multiprocessors()) : kNoTile;
  if (tile == kNoTile) return false;
  if (pixels(a.shape) == 0 || a.shape.K == 0) return true;
  Sm90Args args{};
  args.shape = a.shape;
  args.bias = a.bias;
  args.norm = {a.gamma, a.beta, a.mean, a.var, nullptr, a.eps};
  args.activation = a.activation;
  launch_conv_sm90(args, Sm90Tensors<T>{a.x, a.weight, a.residual, a.y}, tile, Sm90Launch{stream});
  return true;
}

}  // namespace

bool launch_sm90(const ConvArgs<bf16>& a, int64_t tile, const Stream& stream) {
  return launch(a, tile, stream);
}

bool launch_sm90(const ConvArgs<fp16>& a, int64_t tile, const Stream& stream) {
  return launch(a, tile, stream);
}

}  // namespace fused_resnet
