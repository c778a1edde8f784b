// The drivers' integers: the same in every run.
#pragma once

#include <cstdint>

namespace fused_resnet {

inline uint32_t state = 1;

// An integer in [low, high].
inline int number(int low, int high) {
  state = state * 1664525u + 1013904223u;
  return low + static_cast<int>((state >> 16) % static_cast<uint32_t>(high - low + 1));
}

}  // namespace fused_resnet
