// The operators of linearpatch_kernels for a process without Python.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <string>

namespace joint {

// Loads the package's shared object, which registers the kernels. Throws if it does not load.
void load_kernels(const std::string& shared_object);

// What a kernel asks for when it first meets a width: the matrix H_m of linearpatch_kernels.hadamard.paley_factor(width), int8.
// It belongs to the width alone. Write it down beside the patch.
void add_width(int64_t width, const at::Tensor& matrix);

// The tensors of a file that Python wrote with torch.save.
class File {
 public:
  explicit File(const std::string& path);
  at::Tensor operator[](const std::string& name) const;

 private:
  std::string path_;
  c10::IValue read_;
};

// Prints the largest difference, and says whether it is within tolerance times the largest expected element.
bool agrees(const char* what, const at::Tensor& found, const at::Tensor& expected, double tolerance);

// Runs what a program does. Its exit status: 0 where the results agree, 1 where they do not, 2 for an error, which is printed.
int run(const std::function<bool()>& program);

}  // namespace joint
