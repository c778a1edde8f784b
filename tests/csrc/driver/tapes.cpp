// Plays tapes of launches on every instruction set that the processor has: each value must be what the same launches
// make one by one, to the last bit, with one thread and with several. Exits with 1 at the first mismatch.
#include <array>
#include <cmath>

#include "calls.h"

using namespace fused_resnet;

namespace {

constexpr int64_t kNone = -1;
constexpr double kInfinity = INFINITY;

struct Options {
  int64_t residual = kNone;
  bool reuse = false;
  int64_t stride = 1, pad = -1, dilation = 1, groups = 1;  // a padding of -1 keeps the size
  const char* method = "direct";
  Activation activation = Activation::relu;
  bool narrow = true;  // of 8-bit values
};

// Launches that are run one by one as they are added.
class Chain {
 public:
  Chain(const char* isa, ScalarType type) : isa_(isa), type_(type) {}

  // A value that the tape is given; all of them come before the first launch.
  int64_t give(const Sizes& size, ScalarType type) {
    const int64_t offset = static_cast<int64_t>(values_.size()) % 2;
    values_.push_back(type == ScalarType::Byte    ? filled<uint8_t>(size, type, true, 0, 255, 1, offset)
                      : type == ScalarType::Float ? filled<float>(size, type, true, -999, 999, 0.002f, offset)
                                                  : filled<bf16>(size, type, true, -999, 999, 0.002f, offset));
    home_.push_back(given_);
    return given_++;
  }

  int64_t give(const Sizes& size) { return give(size, type_); }

  int64_t conv(int64_t x, int64_t K, int64_t kernel, const Options& o = {}) {
    const int64_t C = values_[x].size(1) / o.groups, pad = pad_of(kernel, o);
    const float unit = 0.002f / std::sqrt(static_cast<float>(C * kernel * kernel));
    const Sizes filters{K, C, kernel, kernel};
    const Tensor weight = type_ == ScalarType::Float ? filled<float>(filters, type_, false, -999, 999, unit)
                                                     : filled<bf16>(filters, type_, false, -999, 999, unit);
    const Tensor gamma = vector(K, 500, 999), beta = vector(K, -99, 99), mean = vector(K, -99, 99),
                 var = vector(K, 300, 999);
    const Sizes dilation{o.dilation, o.dilation};
    packs_.push_back(torch::stable::find_operator<ConvPack>("_conv_pack")(weight, std::nullopt, gamma, beta, mean, var,
                                                                          1e-5, dilation, o.groups, o.method, isa_));
    constexpr const char* kNames[] = {"identity", "relu", "relu6", "silu", "hardswish"};
    const auto size = [&](int64_t d) {
      return (values_[x].size(d) + 2 * pad - o.dilation * (kernel - 1) - 1) / o.stride + 1;
    };
    const Tensor y({values_[x].size(0), K, size(2), size(3)}, type_, true);
    torch::stable::find_operator<ConvPacked>("_conv_packed")(
        y, values_[x], packs_.back(), maybe(o.residual), {kernel, kernel}, {o.stride, o.stride}, {pad, pad}, dilation,
        o.groups, kNames[static_cast<int>(o.activation)], o.method);
    return add({0, x, o.residual, last_pack(), K, kernel, kernel, o.stride, o.stride, pad, pad, o.dilation, o.dilation,
                o.groups, static_cast<int64_t>(o.activation), o.reuse, 0, 0, 0},
               {0, 0, 0}, y);
  }

  int64_t conv_int8(int64_t x, int64_t K, int64_t kernel, const Options& o = {}) {
    const int64_t C = values_[x].size(1), pad = pad_of(kernel, o), y_zero = o.narrow ? 7 : 0;
    const Tensor weight = filled<int8_t>({K, C, kernel, kernel}, ScalarType::Char, false, -127, 127);
    const auto unit =
        static_cast<float>(1e-5 / std::sqrt(static_cast<double>(C * kernel * kernel)) * (o.narrow ? 70 : 1));
    packs_.push_back(torch::stable::find_operator<Int8Pack>("_conv_int8_pack")(
        weight, filled<float>({K}, ScalarType::Float, false, 50, 99, unit), vector(K, -99, 99), o.dilation, 5, isa_));
    const double scale = 0.37, low = o.narrow ? -3 : -0.5, high = kInfinity;
    const Tensor y = torch::stable::find_operator<ConvInt8>("_conv_int8")(
        values_[x], packs_.back(), maybe(o.residual), {K, kernel, kernel}, {o.stride, o.stride}, {pad, pad},
        {o.dilation, o.dilation}, scale, 11, y_zero, low, high, o.narrow);
    return add({1, x, o.residual, last_pack(), K, kernel, kernel, o.stride, o.stride, pad, pad, o.dilation, o.dilation,
                1, 0, o.reuse, 11, y_zero, o.narrow},
               {scale, low, high}, y);
  }

  int64_t pool(int64_t x, int64_t kernel, int64_t stride) {
    const int64_t pad = kernel / 2;
    const Tensor y =
        torch::stable::find_operator<MaxPool>("_max_pool")(values_[x], {kernel, kernel}, {stride, stride}, {pad, pad});
    return add({2, x, kNone, kNone, 0, kernel, kernel, stride, stride, pad, pad, 1, 1, 1, 0, 0, 0, 0, 0}, {0, 0, 0}, y);
  }

  int64_t quantize(int64_t x) {
    const Tensor y = torch::stable::find_operator<Quantize>("_quantize")(values_[x], 61.5, 120);
    return add({3, x, kNone, kNone, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 120, 0}, {61.5, 0, 0}, y);
  }

  int64_t mean(int64_t x) {
    const Tensor y = torch::stable::find_operator<MeanPool>("_mean_pool")(values_[x]);
    return add({4, x, kNone, kNone, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0}, {0, 0, 0}, y);
  }

  // Plays the tape with several numbers of threads, for the last value and those that are `kept`.
  void check(const char* name, const Sizes& kept = {}) const {
    Sizes results = kept;
    results.push_back(static_cast<int64_t>(values_.size()) - 1);
    for (int64_t threads : {1, 2, 3}) {
      std::vector<Tensor> given, out;
      for (int64_t i = 0; i < given_; ++i) given.push_back(copy(values_[i], i % 2));
      torch::stable::threads = threads;
      // A thread of its own has no memory in which results of an earlier tape lie.
      std::thread([&] { out = play(given, results); }).join();
      torch::stable::threads = 1;
      for (size_t i = 0; i < results.size(); ++i) {
        compare(out[i], results[i], name, threads);
        const int64_t home = home_[results[i]];
        if (home < given_ && out[i].const_data_ptr() != given[home].const_data_ptr())
          fail("%s, %s: value %d is not where it was to be", isa_, name, static_cast<int>(results[i]));
      }
      for (int64_t i = 0; i < given_; ++i) {
        auto value = static_cast<int64_t>(values_.size()) - 1;
        while (home_[value] != i) --value;  // the last that lies there
        compare(given[i], value, name, threads);
      }
    }
  }

 private:
  static int64_t pad_of(int64_t kernel, const Options& o) { return o.pad < 0 ? o.dilation * (kernel / 2) : o.pad; }

  static Tensor vector(int64_t size, int low, int high) {
    return filled<float>({size}, ScalarType::Float, false, low, high, 0.002f);
  }

  static Tensor copy(const Tensor& t, int64_t offset) {
    const Tensor own(sizes_of(t), t.scalar_type(), true, offset);
    memcpy(own.mutable_data_ptr(), t.const_data_ptr(), bytes(t));
    return own;
  }

  static size_t bytes(const Tensor& t) {
    return static_cast<size_t>(t.numel() * torch::stable::bytes_of(t.scalar_type()));
  }

  Maybe maybe(int64_t value) const { return value < 0 ? Maybe{} : Maybe{values_[value]}; }

  int64_t last_pack() const { return static_cast<int64_t>(packs_.size()) - 1; }

  int64_t add(const std::array<int64_t, 19>& words, const std::array<double, 3>& numbers, const Tensor& y) {
    words_.push_back(words);
    numbers_.push_back(numbers);
    home_.push_back(words[15] ? home_[words[2]] : static_cast<int64_t>(values_.size()));
    values_.push_back(y);
    return static_cast<int64_t>(values_.size()) - 1;
  }

  std::vector<Tensor> play(const std::vector<Tensor>& given, const Sizes& results) const {
    const auto count = static_cast<int64_t>(words_.size());
    const Tensor entries({count, 19}, ScalarType::Long, false), numbers({count, 3}, ScalarType::Double, false);
    memcpy(entries.mutable_data_ptr(), words_.data(), bytes(entries));
    memcpy(numbers.mutable_data_ptr(), numbers_.data(), bytes(numbers));
    return torch::stable::find_operator<Play>("_play")(given, packs_, entries, numbers, results);
  }

  void compare(const Tensor& found, int64_t value, const char* name, int64_t threads) const {
    const Tensor& wanted = values_[value];
    if (sizes_of(found) != sizes_of(wanted) || found.scalar_type() != wanted.scalar_type())
      fail("%s, %s: value %d is of another kind", isa_, name, static_cast<int>(value));
    if (memcmp(found.const_data_ptr(), wanted.const_data_ptr(), bytes(wanted)) == 0) return;
    const auto *a = data<uint8_t>(found), *b = data<uint8_t>(wanted);
    size_t at = 0;
    while (a[at] == b[at]) ++at;
    fail("%s, %s, %d threads: value %d differs from byte %d of %d on", isa_, name, static_cast<int>(threads),
         static_cast<int>(value), static_cast<int>(at), static_cast<int>(bytes(wanted)));
  }

  const char* isa_;
  ScalarType type_;
  int64_t given_ = 0;
  std::vector<Tensor> values_, packs_;
  std::vector<std::array<int64_t, 19>> words_;
  std::vector<std::array<double, 3>> numbers_;
  Sizes home_;  // the value in whose memory a value lies
};

// One set of chains for floating-point values of an instruction set.
struct Floating {
  const char* isa;
  ScalarType type;

  Chain chain() const { return {isa, type}; }

  // `middle` says what its 3x3 convolution is.
  static int64_t bottleneck(Chain& t, int64_t x, int64_t width, const Options& middle, bool project) {
    int64_t residual = x;
    const int64_t a = t.conv(x, width, 1), b = t.conv(a, width, 3, middle);
    if (project) residual = t.conv(x, 2 * width, 1, {.stride = middle.stride, .activation = Activation::identity});
    return t.conv(b, 2 * width, 1, {.residual = residual, .reuse = true});
  }

  // A stem, blocks on maps slightly larger than those that run depth-first, then on smaller ones.
  void network(int64_t images) const {
    Chain t = chain();
    const int64_t x = t.give({images, 3, 95, 90}), stem = t.conv(x, 16, 7, {.stride = 2});
    int64_t y = t.pool(stem, 3, 2);  // 24 x 23
    y = bottleneck(t, y, 16, {.method = "winograd4"}, true);
    const int64_t kept = bottleneck(t, y, 16, {.method = "winograd2"}, false);
    y = bottleneck(t, kept, 16, {.stride = 2}, true);
    y = bottleneck(t, y, 16, {.groups = 16, .method = "grouped"}, false);
    y = t.conv(y, 5, 3, {.activation = Activation::silu});
    t.conv(t.mean(y), 10, 1, {.activation = Activation::identity});
    t.check("network");
  }

  // Bands of the blocks' results.
  void bottlenecks(int64_t images) const {
    Chain t = chain();
    const int64_t x = t.give({images, 32, 75, 41});
    int64_t y = bottleneck(t, x, 16, {.method = "winograd4"}, true);
    y = bottleneck(t, y, 16, {.method = "winograd2"}, false);
    const int64_t a = t.conv(y, 32, 1), b = t.conv(a, 32, 3, {.groups = 8, .method = "grouped"});
    y = t.conv(b, 32, 1, {.residual = y, .reuse = true, .activation = Activation::hardswish});
    bottleneck(t, y, 16, {.stride = 2}, true);
    t.check("bottlenecks", {b});
  }

  // Kernels that read the memory that results are written over.
  void basic_blocks(const char* method, int64_t images) const {
    Chain t = chain();
    const int64_t x = t.give({images, 16, 91, 63}), a = t.conv(x, 16, 3, {.method = method});
    t.conv(a, 16, 3, {.residual = x, .reuse = true, .method = method});
    t.check(method);
  }

  // Many bands of a long block, in which memory would be free for later values.
  void long_block(int64_t images) const {
    Chain t = chain();
    const int64_t x = t.give({images, 8, 134, 62}), a = t.conv(x, 4, 3), b = t.conv(a, 4, 3, {.dilation = 3});
    const int64_t c = t.conv(b, 4, 5), d = t.conv(c, 4, 2, {.pad = 1});
    t.conv(t.conv(d, 8, 2, {.pad = 0}), 8, 1, {.residual = x});
    t.check("long block");
  }

  // Besides the sums: what is read with strides and dilation, and what the caller keeps.
  void sides(int64_t images) const {
    Chain t = chain();
    const int64_t x = t.give({images, 8, 134, 62}), r = t.give({images, 8, 134, 62});
    const int64_t near = t.conv(r, 3, 3, {.stride = 2}), wide = t.conv(r, 5, 3, {.dilation = 3});
    const int64_t a = t.conv(x, 8, 3, {.dilation = 2}), b = t.conv(a, 3, 5, {.pad = 2});
    const int64_t y = t.conv(b, 8, 1, {.residual = r, .reuse = true});
    const int64_t both = t.conv(a, 8, 3, {.residual = a});
    const int64_t far = t.conv(wide, 5, 3, {.stride = 2, .pad = 4, .activation = Activation::silu});
    t.conv(both, 8, 1, {.residual = y});
    t.check("sides", {near, a, far, x});
  }

  // More launches than a block has, maps that grow, and values that are read much later.
  void without_sums(int64_t images) const {
    Chain t = chain();
    const int64_t x = t.give({images, 4, 29, 21});
    int64_t y = x, early = 0;
    for (int i = 0; i < 11; ++i) {
      y = t.conv(y, 4, 3);
      if (i == 1) early = y;
    }
    y = t.conv(y, 4, 3, {.residual = early});
    y = t.conv(y, 4, 1, {.residual = x, .reuse = true});
    const int64_t small = t.conv(y, 4, 3, {.stride = 2}), kept = t.conv(small, 4, 3);
    y = t.conv(kept, 4, 3, {.pad = 9});  // large again
    y = t.conv(y, 4, 3);
    y = t.pool(y, 2, 1);
    const int64_t last = t.conv(small, 4, 3, {.residual = kept});
    t.conv(y, 4, 3, {.stride = 2});
    t.check("without sums", {last, early});
  }

  // Maps of `pixels` about as large as those that run depth-first; threads x images of every kind.
  void few_pixels(int64_t images, int64_t width) const {
    Chain t = chain();
    int64_t y = t.give({images, 16, 23, width});
    const int64_t a = t.conv(y, 16, 3, {.method = "winograd4"});
    y = t.conv(a, 16, 3, {.residual = y, .reuse = true, .method = "winograd2"});
    t.conv(y, 3, 3, {.residual = kNone});
    t.check("few pixels", {a});
  }
};

// 8-bit values, with residuals of either kind.
void bottlenecks_int8(const char* isa, int64_t images) {
  Chain t(isa, ScalarType::Float);
  const int64_t x = t.give({images, 3, 97, 90}), q = t.quantize(x);
  const int64_t stem = t.conv_int8(q, 17, 7, {.stride = 2}), pooled = t.pool(stem, 3, 2);  // 25 x 23
  int64_t y = pooled;
  for (bool project : {true, false}) {
    const int64_t a = t.conv_int8(y, 16, 1), b = t.conv_int8(a, 16, 3);
    const int64_t residual = project ? t.conv_int8(y, 40, 1) : y;
    y = t.conv_int8(b, 40, 1, {.residual = residual, .reuse = project});
  }
  const int64_t wide = t.conv_int8(y, 6, 3, {.narrow = false});
  t.conv_int8(y, 6, 3, {.residual = wide, .reuse = true, .dilation = 2, .narrow = false});
  t.check("int8", {stem});
}

void basic_blocks_int8(const char* isa, int64_t images) {
  Chain t(isa, ScalarType::Float);
  const int64_t x = t.give({images, 24, 230, 41}, ScalarType::Byte), wide = t.give({images, 24, 230, 41});
  const int64_t a = t.conv_int8(x, 5, 3);
  int64_t y = t.conv_int8(a, 24, 3, {.residual = x, .reuse = true});
  y = t.quantize(t.conv_int8(y, 24, 1, {.residual = wide, .narrow = false}));
  y = t.pool(y, 3, 1);
  t.conv_int8(y, 3, 3, {.stride = 2, .pad = 3});
  t.check("int8, basic blocks", {y});
}

void check_tapes(const char* isa) {
  for (ScalarType type : {ScalarType::Float, ScalarType::BFloat16}) {
    const Floating own{isa, type};
    own.network(3);
    own.bottlenecks(2);
    for (const char* method : {"direct", "winograd2", "winograd4"}) own.basic_blocks(method, 2);
    own.without_sums(3);
    for (int64_t images : {1, 2, 9, 13}) own.few_pixels(images, 23);
    own.few_pixels(3, 22);
  }
  const Floating wide{isa, ScalarType::Float};
  wide.long_block(2);
  wide.sides(2);
  bottlenecks_int8(isa, 3);
  basic_blocks_int8(isa, 2);
}

}  // namespace

int main() {
  for (const Convs<float>& own : convs<float>()) check_tapes(own.isa);
  check_bytes();
  check_store();
  std::printf("done\n");
  return 0;
}
