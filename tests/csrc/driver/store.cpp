// The memory that serves again and that of packed weights: several threads take and give blocks of sizes around the
// store's limits.
#include <unistd.h>

#include <algorithm>

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

constexpr int64_t kPacks[] = {1,         (64 << 10) - 1, 64 << 10,  (64 << 10) + 1, 100 << 10,     kMega + 63,
                              2 * kMega, 3 * kMega + 64, 7 * kMega, 8 * kMega - 64, 8 * kMega + 1, 17 * kMega};

Tensor block(int64_t bytes) {
  return make_image({{1, 1, 1, bytes}, ScalarType::Byte}, Tensor({1}, ScalarType::Byte, false));
}

Tensor pack(int64_t bytes) {
  return make_pack(bytes, Tensor({1}, ScalarType::Byte, false));
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

template <size_t COUNT>
void exchange(int first, Tensor make(int64_t), const int64_t (&sizes)[COUNT]) {
  std::vector<Tensor> held;
  for (int i = 0; i < 60; ++i) {
    const auto name = static_cast<uint8_t>(first + 3 * i);
    held.push_back(make(sizes[static_cast<size_t>(first + 5 * i) % COUNT]));
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

// Neighbours at every place that a block may start at, which fill their pages but for what a block has besides.
void check_neighbours() {
  std::vector<Tensor> held;
  for (int i = 0; i < 48; ++i) {
    held.push_back(block((512 << 10) - kInFront + 192 * (i % 16)));
    sign(held.back(), static_cast<uint8_t>(i));
  }
  for (int i = 0; i < 48; ++i) check_signed(held[static_cast<size_t>(i)], static_cast<uint8_t>(i));
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

// The youngest blocks lie idle, 256 megabytes at most.
void check_idle() {
  const int64_t before = mapped();
  std::vector<uintptr_t> pages;
  const auto take = [&](size_t count) {
    std::vector<Tensor> held;
    pages.clear();
    for (size_t i = 0; i < count; ++i) {
      held.push_back(block(60 * kMega));  // nobody touches them
      pages.push_back(reinterpret_cast<uintptr_t>(held.back().const_data_ptr()) >> 16);
    }
    for (Tensor& t : held) t = Tensor();  // the last is the youngest
  };
  take(6);
  const std::vector<uintptr_t> all = pages;
  const int64_t kept = mapped() - before;
  if (kept > 256) fail("%d megabytes lie idle", static_cast<int>(kept));
  take(4);
  for (uintptr_t page : pages) {
    if (std::find(all.begin() + 2, all.end(), page) == all.end()) fail("the youngest blocks do not serve first");
  }
  for (int i = 0; i < 5; ++i) page_of(60 * kMega);
  page_of(300 * kMega);
  const int64_t changed = mapped() - before - kept;
  if (changed > 1 || changed < -1)
    fail("of what may lie idle, %d megabytes have come or gone", static_cast<int>(changed));
}

// Shelves of weights go with the last one that lies there, but for the one where the next will lie: it may have grown.
void check_shelves() {
  const auto fill = [](int64_t bytes) {
    std::vector<Tensor> held;
    for (int i = 0; i < 40; ++i) {
      held.push_back(pack(bytes));
      sign(held.back(), static_cast<uint8_t>(i));
      const auto at = reinterpret_cast<uintptr_t>(held.back().const_data_ptr());
      if (bytes >= kLarge && at % 64 != 0) fail("a weight starts within a line");
    }
    for (int i = 0; i < 40; ++i) check_signed(held[static_cast<size_t>(i)], static_cast<uint8_t>(i));
    std::swap(held[3], held[30]);
  };
  fill(kMega);
  const int64_t before = mapped();
  for (int64_t bytes : kPacks) fill(bytes);
  fill(kMega);
  const int64_t kept = mapped() - before;
  if (kept > 16) fail("%d megabytes of weights that are gone", static_cast<int>(kept));
  const uintptr_t first = reinterpret_cast<uintptr_t>(pack(kMega).const_data_ptr());
  if (reinterpret_cast<uintptr_t>(pack(kMega).const_data_ptr()) != first) fail("an empty shelf is not filled anew");
}

}  // namespace

void check_store() {
  for (int64_t bytes : kSizes) {
    if (bytes < kLarge) continue;
    const uintptr_t page = page_of(bytes);
    if (page_of(bytes) != page) fail("a block of %d bytes does not serve again", static_cast<int>(bytes));
    if (reinterpret_cast<uintptr_t>(block(bytes).const_data_ptr()) % 64 != 0) fail("a block starts within a line");
  }
  const uintptr_t large = page_of(40 * kMega);  // there is none but this
  if (page_of(20 * kMega) == large) fail("a block serves what is much smaller");
  if (page_of(34 * kMega) != large) fail("a block does not serve what is little smaller");
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([i] {
      exchange(i, block, kSizes);
      exchange(i, pack, kPacks);
    });
  }
  for (std::thread& thread : threads) thread.join();
  check_neighbours();
  check_idle();
  check_shelves();
}

}  // namespace fused_resnet
