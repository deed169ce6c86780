#include "library.h"

#include <dlfcn.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/library.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <mutex>

namespace {

std::mutex guard;
std::map<int64_t, at::Tensor> matrices;

at::Tensor paley_matrix(int64_t width) {
  const std::lock_guard lock(guard);
  const auto found = matrices.find(width);
  TORCH_CHECK(found != matrices.end(), "no Hadamard matrix of width ", width, " is known here: give it to joint::add_width first");
  return found->second;
}

}  // namespace

// The package's Python defines the operators; its shared object has their kernels alone. Here the schemas come from the same
// Python, when this is built.
TORCH_LIBRARY(linearpatch, library) {
#include "operators.inc"
  library.def("paley_matrix(int d) -> Tensor", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, &paley_matrix));
}

namespace joint {

void load_kernels(const std::string& shared_object) {
  TORCH_CHECK(dlopen(shared_object.c_str(), RTLD_NOW | RTLD_LOCAL), dlerror());
}

void add_width(int64_t width, const at::Tensor& matrix) {
  const std::lock_guard lock(guard);
  matrices[width] = matrix;
}

File::File(const std::string& path) : path_(path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  read_ = torch::jit::pickle_load(std::vector<char>(std::istreambuf_iterator<char>(file), {}));
}

at::Tensor File::operator[](const std::string& name) const {
  const auto tensors = read_.toGenericDict();
  TORCH_CHECK(tensors.contains(name), path_, " has no ", name);
  return tensors.at(name).toTensor();
}

bool agrees(const char* what, const at::Tensor& found, const at::Tensor& expected, double tolerance) {
  TORCH_CHECK(found.sizes() == expected.sizes() && found.dtype() == expected.dtype(), what, " is ", found.dtype(), " ",
              found.sizes(), ", expected ", expected.dtype(), " ", expected.sizes());
  const double difference = (found.to(at::kDouble) - expected.to(at::kDouble)).abs().max().item<double>();
  const double allowed = tolerance * expected.to(at::kDouble).abs().max().item<double>();
  const bool fine = difference <= allowed;
  std::cout << what << ": differs from Python's by " << difference << ", allowed " << allowed << (fine ? "" : ": TOO MUCH")
            << std::endl;
  return fine;
}

int run(const std::function<bool()>& program) try {
  return program() ? 0 : 1;
} catch (const c10::Error& error) {
  std::cerr << "error: " << error.what_without_backtrace() << std::endl;
  return 2;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;
  return 2;
}

}  // namespace joint
