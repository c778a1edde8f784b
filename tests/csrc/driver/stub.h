// As much of libtorch's stable ABI as the drivers' sources in csrc/cpu ask for, so that they run under sanitizers and
// on other processors: every tensor is an allocation of exactly its size, threads are std::thread, operators are found
// by their names.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <any>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace torch::headeronly {
enum class ScalarType { Byte, Char, Long, Float, Double, BFloat16, Half };
enum class MemoryFormat { ChannelsLast };
}  // namespace torch::headeronly

namespace torch::stable {

using headeronly::ScalarType;

inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
    case ScalarType::Char:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
      return 4;
    default:
      return 8;
  }
}

class Tensor {
 public:
  Tensor() = default;
  // `offset` elements lie in front of the first, so that it is aligned as an element and no better.
  Tensor(std::vector<int64_t> sizes, ScalarType type, bool channels_last, int64_t offset = 0)
      : sizes_(std::move(sizes)), strides_(sizes_.size()), type_(type), offset_(offset * bytes_of(type)) {
    lay(channels_last);
    const auto bytes = static_cast<size_t>(numel_ * bytes_of(type) + offset_);
    memory_ = allocate(bytes);
    memset(memory_.get(), 0xff, bytes);  // NaN
  }

  // Over memory that `release` takes back.
  Tensor(std::vector<int64_t> sizes, ScalarType type, bool channels_last, void* data, void (*release)(void*))
      : sizes_(std::move(sizes)), strides_(sizes_.size()), type_(type) {
    lay(channels_last);
    const auto bytes = static_cast<size_t>(numel_ * bytes_of(type));
    if (bytes <= kFilled) memset(data, 0xff, bytes);
    guard(data, bytes, true);
    memory_ = std::shared_ptr<void>(data, [=](void* p) {
      guard(p, bytes, false);
      release(p);
    });
  }

  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t numel() const { return numel_; }
  int64_t size(int64_t d) const { return sizes_[static_cast<size_t>(d)]; }
  int64_t stride(int64_t d) const { return strides_[static_cast<size_t>(d)]; }
  bool is_contiguous() const { return dense_; }
  bool is_cpu() const { return true; }
  bool is_cuda() const { return false; }
  int get_device_index() const { return 0; }
  int device() const { return 0; }
  ScalarType scalar_type() const { return type_; }
  const void* const_data_ptr() const { return mutable_data_ptr(); }
  void* mutable_data_ptr() const { return static_cast<char*>(memory_.get()) + offset_; }

 private:
  static constexpr size_t kFilled = size_t{8} << 20;

  void lay(bool channels_last) {
    const size_t d = sizes_.size();
    std::vector<size_t> order(d);
    for (size_t i = 0; i < d; ++i) order[i] = d - 1 - i;
    if (channels_last) order = {1, 3, 2, 0};
    for (size_t i : order) {
      strides_[i] = numel_;
      numel_ *= sizes_[i];
    }
    dense_ = !channels_last;
  }

#if defined(__SANITIZE_ADDRESS__)
  // Nobody may touch what lies just behind memory that is not ours.
  static void guard(void* data, size_t bytes, bool closed) {
    constexpr size_t kBehind = 64;
    char* end = static_cast<char*>(data) + bytes;
    closed ? __asan_poison_memory_region(end, kBehind) : __asan_unpoison_memory_region(end, kBehind);
  }

  static std::shared_ptr<void> allocate(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
    return std::shared_ptr<void>(memory, std::free);
  }
#else
  static void guard(void*, size_t, bool) {}

  // Up to 15 bytes in front of a page that nobody may touch
  static std::shared_ptr<void> allocate(size_t bytes) {
    constexpr size_t kPage = 65536;  // a multiple of every processor's
    const size_t used = (bytes + 15) / 16 * 16, all = (used + kPage - 1) / kPage * kPage;
    void* pages = mmap(nullptr, all + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(static_cast<char*>(pages) + all, kPage, PROT_NONE) != 0) std::abort();
    return std::shared_ptr<void>(static_cast<char*>(pages) + all - used, [=](void*) { munmap(pages, all + kPage); });
  }
#endif

  std::vector<int64_t> sizes_, strides_;
  ScalarType type_ = ScalarType::Byte;
  int64_t offset_ = 0, numel_ = 1;
  bool dense_ = true;
  std::shared_ptr<void> memory_;
};

inline Tensor contiguous(const Tensor& t) {
  return t;
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, std::nullopt_t, int, std::nullopt_t,
                    std::optional<headeronly::MemoryFormat> format) {
  return Tensor(sizes, type, format.has_value());
}

struct IntRef {
  const int64_t* data;
  size_t size;
};

// Strides of four sizes are taken for those of channels_last memory.
inline Tensor from_blob(void* data, IntRef sizes, IntRef, int, ScalarType type, void (*release)(void*)) {
  return Tensor(std::vector<int64_t>(sizes.data, sizes.data + sizes.size), type, sizes.size == 4, data, release);
}

inline int64_t threads = 1;

inline int64_t get_num_threads() {
  return threads;
}

template <class F>
void parallel_for(int64_t first, int64_t last, int64_t, const F& f) {
  const int64_t count = last - first, parts = std::min(threads, count);
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < parts; ++i)
    pool.emplace_back([&, i] { f(first + count * i / parts, first + count * (i + 1) / parts); });
  if (parts > 0) f(first, first + count / parts);
  for (std::thread& thread : pool) thread.join();
}

inline std::map<std::string, std::any>& operators() {
  static std::map<std::string, std::any> known;
  return known;
}

struct Library {
  template <class F>
  void impl(const char* name, F* function) {
    operators()[name] = function;
  }
};

// Of a function's type.
template <class F>
F* find_operator(const char* name) {
  return std::any_cast<F*>(operators().at(name));
}

}  // namespace torch::stable

#define STD_TORCH_CHECK(condition, ...)   \
  if (!(condition)) {                     \
    std::ostringstream text;              \
    stub_write(text, __VA_ARGS__);        \
    throw std::runtime_error(text.str()); \
  }
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m)                       \
  static void register_##name##_##key(torch::stable::Library& m);     \
  [[maybe_unused]] static const bool registered_##name##_##key = [] { \
    torch::stable::Library own;                                       \
    register_##name##_##key(own);                                     \
    return true;                                                      \
  }();                                                                \
  static void register_##name##_##key([[maybe_unused]] torch::stable::Library& m)
#define TORCH_BOX(function) function

template <class... Args>
void stub_write(std::ostringstream& text, const Args&... args) {
  (text << ... << args);
}
