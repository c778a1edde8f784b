// The tiles of _conv_bn_act on CUDA, pixels x filters a block: its argument `tile` is an index into this table, and
// every kernel is instantiated from it. Python has the same names in the same order, fused_resnet.native.CONV_TILES.
#pragma once

#include <cstdint>

namespace fused_resnet {

struct ConvTile {
  const char* name;
  bool sm90;  // wgmma and TMA, capability 9.x alone; else mma.sync, from sm_80 on
  int32_t pixels, filters;
  // Blocks that share their weights: two read them from L2 once, a quarter less traffic with 128 x 128. Tiles of 64
  // filters serve the smallest problems, too, which a pair would leave half idle.
  int32_t cluster;
};

constexpr ConvTile kConvTiles[] = {
    {"mma_128x64", false, 128, 64, 1},   {"mma_128x128", false, 128, 128, 1}, {"sm90_128x64", true, 128, 64, 1},
    {"sm90_128x128", true, 128, 128, 2}, {"sm90_256x128", true, 256, 128, 2},
};
constexpr int kConvTileCount = sizeof(kConvTiles) / sizeof(kConvTiles[0]);
constexpr int kNoTile = -1;  // the rule decides

inline bool is_tile(int64_t tile, bool sm90) {
  return tile >= 0 && tile < kConvTileCount && kConvTiles[tile].sm90 == sm90;
}

}  // namespace fused_resnet
