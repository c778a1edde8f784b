// Memory for the results of launches on the CPU. Maps of megabytes come and go with every launch: from the system they
// would be new pages each time (about 3 us for 4 KiB under a hypervisor), and glibc before 2.38 finds the places of
// aligned blocks again so seldom that the heap grows with every forward pass. What is let go here serves again.
#pragma once

#include "common/checks.h"

namespace fused_resnet {

constexpr int64_t kLarge = 256 << 10;  // bytes; PyTorch keeps what is smaller

// What a launch reads or makes: [N, C, H, W], dense in channels_last memory.
struct Image {
  Sizes size;
  ScalarType dtype;

  int64_t bytes_of_one() const { return size[1] * size[2] * size[3] * element(); }
  int64_t element() const { return dtype == ScalarType::Byte ? 1 : dtype == ScalarType::BFloat16 ? 2 : 4; }
};

inline Image image_of(const Tensor& t) {
  return {sizes_of(t), t.scalar_type()};
}

// An image with nothing in it, on the device of `like`.
Tensor make_image(const Image& image, const Tensor& like);

// Bytes for packed weights, with nothing in them. They lie in huge pages, where the system has such: in small ones a
// network's weights are more than a processor remembers the places of, and at batch 1 each is read once.
Tensor make_pack(int64_t bytes, const Tensor& like);

}  // namespace fused_resnet
