// Compiled once for every instruction set, with -DFR_ISA=its name: see convs.h.
#include "cpu/direct.h"
#include "cpu/pool.h"
#include "cpu/winograd.h"

namespace fused_resnet {
namespace FR_ISA {

#define FR_STRINGIFY(x) #x
#define FR_NAME(x) FR_STRINGIFY(x)

int64_t grouped_scratch(const ConvShape& s, const Part& part);  // grouped.cpp
template <class T>
void grouped(const ConvRun<T>& c, const Part& part, void* scratch);

template <class T>
Convs<T> convs() {
  return {
      FR_NAME(FR_ISA),   kLanes,          kRows,      direct_scratch<T>, direct<T>,   winograd_scratch<T>, winograd<T>,
      winograd_input<T>, grouped_scratch, grouped<T>, max_pool<T>,       mean_pool<T>};
}

template Convs<float> convs<float>();
template Convs<bf16> convs<bf16>();

}  // namespace FR_ISA
}  // namespace fused_resnet
