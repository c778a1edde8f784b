// The GPU of cuda/hopper.h on a CPU, on the fibers of host_block.h: a cluster runs as one block whose threads share
// memory. Copies land, and stores read, at a moment that chance takes between their start and the wait for them;
// products read their operands when they are started or as late as a wait allows. So a missing wait, a phase taken
// for another and a stage that is released too early show. A barrier that is never reached ends the run.
#pragma once

#include <string>
#include <utility>

#include "common/conv_sm90.h"
#include "testing/host_block.h"

#define FR_GRID_CONSTANT const
#define FR_MEMBER inline

namespace fused_resnet {

// What the hardware makes of a tensor map.
struct TensorMap {
  TensorPlan plan;
  char* memory;
};

struct Barrier {
  int16_t arrivals, left;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(Barrier) == 8);

namespace host {

constexpr uint32_t kSharedStart = 384;  // the block's first address: not where a swizzle begins

struct Product {
  float* sums;
  int filters;
  uint64_t patches, weights;
  bool add;
  float (*element)(const char*);
};

// What is under way in a cluster.
class Cluster {
 public:
  int blocks = 1;
  size_t bytes = 0;  // of a block's shared memory
  std::string fault;

  struct Thread {
    std::deque<std::vector<Product>> groups;
    std::vector<Product> open;
    std::vector<std::function<void()>> stores;
    bool unfenced = false;
  };

  void start(int count, size_t shared_bytes, unsigned seed) {
    blocks = count, bytes = shared_bytes, fault.clear(), idle = 0;
    copies.clear();
    late.clear();
    threads.assign(count * kSm90Threads, {});
    met.assign(count * kGroups, {});
    random.seed(seed);
  }

  Thread& thread() { return threads[Block::now().current]; }
  Thread& thread(int block, int at) { return threads[block * kSm90Threads + at]; }
  bool chance(unsigned of) { return random() % of == 0; }
  // One copy of sixteen is late: it lands when all else waits.
  void copy(std::function<void()> run) { (chance(16) ? late : copies).push_back(std::move(run)); }
  void progress() { idle = 0; }
  bool done() const { return copies.empty() && late.empty(); }

  // Lets others go on; some copy may land.
  void yield() {
    if (++idle > 4'000'000) fail("a wait without end");
    auto& some = !copies.empty() ? copies : late;
    if (!some.empty() && (&some == &copies ? chance(8) : idle > 8192)) {
      std::swap(some[random() % some.size()], some.back());
      const auto run = std::move(some.back());
      some.pop_back();
      run();
      progress();
    }
    Block::now().wait(State::ready);
    if (!fault.empty()) stop();
  }

  void fail(const std::string& why) {
    if (fault.empty()) fault = why;
    stop();
  }

  // How many threads of a group have come to its barrier, and how often all have.
  struct Meeting {
    int here = 0, times = 0;
  };
  std::vector<Meeting> met;

  static Cluster& now() {
    static Cluster cluster;
    return cluster;
  }

 private:
  std::vector<Thread> threads;
  std::vector<std::function<void()>> copies, late;
  std::mt19937 random;
  int64_t idle = 0;

  // Waits for what never comes, so that the scheduler ends the run.
  [[noreturn]] void stop() {
    while (true) Block::now().wait(Block::now().current % 2 == 0 ? State::at_warp : State::at_block);
  }
};

inline int rank_of_thread() {
  return Block::now().current / kSm90Threads;
}
inline char* shared_of(int rank) {
  return Block::now().shared + rank * Cluster::now().bytes;
}
inline char* at_address(int rank, uint32_t address) {
  return shared_of(rank) + (address - kSharedStart);
}
inline uint32_t address_of(int rank, const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - shared_of(rank)) + kSharedStart;
}
// Bits 4-6 of an address are mixed with bits 7-9.
inline uint32_t mixed(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

inline void settle(Barrier& barrier) {
  if (barrier.left < 0) Cluster::now().fail("more arrivals than a barrier counts");
  if (barrier.left != 0 || barrier.bytes != 0) return;
  barrier.left = barrier.arrivals;
  barrier.phase ^= 1;
  Cluster::now().progress();
}

// Element [n, h, w, c] or [k, cell, c] or [pixel, k] of a map, null outside.
inline char* element_at(const TensorMap& map, const int64_t (&at)[4]) {
  int64_t offset = at[0] * 2;
  for (int d = 0; d < map.plan.rank; ++d) {
    if (at[d] < 0 || at[d] >= static_cast<int64_t>(map.plan.sizes[d])) return nullptr;
    if (d > 0) offset += at[d] * static_cast<int64_t>(map.plan.strides[d - 1]);
  }
  return map.memory + offset;
}

inline void put_row(const TensorMap& map, const int64_t (&row)[4], int rank, uint32_t address) {
  for (uint32_t c = 0; c < map.plan.box[0]; ++c) {
    const int64_t at[4] = {row[0] + c, row[1], row[2], row[3]};
    const char* from = element_at(map, at);
    char* to = at_address(rank, mixed(address + 2 * c));
    if (from == nullptr) {
      memset(to, 0, 2);
    } else {
      memcpy(to, from, 2);
    }
  }
}

// Pixels of im2col mode: w, then h, then n go on by their steps within the box of corners.
inline void put_patches(const TensorMap& map, int rank, uint32_t address, int64_t c, int64_t w, int64_t h, int64_t n,
                        int right, int down) {
  const TensorPlan& p = map.plan;
  for (uint32_t i = 0; i < p.box[1]; ++i, address += 2 * p.box[0]) {
    put_row(map, {c, w + right, h + down, n}, rank, address);
    w += p.steps[1];
    if (w < static_cast<int64_t>(p.sizes[1]) + p.upper[0]) continue;
    w = p.lower[0];
    h += p.steps[2];
    if (h < static_cast<int64_t>(p.sizes[2]) + p.upper[1]) continue;
    h = p.lower[1];
    ++n;
  }
}

inline void put_box(const TensorMap& map, int rank, uint32_t address, const int64_t (&first)[4]) {
  const TensorPlan& p = map.plan;
  const int64_t rows = p.rank == 3 ? p.box[1] * p.box[2] : p.box[1];
  for (int64_t i = 0; i < rows; ++i, address += 2 * p.box[0]) {
    put_row(map, {first[0], first[1] + i % p.box[1], first[2] + i / p.box[1], 0}, rank, address);
  }
}

inline void land(Barrier* barrier, int64_t bytes) {
  barrier->bytes -= static_cast<int32_t>(bytes);
  settle(*barrier);
}

inline int64_t box_bytes(const TensorMap& map) {
  const TensorPlan& p = map.plan;
  return int64_t{2} * p.box[0] * p.box[1] * (p.rank == 3 ? p.box[2] : 1);
}

// One operand element of row `row`, element `d` of the depth, from a descriptor of rows of 128 bytes.
inline const char* operand(uint64_t descriptor, int row, int d) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto eight = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) Cluster::now().fail("a descriptor without the swizzle of 128 bytes");
  return at_address(rank_of_thread(), mixed(start + row / 8 * eight + row % 8 * 128 + 2 * d));
}

// This thread's part of 64 x filters sums.
inline void multiply(const Product& p) {
  const int thread = Block::now().current % kGroupThreads, warp = thread / 32, lane = thread % 32;
  for (int i = 0; i < p.filters / 2; ++i) {
    const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, filter = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = p.add ? p.sums[i] : 0.f;
    for (int d = 0; d < 16; ++d) {
      sum += p.element(operand(p.patches, row, d)) * p.element(operand(p.weights, filter, d));
    }
    p.sums[i] = sum;
  }
}

inline void multiply_oldest(Cluster::Thread& thread) {
  for (const Product& product : thread.groups.front()) multiply(product);
  thread.groups.pop_front();
}

template <class T>
float element(const char* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return widen(value);
}

}  // namespace host

FR_DEVICE int block_thread() {
  return thread_index() % kSm90Threads;
}
FR_DEVICE int cluster_rank() {
  return host::rank_of_thread();
}
template <int CLUSTER>
FR_DEVICE int cluster_index() {
  return static_cast<int>(host::Block::now().index);
}
template <int CLUSTER>
FR_DEVICE int grid_clusters() {
  return static_cast<int>(host::Block::now().blocks);
}
FR_DEVICE char* block_memory() {
  return host::shared_of(cluster_rank());
}
FR_DEVICE uint32_t shared_address(const void* pointer) {
  return host::address_of(cluster_rank(), pointer);
}

template <int CLUSTER>
FR_DEVICE void sync_cluster() {
  sync_block();
}

FR_DEVICE void sync_group(int group) {
  host::Cluster& cluster = host::Cluster::now();
  auto& meeting = cluster.met[cluster_rank() * kGroups + group];
  const int times = meeting.times;
  if (++meeting.here == kGroupThreads) {
    meeting = {0, times + 1};
    cluster.progress();
    return;
  }
  while (meeting.times == times) cluster.yield();
}

template <int COUNT>
FR_DEVICE void give_registers() {}
template <int COUNT>
FR_DEVICE void take_registers() {}

FR_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  const auto count = static_cast<int16_t>(arrivals);
  *barrier = {count, count, 0, 0};
}
FR_DEVICE void publish_barriers() {}

template <int CLUSTER>
FR_DEVICE void barrier_arrive(Barrier* barrier, int rank) {
  const int target = CLUSTER == 1 ? cluster_rank() : rank;
  auto* at = reinterpret_cast<Barrier*>(host::at_address(target, shared_address(barrier)));
  --at->left;
  host::settle(*at);
}

FR_DEVICE void barrier_expect(Barrier* barrier, int bytes) {
  barrier->bytes += bytes;
  --barrier->left;
  host::settle(*barrier);
}

FR_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  while (barrier->phase == static_cast<uint32_t>(parity)) host::Cluster::now().yield();
}

FR_DEVICE void prefetch_map(const TensorMap&) {}

FR_DEVICE void load_patches(char* to, const TensorMap& map, Barrier* barrier, int c, int w, int h, int n, int right,
                            int down) {
  const int rank = cluster_rank();
  const uint32_t address = shared_address(to);
  host::Cluster::now().copy([=, &map] {
    host::put_patches(map, rank, address, c, w, h, n, right, down);
    host::land(barrier, host::box_bytes(map));
  });
}

template <int CLUSTER>
FR_DEVICE void load_weights(char* to, const TensorMap& map, Barrier* barrier, int c, int cell, int filter) {
  const uint32_t address = shared_address(to), at = shared_address(barrier);
  for (int i = 0; i < CLUSTER; ++i) {
    const int rank = CLUSTER == 1 ? cluster_rank() : i;
    host::Cluster::now().copy([=, &map] {
      host::put_box(map, rank, address, {c, cell, filter, 0});
      host::land(reinterpret_cast<Barrier*>(host::at_address(rank, at)), host::box_bytes(map));
    });
  }
}

FR_DEVICE void load_panel(char* to, const TensorMap& map, Barrier* barrier, int k, int pixel) {
  const int rank = cluster_rank();
  const uint32_t address = shared_address(to);
  host::Cluster::now().copy([=, &map] {
    host::put_box(map, rank, address, {k, pixel, 0, 0});
    host::land(barrier, host::box_bytes(map));
  });
}

FR_DEVICE void store_panel(const char* from, const TensorMap& map, int k, int pixel) {
  host::Cluster& cluster = host::Cluster::now();
  const int rank = cluster_rank(), first = block_thread() / kGroupThreads * kGroupThreads;
  for (int i = 0; i < kGroupThreads; ++i) {
    if (cluster.thread(rank, first + i).unfenced) cluster.fail("a copy of what no fence has made known to copies");
  }
  const uint32_t address = shared_address(from);
  cluster.thread().stores.push_back([=, &map] {
    for (uint32_t row = 0; row < map.plan.box[1]; ++row) {
      for (uint32_t c = 0; c < map.plan.box[0]; ++c) {
        const int64_t at[4] = {k + int64_t{c}, pixel + int64_t{row}, 0, 0};
        if (char* to = host::element_at(map, at)) {
          memcpy(to, host::at_address(rank, host::mixed(address + row * 2 * map.plan.box[0] + 2 * c)), 2);
        }
      }
    }
  });
}

FR_DEVICE void commit_stores() {}
FR_DEVICE void wait_stores() {
  for (const auto& store : host::Cluster::now().thread().stores) store();
  host::Cluster::now().thread().stores.clear();
}

FR_DEVICE uint32_t load_shared(const char* from) {
  uint32_t value;
  memcpy(&value, from, sizeof value);
  return value;
}
FR_DEVICE void store_shared(char* to, uint32_t value) {
  memcpy(to, &value, sizeof value);
  host::Cluster::now().thread().unfenced = true;
}
FR_DEVICE void fence_copies() {
  host::Cluster::now().thread().unfenced = false;
}

template <class T, size_t N>
FR_DEVICE void start_product(float (&sums)[N], uint64_t patches, uint64_t weights, bool add, T) {
  host::Cluster::now().thread().open.push_back(
      {sums, 2 * static_cast<int>(N), patches, weights, add, &host::element<T>});
}
FR_DEVICE void begin_products() {}
FR_DEVICE void commit_products() {
  host::Cluster::Thread& thread = host::Cluster::now().thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
  if (host::Cluster::now().chance(2)) {
    while (!thread.groups.empty()) host::multiply_oldest(thread);
  }
}
template <int PENDING>
FR_DEVICE void wait_products() {
  host::Cluster::Thread& thread = host::Cluster::now().thread();
  while (thread.groups.size() > PENDING) host::multiply_oldest(thread);
  sync_warp();  // one instruction of all threads of the warp, unlike of all its warps
}
template <size_t M, size_t N>
FR_DEVICE void hold(float (&)[M][N]) {}

}  // namespace fused_resnet
