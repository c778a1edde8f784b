// The GPU of cuda/device.h on a CPU: a block is a set of fibers that run one at a time and change places where they
// wait for each other, a warp's exchange goes through memory. Between barriers the fibers run in a shuffled order, so
// that a missing barrier shows; copies to shared memory happen as late as the waits allow, so that a missing wait
// shows; and shared memory starts full of NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/elements.h"

#define FR_KERNEL(threads) inline void
#define FR_WIDE_KERNEL(threads, blocks) inline void
#define FR_DEVICE static inline

namespace fused_resnet {

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

namespace host {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

enum class State { ready, at_block, at_warp, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  std::deque<std::vector<Copy>> groups;  // committed, the oldest first
  std::vector<Copy> open;
};

struct Exchange {
  const void* rows[kWarp];
  uint32_t a[kWarp][4], b[kWarp][2];
};

class Block {
 public:
  int64_t index = 0, blocks = 0;
  int threads = 0, current = 0;
  std::vector<char> memory;
  char* shared = nullptr;
  std::vector<Exchange> exchange;

  // Runs one block of a kernel; throws where its threads wait for each other for ever.
  void run(const std::function<void()>& kernel, int64_t at, int64_t grid, int count, size_t bytes,
           std::mt19937& random) {
    index = at, blocks = grid, threads = count;
    memory.assign(bytes + 128, static_cast<char>(0xff));
    shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
    favoured = 0;
    exchange.assign((count + kWarp - 1) / kWarp, {});
    body = &kernel;
    fibers.resize(count);
    std::vector<int> order(count);
    for (int i = 0; i < count; ++i) {
      order[i] = i;
      start(fibers[i]);
    }
    while (step(order, random)) {
    }
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  }

  void wait(State state) {
    Fiber& self = fibers[current];
    self.state = state;
    swapcontext(&self.context, &scheduler);
  }

  Fiber& fiber() { return fibers[current]; }

  static Block& now() {
    static Block block;
    return block;
  }

 private:
  std::vector<Fiber> fibers;
  int favoured = 0;
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
  std::exception_ptr failure;

  static void enter() {
    Block& block = now();
    try {
      (*block.body)();
    } catch (...) {
      block.failure = std::current_exception();
    }
    block.fibers[block.current].state = State::done;
    swapcontext(&block.fibers[block.current].context, &block.scheduler);
  }

  void start(Fiber& fiber) {
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    fiber.state = State::ready;
    fiber.groups.clear();
    fiber.open.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  // Runs the favoured warp, or where it waits for the others every warp; then opens the barriers that all have reached.
  // One warp runs ahead as far as it can, because in step with the others it would not miss a barrier. False when all
  // are done.
  bool step(std::vector<int>& order, std::mt19937& random) {
    std::shuffle(order.begin(), order.end(), random);
    if (random() % 64 == 0) favoured = static_cast<int>(random() % exchange.size());
    const bool ran = run_ready(order, favoured) || run_ready(order, -1);
    bool opened = false;
    for (int first = 0; first < threads; first += kWarp) {
      opened |= open(State::at_warp, first, std::min(first + kWarp, threads));
    }
    if (!opened) opened = open(State::at_block, 0, threads);
    const bool done = std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::done; });
    if (!ran && !opened && !done)
      throw std::runtime_error("threads of a block wait for each other at different places");
    return !done;
  }

  // Runs the fibers of one warp, or of all for -1, that can go on; false where there was none.
  bool run_ready(const std::vector<int>& order, int warp) {
    bool any = false;
    for (int i : order) {
      if (fibers[i].state != State::ready || (warp >= 0 && i / kWarp != warp)) continue;
      any = true;
      current = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
    return any;
  }

  bool open(State state, int first, int last) {
    for (int i = first; i < last; ++i) {
      if (fibers[i].state != state) return false;
    }
    for (int i = first; i < last; ++i) fibers[i].state = State::ready;
    return true;
  }
};

inline void finish(std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.valid) {
      memcpy(copy.to, copy.from, copy.bytes);
    } else {
      memset(copy.to, 0, copy.bytes);
    }
  }
  group.clear();
}

// Runs a kernel on a grid of blocks, one after the other, in a shuffled order.
inline void launch(int64_t blocks, int threads, size_t shared_bytes, unsigned seed,
                   const std::function<void()>& kernel) {
  std::mt19937 random(seed);
  std::vector<int64_t> order(blocks);
  for (int64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (int64_t i : order) Block::now().run(kernel, i, blocks, threads, shared_bytes, random);
}

}  // namespace host

FR_DEVICE int thread_index() {
  return host::Block::now().current;
}
FR_DEVICE int block_threads() {
  return host::Block::now().threads;
}
FR_DEVICE int64_t block_index() {
  return host::Block::now().index;
}
FR_DEVICE int64_t grid_blocks() {
  return host::Block::now().blocks;
}
FR_DEVICE char* shared_memory() {
  return host::Block::now().shared;
}
FR_DEVICE float inverse_root(float x) {
  return 1 / std::sqrt(x);
}
FR_DEVICE double inverse_root(double x) {
  return 1 / std::sqrt(x);
}
FR_DEVICE void sync_block() {
  host::Block::now().wait(host::State::at_block);
}
FR_DEVICE void sync_warp() {
  host::Block::now().wait(host::State::at_warp);
}
FR_DEVICE host::Exchange& warp_exchange() {
  return host::Block::now().exchange[thread_index() / host::kWarp];
}

template <int BYTES>
FR_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const auto start = reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0);
  if (start % BYTES != 0) throw std::runtime_error("a copy does not start at a multiple of its size");
  host::Block::now().fiber().open.push_back({shared, global, BYTES, valid});
}

FR_DEVICE void commit_copies() {
  host::Fiber& fiber = host::Block::now().fiber();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int PENDING>
FR_DEVICE void wait_copies() {
  host::Fiber& fiber = host::Block::now().fiber();
  for (; fiber.groups.size() > PENDING; fiber.groups.pop_front()) host::finish(fiber.groups.front());
}

FR_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  host::Exchange& warp = warp_exchange();
  const int lane = thread_index() % host::kWarp;
  warp.rows[lane] = row;
  sync_warp();
  for (int i = 0; i < 4; ++i) {
    memcpy(&out[i], static_cast<const char*>(warp.rows[8 * i + lane / 4]) + 4 * (lane % 4), 4);
  }
  sync_warp();
}

// Element `half` of a register as a float.
template <class T>
FR_DEVICE float half_of(uint32_t word, int half) {
  T element;
  element.bits = static_cast<uint16_t>(word >> (16 * half));
  return widen(element);
}

template <class T>
FR_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  host::Exchange& warp = warp_exchange();
  const int lane = thread_index() % host::kWarp;
  memcpy(warp.a[lane], a, sizeof a);
  warp.b[lane][0] = b0;
  warp.b[lane][1] = b1;
  sync_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      // Registers of a: rows 0-7 and 8-15 of columns 0-7, then the same of columns 8-15; of b: rows 0-7, rows 8-15.
      const uint32_t left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
      const uint32_t right = warp.b[column * 4 + k % 8 / 2][k / 8];
      c[i] += half_of<T>(left, k % 2) * half_of<T>(right, k % 2);
    }
  }
  sync_warp();
}

}  // namespace fused_resnet
