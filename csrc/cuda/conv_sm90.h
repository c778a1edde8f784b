// The sm_90a kernel as the raw operator sees it; a build without CuTe's headers has it refuse everything.
#pragma once

#include "common/conv_tiles.h"
#include "cuda/conv_epilogue.cuh"
#include "cuda/launch.h"

namespace fused_resnet {

// Makes y with the sm_90a kernel where it should: `tile` is one of its tiles, or kNoTile and the device and the rule
// are for it. Returns false where mma.sync is to do it; throws where a tile that was asked for cannot.
#if defined(FR_HAS_SM90)
bool launch_sm90(const ConvArgs<bf16>& a, int64_t tile, const Stream& stream);
bool launch_sm90(const ConvArgs<fp16>& a, int64_t tile, const Stream& stream);
#else
inline bool launch_sm90(const ConvArgs<bf16>&, int64_t tile, const Stream&) {
  STD_TORCH_CHECK(!is_tile(tile, true), "tile = ", tile, " was left out of this build");
  return false;
}
inline bool launch_sm90(const ConvArgs<fp16>&, int64_t tile, const Stream& stream) {
  return launch_sm90(ConvArgs<bf16>{}, tile, stream);
}
#endif
// Elements of 32 and 64 bits have no such kernel.
template <class T>
bool launch_sm90(const ConvArgs<T>&, int64_t tile, const Stream&) {
  STD_TORCH_CHECK(!is_tile(tile, true), "tile ", kConvTiles[tile].name, " takes bf16 and fp16");
  return false;
}

}  // namespace fused_resnet
