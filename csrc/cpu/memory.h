// Memory for the results of launches on the CPU. Maps of megabytes come and go with every launch: from the system they
// would be new pages each time (about 3 us for 4 KiB under a hypervisor), and glibc before 2.38 finds the places of
// aligned blocks again so seldom that the heap grows with every forward pass. What is let go here serves again.
#pragma once

#include "common/checks.h"

namespace fused_resnet {

constexpr int64_t kLarge = 256 << 10;  // bytes; PyTorch keeps what is smaller

// A result [N, C, H, W] in channels_last memory.
Tensor make_image(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype, const Tensor& like);

}  // namespace fused_resnet
