// How Winograd's algorithm cuts an output into tiles of m x m pixels, and what becomes of the weights.
#pragma once

#include "cpu/convs.h"

namespace fused_resnet {

struct WinogradTiles {
  int32_t rows, columns;  // of one image
  int64_t count;          // of all images
};

FR_HD WinogradTiles winograd_tiles(const ConvShape& s, int m) {
  const int32_t rows = ceil_div<int32_t>(s.P, m), columns = ceil_div<int32_t>(s.Q, m);
  return WinogradTiles{rows, columns, static_cast<int64_t>(s.N) * rows * columns};
}

FR_HD int64_t winograd_chunks(const ConvShape& s) {
  return ceil_div<int64_t>(s.C, kChunk);
}

// G, one row a point: powers of the point over the product of its distances to the others, as Toom and Cook have it.
FR_HD void winograd_points(int m, double g[6][3]) {
  const double a = m == 4 ? 0.70710678118654752440 : 1, b = 1.41421356237309504880;
  const double points[5] = {0, a, -a, b, -b};
  for (int i = 0; i <= m; ++i) {
    double distance = 1;
    for (int j = 0; j <= m; ++j) distance *= i == j ? 1 : points[i] - points[j];
    for (int j = 0; j < 3; ++j) g[i][j] = (j == 0 ? 1 : j == 1 ? points[i] : points[i] * points[i]) / distance;
  }
  g[m + 1][0] = g[m + 1][1] = 0;
  g[m + 1][2] = 1;
}

// u [m + 2][m + 2] = G g G' of one 3x3 kernel, in fp64 and rounded once.
FR_HD void winograd_weight(int m, const double g[6][3], const float* kernel, float u[6][6]) {
  double half[6][3];
  for (int i = 0; i < m + 2; ++i) {
    for (int j = 0; j < 3; ++j) half[i][j] = g[i][0] * kernel[j] + g[i][1] * kernel[3 + j] + g[i][2] * kernel[6 + j];
  }
  for (int i = 0; i < m + 2; ++i) {
    for (int j = 0; j < m + 2; ++j)
      u[i][j] = static_cast<float>(half[i][0] * g[j][0] + half[i][1] * g[j][1] + half[i][2] * g[j][2]);
  }
}

}  // namespace fused_resnet
