// How a launch is divided between threads, and the room that each has.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "common/checks.h"
#include "cpu/convs.h"

namespace fused_resnet {
namespace {

inline int64_t padded(int64_t size, int64_t step) {
  return ceil_div(size, step) * step;
}

// A thread's room for patches and sums, kept between launches.
inline void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> room;
  thread_local int64_t size = 0;
  if (size < bytes) {
    room.reset();
    size = padded(bytes, 4096);
    room.reset(std::aligned_alloc(64, static_cast<size_t>(size)));
    if (room == nullptr) size = 0;
    STD_TORCH_CHECK(room != nullptr, "not enough memory: ", bytes, " bytes");
  }
  return room.get();
}

// A grid of rows x panels, of which every thread takes a run.
struct Grid {
  int64_t rows, panels;        // in all
  int64_t row_parts, columns;  // parts in each direction

  int64_t size() const { return row_parts * columns; }
  Part operator[](int64_t i) const {
    const int64_t r = i / columns, c = i % columns;
    return {rows * r / row_parts, rows * (r + 1) / row_parts, panels * c / columns, panels * (c + 1) / columns};
  }
};

// Blocks of at most `most` rows; where those would be too few for the threads, or thinner than `least`, panels are
// divided, so that threads share the rows and each reads its own weights.
inline Grid grid_of(int64_t rows, int64_t panels, int64_t most, int64_t least) {
  const int64_t threads = torch::stable::get_num_threads(), blocks = ceil_div(rows, most);
  for (int64_t each : {2, 1}) {  // parts of a thread, at least: two, so that one may be left to others
    const int64_t even = padded(std::max(blocks, each * threads), threads);
    if (rows / even >= least) return {rows, panels, even, 1};
  }
  return {rows, panels, blocks, std::min(panels, ceil_div(threads, blocks))};
}

// Pixels of a part of strips: some rows of the image, so that few are copied for two parts.
inline int64_t strip_rows(const ConvShape& s, int64_t tile) {
  return std::max<int64_t>(16 * s.Q, 8 * tile);
}

// Every thread takes the parts of its own run, then what others have left: a processor that somebody else slows down,
// as happens to virtual ones, keeps nobody waiting for more than a part.
template <class F>
void run_parts(const Grid& grid, const F& f) {
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int64_t kMost = 64;
  const int64_t runs = std::min<int64_t>({static_cast<int64_t>(torch::stable::get_num_threads()), grid.size(), kMost});
  Run run[kMost];
  for (int64_t i = 0; i < runs; ++i) {
    run[i].next = grid.size() * i / runs;
    run[i].end = grid.size() * (i + 1) / runs;
  }
  torch::stable::parallel_for(0, runs, 1, [&](int64_t first, int64_t last) {
    for (int64_t own = first; own < last; ++own) {
      for (int64_t i = 0; i < runs; ++i) {
        Run& from = run[(own + i) % runs];
        for (int64_t part; (part = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;) f(grid[part]);
      }
    }
  });
}

}  // namespace
}  // namespace fused_resnet
