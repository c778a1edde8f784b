// What the drivers of tapes and of 8-bit values share: tensors of small integers and the operators' types.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "cpu/int8.h"
#include "cpu/pick.h"
#include "numbers.h"

namespace fused_resnet {

template <class T>
Tensor filled(const Sizes& sizes, ScalarType type, bool channels_last, int low, int high, float unit = 1,
              int64_t offset = 0) {
  const Tensor t(sizes, type, channels_last, offset);
  for (int64_t i = 0; i < t.numel(); ++i) {
    if constexpr (sizeof(T) == 1) {
      data_out<T>(t)[i] = static_cast<T>(number(low, high));
    } else {
      round_to(data_out<T>(t)[i], static_cast<float>(number(low, high)) * unit);
    }
  }
  return t;
}

// The operators' types, as csrc/schemas.cpp describes them.
using ConvPack = Tensor(const Tensor&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, double,
                        const Sizes&, int64_t, const std::string&, const std::string&);
using ConvPacked = void(Tensor, const Tensor&, const Tensor&, const Maybe&, const Sizes&, const Sizes&, const Sizes&,
                        const Sizes&, int64_t, const std::string&, const std::string&);
using Int8Pack = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, const std::string&);
using ConvInt8 = Tensor(const Tensor&, const Tensor&, const Maybe&, const Sizes&, const Sizes&, const Sizes&,
                        const Sizes&, double, int64_t, int64_t, double, double, bool);
using Quantize = Tensor(const Tensor&, double, int64_t);
using MaxPool = Tensor(const Tensor&, const Sizes&, const Sizes&, const Sizes&);
using MeanPool = Tensor(const Tensor&);
using NewImage = Tensor(const Tensor&, const Sizes&);
using Play = std::vector<Tensor>(const std::vector<Tensor>&, const std::vector<Tensor>&, const Tensor&, const Tensor&,
                                 const Sizes&);

// Ends the program.
template <class... Args>
[[noreturn]] void fail(const char* text, const Args&... args) {
  std::fprintf(stderr, text, args...);
  std::fputc('\n', stderr);
  std::exit(1);
}

void check_bytes();  // bytes.cpp
void check_store();  // store.cpp

}  // namespace fused_resnet
