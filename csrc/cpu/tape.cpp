// Launches that were recorded on a tape, played in one call: between two of them no interpreter runs.
//
// Where a batch has two images or more for every thread, launches on large maps run depth-first: a thread takes an
// image through all of them, and within a block (up to the sum with its residual) some rows at a time, so that what one
// launch makes is still in the second cache when the next reads it. What nobody else reads is never stored whole.
#include <algorithm>
#include <mutex>

#include "cpu/launches.h"
#include "cpu/parts.h"

namespace fused_resnet {
namespace {

enum class Kind : int64_t { conv, conv_int8, max_pool, quantize, mean_pool };

// One launch. Values are numbered: those given first, then one result a launch.
struct Entry {
  Kind kind;
  int64_t x, residual, pack;  // -1 where there is none
  int64_t filters[3];         // K, R, S
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups, activation;
  int64_t reuse;                        // the result is written over the residual
  int64_t residual_zero, zero, narrow;  // of 8-bit values
};

// `inverse` stands in the first place where a launch quantises.
struct Numbers {
  double residual_scale, low, high;
};

constexpr int64_t kWords = sizeof(Entry) / sizeof(int64_t), kNumbers = sizeof(Numbers) / sizeof(double);

Launch launch_of(const Entry& e, const Numbers& n, const Image& x, const Image* residual, const Maybe& pack) {
  const auto pair = [](const int64_t (&of)[2]) { return Sizes{of[0], of[1]}; };
  const Sizes filters{e.filters[0], e.filters[1], e.filters[2]}, kernel{e.filters[1], e.filters[2]};
  const Sizes stride = pair(e.stride), padding = pair(e.padding), dilation = pair(e.dilation);
  STD_TORCH_CHECK(pack.has_value() || (e.kind != Kind::conv && e.kind != Kind::conv_int8),
                  "a launch of the tape has no weights");
  switch (e.kind) {
    case Kind::conv:
      STD_TORCH_CHECK(e.activation >= 0 && e.activation <= static_cast<int64_t>(Activation::hardswish),
                      "a launch of the tape has no known activation");
      return conv_packed(x, *pack, filters[0], kernel, stride, padding, dilation, e.groups,
                         static_cast<Activation>(e.activation));
    case Kind::conv_int8:
      return conv_int8(x, *pack, residual ? std::optional(residual->dtype) : std::nullopt, filters, stride, padding,
                       dilation, {n.residual_scale, e.residual_zero, e.zero, n.low, n.high, e.narrow != 0});
    case Kind::max_pool:
      return max_pool(x, kernel, stride, padding);
    case Kind::quantize:
      return quantize(x, n.residual_scale, e.zero);
    case Kind::mean_pool:
      return mean_pool(x);
  }
  STD_TORCH_CHECK(false, "the tape holds no such launch");
}

struct Step {
  Launch launch;
  int64_t x, residual;  // values; -1 where there is no residual
  bool reuse;
};

// A value: where its memory is decided, and until when it is read.
struct Value {
  Image image;
  int64_t home;  // the value whose memory it shares: its own, or that of the residual it is written over
  int64_t last;  // the last step that reads it, or the number of steps where the caller does
  Maybe tensor;  // where the whole batch is in memory
};

class Tape {
 public:
  Tape(const std::vector<Tensor>& given, const std::vector<Tensor>& packs, const Entry* entries, const Numbers* numbers,
       int64_t count, const Sizes& results)
      : like_(given.at(0)), given_(static_cast<int64_t>(given.size())) {
    for (const Tensor& t : given) {
      STD_TORCH_CHECK(is_channels_last(t), "what is given must be dense in channels_last memory");
      values_.push_back({image_of(t), static_cast<int64_t>(values_.size()), -1, t});
    }
    for (int64_t i = 0; i < count; ++i) add(entries[i], numbers[i], packs);
    for (int64_t value : results) {
      STD_TORCH_CHECK(value >= 0 && value < given_ + count, "the tape has no value ", value);
      values_[value].last = count;
    }
    // Memory lives as long as the last value in it.
    for (int64_t i = given_ + count; i-- > 0;) {
      Value& home = values_[values_[i].home];
      home.last = std::max(home.last, values_[i].last);
    }
  }

  std::vector<Tensor> play(const Sizes& results) {
    const auto count = static_cast<int64_t>(steps_.size());
    for (int64_t i = 0; i < count;) {
      const int64_t end = std::max(deep_end(i), i + 1);
      end - i > 1 ? play_deep(i, end) : play_wide(i);
      for (; i < end; ++i) {
        for (int64_t read : {steps_[i].x, steps_[i].residual, given_ + i}) {
          if (read >= 0 && values_[values_[read].home].last <= i) values_[values_[read].home].tensor.reset();
        }
      }
    }
    std::vector<Tensor> out;
    for (int64_t value : results) out.push_back(*values_[values_[value].home].tensor);
    return out;
  }

 private:
  void add(const Entry& e, const Numbers& n, const std::vector<Tensor>& packs) {
    const auto i = static_cast<int64_t>(steps_.size());
    STD_TORCH_CHECK(e.x >= 0 && e.x < given_ + i && e.residual >= -1 && e.residual < given_ + i && e.pack >= -1 &&
                        e.pack < static_cast<int64_t>(packs.size()) && (!e.reuse || e.residual >= 0),
                    "launch ", i, " of the tape reads what is not there");
    const Image* residual = e.residual < 0 ? nullptr : &values_[e.residual].image;
    Launch launch = launch_of(e, n, values_[e.x].image, residual, e.pack < 0 ? Maybe{} : Maybe{packs[e.pack]});
    if (residual != nullptr) {
      STD_TORCH_CHECK(
          residual->size == launch.y.size && (e.kind == Kind::conv_int8 || residual->dtype == launch.y.dtype),
          "residual must have the shape and dtype of the output");
      STD_TORCH_CHECK(!e.reuse || residual->dtype == launch.y.dtype, "a result cannot be written over its residual");
      values_[e.residual].last = i;
    }
    values_[e.x].last = i;
    values_.push_back({launch.y, e.reuse ? values_[e.residual].home : given_ + i, i, {}});
    steps_.push_back({std::move(launch), e.x, e.residual, e.reuse != 0});
  }

  void* whole(int64_t value) {
    Value& home = values_[values_[value].home];
    if (!home.tensor.has_value()) home.tensor = make_image(home.image, like_);
    return home.tensor->mutable_data_ptr();
  }

  void play_wide(int64_t i) {
    const Step& step = steps_[i];
    step.launch.all(whole(step.x), step.residual < 0 ? nullptr : whole(step.residual), whole(given_ + i));
  }

  int64_t deep_end(int64_t first) const;
  void play_deep(int64_t first, int64_t end);

  std::vector<Value> values_;
  std::vector<Step> steps_;
  Tensor like_;
  int64_t given_;

  friend class Descent;
};

constexpr int64_t kDeepPixels = 512;  // of a map: smaller ones are read through the weights rather
constexpr int64_t kBand = 384 << 10;  // bytes of all maps of a block that are at hand at once
constexpr int64_t kLongest = 8;       // launches of a block

// Where the launches end that run depth-first from `first` on.
int64_t Tape::deep_end(int64_t first) const {
  const int64_t threads = torch::stable::get_num_threads(), images = steps_[first].launch.y.size[0];
  // Two images for each at least: one may be left to a thread that is faster.
  if (threads > 1 && (images < 2 * threads || (images % threads != 0 && images < 4 * threads))) return first;
  auto end = first;
  for (; end < static_cast<int64_t>(steps_.size()); ++end) {
    const Launch& launch = steps_[end].launch;
    if (int64_t{launch.shape.P} * launch.shape.Q < kDeepPixels || launch.shape.N != images) break;
  }
  return end;
}

// One thread's way through the launches [first, end).
class Descent {
 public:
  Descent(Tape& tape, int64_t first, int64_t end) : tape_(tape), first_(first), end_(end) {
    for (int64_t i = first; i < end; i = block_end(i)) blocks_.push_back({i, block_end(i), band_of(i, block_end(i))});
    place();
  }

  int64_t bytes() const { return bytes_; }

  // `room` is memory of bytes().
  void run(int64_t image, char* room) const {
    std::vector<int32_t> done(end_ - first_, 0);
    for (const Block& block : blocks_) {
      const int32_t rows = tape_.steps_[block.end - 1].launch.shape.P;
      for (int64_t row = block.band; row < rows; row += block.band)
        extend(block, block.end - 1, static_cast<int32_t>(row), done, image, room);
      for (int64_t i = block.end; i-- > block.first;)
        extend(block, i, tape_.steps_[i].launch.shape.P, done, image, room);
    }
  }

 private:
  struct Block {
    int64_t first, end, band;
  };

  // After the sum with a residual.
  int64_t block_end(int64_t first) const {
    int64_t i = first;
    while (i + 1 < end_ && tape_.steps_[i].residual < 0 && i + 1 - first < kLongest) ++i;
    return i + 1;
  }

  // Rows of the block's result that are made at once.
  int64_t band_of(int64_t first, int64_t end) const {
    const int64_t rows = tape_.steps_[end - 1].launch.shape.P;
    int64_t bytes = tape_.values_[tape_.steps_[first].x].image.bytes_of_one(), step = 1;
    for (int64_t i = first; i < end; ++i) {
      bytes += tape_.steps_[i].launch.y.bytes_of_one();
      step = std::max<int64_t>(step, tape_.steps_[i].launch.step);
    }
    return padded(std::max<int64_t>(kBand * rows / std::max<int64_t>(bytes, 1), 1), step);
  }

  // Which memory a thread needs, and where in it values lie that nobody reads after these launches.
  void place() {
    struct Taken {
      int64_t from, to, until;
    };
    std::vector<Taken> taken;
    base_.assign(tape_.values_.size(), -1);
    for (int64_t i = first_; i < end_; ++i) {
      const int64_t value = tape_.given_ + i;
      const Value& home = tape_.values_[tape_.values_[value].home];
      if (tape_.values_[value].home != value || home.last >= end_) continue;
      const int64_t size = padded(home.image.bytes_of_one(), 4096);
      std::erase_if(taken, [&](const Taken& t) { return t.until < i; });
      std::sort(taken.begin(), taken.end(), [](const Taken& a, const Taken& b) { return a.from < b.from; });
      int64_t from = 0;
      for (const Taken& t : taken) {
        if (t.from - from >= size) break;
        from = std::max(from, t.to);
      }
      // A block's launches take turns: its memory is free when the block has ended.
      taken.push_back({from, from + size, last_of_block(home.last)});
      base_[value] = from;
      bytes_ = std::max(bytes_, from + size);
    }
  }

  int64_t last_of_block(int64_t step) const {
    for (const Block& block : blocks_) {
      if (step < block.end) return block.end - 1;
    }
    return end_;
  }

  char* at(int64_t value, int64_t image, char* room) const {
    const int64_t home = tape_.values_[value].home;
    if (base_[home] >= 0) return room + base_[home];
    return static_cast<char*>(tape_.values_[home].tensor->mutable_data_ptr()) +
           image * tape_.values_[home].image.bytes_of_one();
  }

  // Makes rows of step `i` up to `upto`, after those that they are made from.
  void extend(const Block& block, int64_t i, int32_t upto, std::vector<int32_t>& done, int64_t image,
              char* room) const {
    const Step& step = tape_.steps_[i];
    const ConvShape& s = step.launch.shape;
    int32_t& own = done[i - first_];
    upto = std::min<int32_t>(static_cast<int32_t>(padded(upto, step.launch.step)), s.P);
    if (own >= upto) return;
    const auto need = [&](int64_t value, int64_t rows) {
      const int64_t maker = value - tape_.given_;
      if (maker >= block.first && maker < i) extend(block, maker, static_cast<int32_t>(rows), done, image, room);
    };
    const int64_t last = (int64_t{upto} - 1) * s.stride_h - s.pad_h + (int64_t{s.R} - 1) * s.dilation_h + 1;
    need(step.x, std::clamp<int64_t>(last, 0, s.H));
    if (step.residual >= 0) need(step.residual, upto);
    if (step.reuse) {  // whoever else reads these rows has to have read them
      for (int64_t j = block.first; j < i; ++j) {
        if (tape_.values_[tape_.steps_[j].x].home != tape_.values_[step.residual].home) continue;
        const ConvShape& r = tape_.steps_[j].launch.shape;
        need(tape_.given_ + j, std::min<int64_t>(ceil_div<int64_t>(upto + int64_t{r.pad_h}, r.stride_h), r.P));
      }
    }
    step.launch.rows(at(step.x, image, room), step.residual < 0 ? nullptr : at(step.residual, image, room),
                     at(tape_.given_ + i, image, room), own, upto);
    own = upto;
  }

  Tape& tape_;
  int64_t first_, end_, bytes_ = 0;
  std::vector<int64_t> base_;  // of a value within a thread's memory, or -1
  std::vector<Block> blocks_;
};

// A room for each thread that computes at once. They come from the store and go back to it: with large images they take
// as much as a batch of maps.
class Rooms {
 public:
  Rooms(int64_t count, int64_t bytes, const Tensor& like)
      : all_(make_image({{count, std::max<int64_t>(bytes, 64), 1, 1}, ScalarType::Byte}, like)) {
    for (int64_t i = 0; i < count; ++i) free_.push_back(static_cast<char*>(all_.mutable_data_ptr()) + i * all_.size(1));
  }

  char* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    char* room = free_.back();
    free_.pop_back();
    return room;
  }

  void give(char* room) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(room);
  }

 private:
  Tensor all_;
  std::vector<char*> free_;
  std::mutex mutex_;
};

void Tape::play_deep(int64_t first, int64_t end) {
  const Descent descent(*this, first, end);
  for (int64_t i = first; i < end; ++i) {
    for (int64_t value : {steps_[i].x, steps_[i].residual, given_ + i}) {
      if (value >= 0 && (values_[value].home < given_ + first || values_[values_[value].home].last >= end))
        whole(value);
    }
  }
  const int64_t images = steps_[first].launch.y.size[0];
  Rooms rooms(std::min<int64_t>(images, torch::stable::get_num_threads()), descent.bytes(), like_);
  run_parts(Grid{images, 1, images, 1}, [&](const Part& part) {
    char* room = rooms.take();
    for (int64_t n = part.first_row; n < part.last_row; ++n) descent.run(n, room);
    rooms.give(room);
  });
}

// entries int64 [launches, kWords], numbers fp64 [launches, kNumbers]; returns the values that `results` names.
std::vector<Tensor> play(const std::vector<Tensor>& given, const std::vector<Tensor>& packs, const Tensor& entries,
                         const Tensor& numbers, const Sizes& results) {
  STD_TORCH_CHECK(!given.empty() && entries.scalar_type() == ScalarType::Long &&
                      numbers.scalar_type() == ScalarType::Double && entries.is_contiguous() &&
                      numbers.is_contiguous() && entries.dim() == 2 && entries.size(1) == kWords &&
                      numbers.numel() == entries.size(0) * kNumbers,
                  "this is no tape");
  Tape tape(given, packs, static_cast<const Entry*>(entries.const_data_ptr()),
            static_cast<const Numbers*>(numbers.const_data_ptr()), entries.size(0), results);
  return tape.play(results);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("_play", TORCH_BOX(&fused_resnet::play));
}
