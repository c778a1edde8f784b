// The memory that serves again: several threads take and give blocks of sizes around the store's limits.
#include <unistd.h>

#include "calls.h"
#include "cpu/memory.h"

namespace fused_resnet {
namespace {

constexpr int64_t kMega = 1 << 20, kInFront = 16 + 16 * 192;  // what a block has besides its data, at most
constexpr int64_t kSizes[] = {1,
                              kLarge - 1,
                              kLarge,
                              kLarge + 1,
                              320 << 10,
                              5 * kLarge / 4,
                              384 << 10,
                              2 * kMega - kInFront - 1,
                              2 * kMega - kInFront,
                              2 * kMega,
                              2 * kMega + 1,
                              4 * kMega - kInFront,
                              4 * kMega - kInFront + 1,
                              (512 << 10) - kInFront,
                              (512 << 10) - kInFront + 1,
                              (512 << 10) - kInFront + 2944};

Tensor block(int64_t bytes) {
  return make_image({{1, 1, 1, bytes}, ScalarType::Byte}, Tensor({1}, ScalarType::Byte, false));
}

// Both ends of a block hold what its owner has written.
void sign(const Tensor& t, uint8_t name) {
  memset(t.mutable_data_ptr(), name, static_cast<size_t>(std::min<int64_t>(t.numel(), 4096)));
  memset(data_out<uint8_t>(t) + std::max<int64_t>(t.numel() - 4096, 0), name,
         static_cast<size_t>(std::min<int64_t>(t.numel(), 4096)));
}

void check_signed(const Tensor& t, uint8_t name) {
  for (int64_t i = 0; i < t.numel(); i = i + 1 == 4096 ? std::max<int64_t>(t.numel() - 4096, 4096) : i + 1) {
    if (data<uint8_t>(t)[i] != name) fail("two blocks share memory");
  }
}

void exchange(int first) {
  std::vector<Tensor> held;
  for (int i = 0; i < 60; ++i) {
    const auto name = static_cast<uint8_t>(first + 3 * i);
    held.push_back(block(kSizes[static_cast<size_t>(first + 5 * i) % std::size(kSizes)]));
    sign(held.back(), name);
    if (held.size() < 6) continue;
    const size_t drop = static_cast<size_t>(i) % held.size();
    for (size_t j = 0; j < held.size(); ++j) {
      const auto own = data<uint8_t>(held[j])[0];
      check_signed(held[j], own);
    }
    held.erase(held.begin() + static_cast<long>(drop));
  }
}

uintptr_t page_of(int64_t bytes) {
  return reinterpret_cast<uintptr_t>(block(bytes).const_data_ptr()) >> 16;
}

// Bytes of address space, in megabytes.
int64_t mapped() {
  long pages = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  if (file == nullptr || std::fscanf(file, "%ld", &pages) != 1) fail("the system does not say how much memory is used");
  std::fclose(file);
  return pages * sysconf(_SC_PAGESIZE) / kMega;
}

}  // namespace

void check_store() {
  for (int64_t bytes : kSizes) {
    if (bytes < kLarge) continue;
    const uintptr_t page = page_of(bytes);
    if (page_of(bytes) != page) fail("a block of %d bytes does not serve again", static_cast<int>(bytes));
    const auto small = page_of(bytes / 3);
    if (small == page) fail("a block of %d bytes serves what is much smaller", static_cast<int>(bytes));
    if (reinterpret_cast<uintptr_t>(block(bytes).const_data_ptr()) % 64 != 0) fail("a block starts within a line");
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(exchange, i);
  for (std::thread& thread : threads) thread.join();
  const int64_t before = mapped();
  {
    std::vector<Tensor> held;
    for (int i = 0; i < 6; ++i) held.push_back(block(60 * kMega));  // nobody touches them
  }
  const int64_t kept = mapped() - before;
  if (kept > 256) fail("%d megabytes lie idle", static_cast<int>(kept));
  page_of(300 * kMega);
  if (mapped() - before > kept) fail("a block lies idle that is larger than all that may");
  if (page_of(60 * kMega) != page_of(60 * kMega)) fail("the youngest block was dropped");
}

}  // namespace fused_resnet
