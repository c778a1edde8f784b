// The sm_90a kernel of conv_bn_act in numbers: what it refuses, which tile the rule takes, how its copies are described
// to the hardware, where things lie in shared memory and which block makes what. tests/csrc exhausts it on the CPU.
#pragma once

#include "common/conv_tiles.h"
#include "common/index.h"

namespace fused_resnet {

// A block has one warpgroup that starts copies and two that multiply, each 128 pixels x all filters of a tile: both
// share a tile of 256 pixels, or take turns with tiles of 128, so that one stores while the other multiplies.
constexpr int kGroupThreads = 128, kSm90Threads = 3 * kGroupThreads;
constexpr int kGroupPixels = 128, kGroups = 2;
constexpr int kRowElements = 64, kRowBytes = 128;  // of an operand: the depth of a step, as wide as a swizzle may be
constexpr int kSharedLimit = 232448;               // that a block may ask for on sm_90
constexpr int kSwizzleBytes = 1024;                // the period of the swizzle, to which operands are aligned

// Shared memory of a tile: per stage the patches and the weights; per group the tile's residual, which y replaces, in
// panels of kRowElements filters, and the vectors of the norm; the barriers.
struct Sm90Plan {
  int32_t pixels, filters, cluster, stages;
  bool shared_tile;  // both groups work on one tile

  constexpr int32_t patch_bytes() const { return pixels * kRowBytes; }
  constexpr int32_t weight_bytes() const { return filters * kRowBytes; }
  constexpr int32_t stage_bytes() const { return patch_bytes() + weight_bytes(); }
  constexpr int32_t panel_bytes() const { return kGroupPixels * kRowBytes; }
  constexpr int32_t panels() const { return filters / kRowElements; }
  constexpr int32_t output_bytes() const { return panels() * panel_bytes(); }
  constexpr int32_t vector_bytes() const { return 3 * filters * 4; }
  constexpr int32_t weights_at() const { return stages * patch_bytes(); }
  constexpr int32_t outputs_at() const { return stages * stage_bytes(); }
  constexpr int32_t vectors_at() const { return outputs_at() + kGroups * output_bytes(); }
  constexpr int32_t barriers_at() const { return vectors_at() + kGroups * vector_bytes(); }
  constexpr int32_t barriers() const { return 2 * stages + 3 * kGroups; }
  constexpr int32_t shared_bytes() const { return barriers_at() + barriers() * 8 + kSwizzleBytes; }
};

// As many stages as fit: 8 of 24 KiB, 4 of 32 KiB, 3 of 48 KiB.
constexpr Sm90Plan sm90_plan(const ConvTile& tile) {
  Sm90Plan plan{tile.pixels, tile.filters, tile.cluster, 1, tile.pixels == kGroups * kGroupPixels};
  while (true) {
    Sm90Plan next = plan;
    next.stages += 1;
    if (next.shared_bytes() > kSharedLimit) return plan;
    plan = next;
  }
}

// Where byte `byte` of row `row` of a buffer lies: 16-byte chunks of eight rows change places, so that eight rows of
// one column of chunks lie in different banks. It is what TMA and wgmma call a swizzle of 128 bytes.
FR_HD int32_t swizzled_byte(int32_t row, int32_t byte) {
  return row * kRowBytes + (byte ^ (row % 8 * 16));
}

// wgmma's descriptor of rows of kRowBytes from shared memory address `address` on: bits 0-13 the address / 16, 32-45
// the distance of eight rows / 16, 62-63 the swizzle; the distance in bits 16-29 is not read for such rows.
FR_HD uint64_t matrix_descriptor(uint32_t address) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | uint64_t{1} << 16 |
         static_cast<uint64_t>(8 * kRowBytes >> 4) << 32 | uint64_t{1} << 62;
}

// The work: tile `index` of tiles(), the filters first, so that blocks at work together read the same pixels.
struct Sm90Work {
  int32_t filter_tiles, tiles;  // tiles of a cluster, which takes `cluster` tiles of pixels one after the other
  int32_t steps;                // of kRowElements of the depth, each within one tap
};

FR_HD int64_t sm90_tiles(const ConvShape& s, int32_t tile_pixels, int32_t tile_filters, int32_t cluster) {
  return ceil_div(pixels(s), int64_t{tile_pixels} * cluster) * ceil_div(s.K, tile_filters);
}

FR_HD Sm90Work sm90_work(const ConvShape& s, int32_t tile_pixels, int32_t tile_filters, int32_t cluster) {
  return {ceil_div(s.K, tile_filters), static_cast<int32_t>(sm90_tiles(s, tile_pixels, tile_filters, cluster)),
          s.R * s.S * ceil_div(s.C, kRowElements)};
}

// pixel_of for fewer than 2^31 pixels: a GPU divides 64 bits in a function call.
FR_HD Pixel near_pixel_of(int32_t m, int32_t P, int32_t Q) {
  const int32_t row = m / Q;
  return Pixel{row / P, row % P, m % Q};
}

// What a tensor map is made of, in the order of memory, as cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col take it.
struct TensorPlan {
  int32_t rank;
  bool im2col;
  uint64_t sizes[4], strides[3];  // strides in bytes, from dimension 1 on
  uint32_t box[4];                // elements of a copy; with im2col channels and pixels
  uint32_t steps[4];              // the element strides
  int32_t lower[2], upper[2];     // with im2col, of w and h: the corners of the box that windows start in
};

// x as patches: pixel after pixel of y, a window starts from -padding to size - 1 + upper, in steps of the stride. The
// taps are the offsets that a copy is given.
FR_HD TensorPlan patches_plan(const ConvShape& s, int32_t tile_pixels) {
  const auto C = static_cast<uint64_t>(s.C), W = static_cast<uint64_t>(s.W), H = static_cast<uint64_t>(s.H);
  return {4,
          true,
          {C, W, H, static_cast<uint64_t>(s.N)},
          {2 * C, 2 * C * W, 2 * C * W * H},
          {kRowElements, static_cast<uint32_t>(tile_pixels)},
          {1, static_cast<uint32_t>(s.stride_w), static_cast<uint32_t>(s.stride_h), 1},
          {-s.pad_w, -s.pad_h},
          {s.pad_w - (s.S - 1) * s.dilation_w, s.pad_h - (s.R - 1) * s.dilation_h}};
}

// weight as [K, R * S, C]; a block of a cluster copies its part of the filters to all.
FR_HD TensorPlan weight_plan(const ConvShape& s, int32_t filters) {
  const auto C = static_cast<uint64_t>(s.C), cells = static_cast<uint64_t>(s.R) * s.S;
  return {3,
          false,
          {C, cells, static_cast<uint64_t>(s.K)},
          {2 * C, 2 * C * cells},
          {kRowElements, 1, static_cast<uint32_t>(filters)},
          {1, 1, 1, 1},
          {},
          {}};
}

// y and the residual as [pixels, K], a panel at a time.
FR_HD TensorPlan output_plan(const ConvShape& s) {
  const auto K = static_cast<uint64_t>(s.K);
  return {2, false, {K, static_cast<uint64_t>(pixels(s))}, {2 * K}, {kRowElements, kGroupPixels}, {1, 1, 1, 1}, {}, {}};
}

// Why the kernel cannot make this convolution, or null. The bounds are those of cuTensorMapEncodeIm2col for an image:
// corners are signed bytes, element strides at most 8, strides below 2^40 bytes; and those of the copy's offsets.
inline const char* sm90_refusal(const ConvShape& s) {
  auto byte = [](int64_t corner) { return corner >= -128 && corner <= 127; };
  const int64_t reach_h = (s.R - int64_t{1}) * s.dilation_h, reach_w = (s.S - int64_t{1}) * s.dilation_w;
  if (s.groups != 1) return "groups";
  if (s.C == 0 || s.C % 8 != 0 || s.K % 8 != 0) return "channels or filters that are not a multiple of 8";
  if (s.stride_h > 8 || s.stride_w > 8) return "a stride of more than 8";
  if (!byte(-s.pad_h) || !byte(-s.pad_w) || !byte(s.pad_h - reach_h) || !byte(s.pad_w - reach_w)) {
    return "a padding of more than 128, or a window that reaches more than 128 beyond it";
  }
  if (reach_h > 254 || reach_w > 254) return "a window that is wider than 255";
  if (int64_t{s.C} * s.H * s.W >= int64_t{1} << 39) return "an image of 2^40 bytes or more";
  if (int64_t{s.C} * s.R * s.S >= int64_t{1} << 30) return "a dot product of more than 2^30 terms";
  if (pixels(s) > (int64_t{1} << 31) - 1024) return "more than 2^31 - 1024 output pixels";
  if (sm90_tiles(s, kGroupPixels, kRowElements, 1) >= int64_t{1} << 31) return "more than 2^31 tiles";
  return nullptr;
}

// The tile where none is asked for, or kNoTile for mma.sync. Not measured yet; from arithmetic alone: fewer channels
// than 32 leave more than half of a step empty; else the largest tile of which every multiprocessor gets one, because
// a large tile reads the least from L2 for its products; 64 filters have one tile that fits.
inline int sm90_rule(const ConvShape& s, int multiprocessors) {
  if (sm90_refusal(s) != nullptr || s.C < 32) return kNoTile;
  int best = kNoTile;
  for (int i = 0; i < kConvTileCount; ++i) {
    const ConvTile& tile = kConvTiles[i];
    if (!tile.sm90 || (best != kNoTile && s.K <= kRowElements)) continue;
    const int64_t blocks = sm90_tiles(s, tile.pixels, tile.filters, tile.cluster) * tile.cluster;
    if (best == kNoTile || blocks >= multiprocessors) best = i;
  }
  return best;
}

}  // namespace fused_resnet
