#include "cpu/memory.h"

#include <sys/mman.h>

#include <atomic>
#include <mutex>
#include <new>

namespace fused_resnet {
namespace {

constexpr size_t kKept = size_t{256} << 20;  // bytes that may lie idle
constexpr size_t kUnit = 64 << 10, kHuge = size_t{2} << 20;
constexpr size_t kColours = 16, kColour = 192;  // blocks start at different lines of the caches' sets
constexpr int64_t kPack = 64 << 10;             // bytes of packed weights; PyTorch keeps what is smaller

// Pages aligned to `unit`, huge ones where the system has them.
void* pages(size_t size, size_t unit) {
  void* all = mmap(nullptr, size + unit, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  const auto start = reinterpret_cast<uintptr_t>(all), own = (start + unit - 1) / unit * unit;
  if (own > start) munmap(all, own - start);
  munmap(reinterpret_cast<void*>(own + size), start + unit - own);
  auto* found = reinterpret_cast<void*>(own);
#if defined(MADV_HUGEPAGE)
  if (unit == kHuge) madvise(found, size, MADV_HUGEPAGE);
#endif
  return found;
}

// Stands at the start of its pages; the data follows, at the block's colour.
struct Block {
  Block* next;
  size_t bytes;  // pages in all
};

class Store {
 public:
  void* take(size_t bytes) {
    const size_t needed = bytes + sizeof(Block) + kColour * kColours, unit = needed < kHuge ? kUnit : kHuge;
    const size_t size = (needed + unit - 1) / unit * unit;
    Block* block = find(size);
    if (block == nullptr) block = fresh(size, unit);
    if (block == nullptr) return nullptr;
    const size_t colour = turn_++ % kColours;
    return reinterpret_cast<char*>(block) + 64 + colour * kColour;
  }

  // Never waits: a child process may have been forked while another thread was in here.
  void give(void* data) {
    auto* block = reinterpret_cast<Block*>(reinterpret_cast<uintptr_t>(data) / kUnit * kUnit);
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || block->bytes > kKept) return drop(block);
    block->next = first_;
    first_ = block;
    idle_ += block->bytes;
    while (idle_ > kKept) {  // the last one has been idle for longest
      Block** at = &first_;
      while ((*at)->next != nullptr) at = &(*at)->next;
      Block* oldest = *at;
      *at = nullptr;
      idle_ -= oldest->bytes;
      drop(oldest);
    }
  }

 private:
  Block* find(size_t size) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return nullptr;
    Block** best = nullptr;
    for (Block** at = &first_; *at != nullptr; at = &(*at)->next) {
      const size_t own = (*at)->bytes;
      if (own >= size && own <= size + size / 4 && (best == nullptr || own < (*best)->bytes)) best = at;
    }
    if (best == nullptr) return nullptr;
    Block* block = *best;
    *best = block->next;
    idle_ -= block->bytes;
    return block;
  }

  static Block* fresh(size_t size, size_t unit) {
    auto* block = static_cast<Block*>(pages(size, unit));
    if (block != nullptr) block->bytes = size;
    return block;
  }

  static void drop(Block* block) { munmap(block, block->bytes); }

  std::mutex mutex_;
  Block* first_ = nullptr;
  size_t idle_ = 0;
  std::atomic<size_t> turn_{0};
};

// Packed weights, side by side on shelves of huge pages, each of which goes when the last one on it does.
class Shelves {
 public:
  void* take(size_t bytes) {
    const size_t needed = kLine + (bytes + kLine - 1) / kLine * kLine + kLine;
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);  // never waits, as above
    if (!lock.owns_lock()) return nullptr;
    if (last_ != nullptr && last_->users == 1) last_->used = sizeof(Shelf);
    if (last_ == nullptr || last_->bytes - last_->used < needed) {
      const size_t size = (sizeof(Shelf) + needed + kShelf - 1) / kShelf * kShelf;
      void* room = pages(size, kHuge);
      if (room == nullptr) return nullptr;
      if (last_ != nullptr) leave(last_);
      last_ = new (room) Shelf{size};
    }
    auto* place = reinterpret_cast<char*>(last_) + last_->used;
    last_->used += needed;
    ++last_->users;
    *reinterpret_cast<Shelf**>(place) = last_;
    return place + kLine;
  }

  void give(void* data) { leave(*reinterpret_cast<Shelf**>(static_cast<char*>(data) - kLine)); }

 private:
  static constexpr size_t kLine = 64, kShelf = 4 * kHuge;

  // Stands at the start of its pages. On the line before each weight is its address, on that behind it nothing: there
  // sanitizers see who reads too far.
  struct alignas(kLine) Shelf {
    size_t bytes, used = sizeof(Shelf);
    std::atomic<size_t> users{1};  // weights, and whoever puts more here
  };

  static void leave(Shelf* shelf) {
    if (--shelf->users == 0) munmap(shelf, shelf->bytes);
  }

  std::mutex mutex_;
  Shelf* last_ = nullptr;
};

Store& store() {
  static Store* only = new Store;  // outlives every tensor
  return *only;
}

Shelves& shelves() {
  static Shelves* only = new Shelves;
  return *only;
}

}  // namespace

Tensor make_pack(int64_t bytes, const Tensor& like) {
  void* data = bytes < kPack ? nullptr : shelves().take(static_cast<size_t>(bytes));
  if (data == nullptr) return make({bytes}, ScalarType::Byte, like);
  const int64_t stride = 1;
  return torch::stable::from_blob(data, {&bytes, 1}, {&stride, 1}, like.device(), ScalarType::Byte,
                                  [](void* p) { shelves().give(p); });
}

Tensor make_image(const Image& image, const Tensor& like) {
  const Sizes& s = image.size;
  const int64_t bytes = s[0] * image.bytes_of_one();
  void* data = bytes < kLarge ? nullptr : store().take(static_cast<size_t>(bytes));
  if (data == nullptr) return make(s, image.dtype, like, true);
  const int64_t strides[] = {s[1] * s[2] * s[3], 1, s[1] * s[3], s[1]};
  return torch::stable::from_blob(data, {s.data(), 4}, {strides, 4}, like.device(), image.dtype,
                                  [](void* p) { store().give(p); });
}

namespace {

Tensor image(const Tensor& x, const Sizes& size) {
  STD_TORCH_CHECK(size.size() == 4 && x.is_cpu(), "an image is of four sizes, and on the CPU");
  for (int64_t one : size) STD_TORCH_CHECK(one >= 0, "a size is ", one);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16 ||
                      x.scalar_type() == ScalarType::Byte,
                  "x must be uint8, fp32 or bf16");
  return make_image({size, x.scalar_type()}, x);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("_image", TORCH_BOX(&fused_resnet::image));
}
