// What the 32 threads of a warp hold of a matrix product: of sums [16 * I, 8 * J] each has sums[I][J][4]. Elements of
// 16 bits are multiplied by tensor cores, as PTX lays them down for mma.m16n8k16; wider ones in their own precision.
#pragma once

#include "cuda/device.h"

namespace fused_resnet {

// Row and column of element e of part (i, j).
FR_HD int32_t sum_row(int32_t lane, int32_t i, int32_t e) {
  return 16 * i + lane / 4 + e / 2 * 8;
}

template <class T>
FR_HD int32_t sum_column(int32_t lane, int32_t j, int32_t e) {
  return sizeof(T) == 2 ? 8 * j + lane % 4 * 2 + e % 2 : 8 * j + lane % 4 + e % 2 * 4;
}

// Elements e < COUNT of a row of left times those of a column of right, added to the sums of wide elements. left(i, e)
// gives those of sum_row(i, e), right(j, e) those of sum_column(j, e), at a multiple of 16 bytes.
template <class T, int COUNT, int I, int J, class Left, class Right>
FR_DEVICE void multiply_wide(const Left& left, const Right& right, T (&sums)[I][J][4]) {
  T a[I][2][COUNT];
#pragma unroll
  for (int i = 0; i < I; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) load_elements<COUNT>(left(i, 2 * half), 0, COUNT, true, a[i][half]);
  }
#pragma unroll
  for (int j = 0; j < J; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T b[COUNT];
      load_elements<COUNT>(right(j, half), 0, COUNT, true, b);
#pragma unroll
      for (int i = 0; i < I; ++i) {
#pragma unroll
        for (int e = 0; e < COUNT; ++e) {
          sums[i][j][half] += a[i][0][e] * b[e];
          sums[i][j][2 + half] += a[i][1][e] * b[e];
        }
      }
    }
  }
}

}  // namespace fused_resnet
