// Runs a lowered ResNet without Python: the native library gives the operators, an AOTInductor package the network.
//
//   ./serve _C_cpu.so model.pt2 input.bin N C H W reference.bin [output.bin]
//
// input.bin holds N * C * H * W floats, reference.bin the outputs [N, classes] that are expected, as export.py writes
// them. Prints the classes found, the largest difference and the time of a call; fails where a class differs.
#include <ATen/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int kCalls = 10;

std::vector<float> read(const std::string& path, size_t count) {
  std::ifstream file(path, std::ios::binary);
  std::vector<float> values(count);
  if (!file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(count * sizeof(float)))) {
    throw std::runtime_error(path + " does not hold " + std::to_string(count) + " floats");
  }
  return values;
}

int serve(const std::vector<std::string>& args) {
  if (dlopen(args[1].c_str(), RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());  // registers fused_resnet::
  torch::inductor::AOTIModelPackageLoader model(args[2]);
  std::vector<int64_t> shape;
  for (int i = 4; i < 8; ++i) shape.push_back(std::stoll(args[i]));
  std::vector<float> pixels = read(args[3], shape[0] * shape[1] * shape[2] * shape[3]);
  const c10::InferenceMode guard;
  const at::Tensor x = at::from_blob(pixels.data(), shape);
  at::Tensor y = model.run({x})[0].contiguous();

  const int64_t classes = y.size(1);
  const std::vector<float> reference = read(args[8], shape[0] * classes);
  const float* found = y.const_data_ptr<float>();
  int wrong = 0;
  double largest = 0;
  for (int64_t n = 0; n < shape[0]; ++n) {
    const float *mine = found + n * classes, *theirs = reference.data() + n * classes;
    const auto best = std::max_element(mine, mine + classes) - mine;
    std::cout << "image " << n << ": class " << best << "\n";
    wrong += best != std::max_element(theirs, theirs + classes) - theirs;
    for (int64_t i = 0; i < classes; ++i) largest = std::max(largest, std::abs(double{mine[i]} - theirs[i]));
  }
  if (args.size() > 9) {
    std::ofstream(args[9], std::ios::binary).write(reinterpret_cast<const char*>(found), y.numel() * sizeof(float));
  }
  std::vector<double> times;
  for (int i = 0; i < kCalls; ++i) {
    const auto start = std::chrono::steady_clock::now();
    model.run({x});
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + kCalls / 2, times.end());
  std::cout << "largest difference " << largest << ", " << times[kCalls / 2] << " ms a call\n";
  if (wrong > 0) std::cerr << wrong << " classes differ from the reference\n";
  return wrong > 0;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 9) {
    std::cerr << "usage: " << argv[0] << " _C_cpu.so model.pt2 input.bin N C H W reference.bin [output.bin]\n";
    return 2;
  }
  return serve({argv, argv + argc});
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
