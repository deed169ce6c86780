// Runs a compiled block without Python: run_package SHARED_OBJECT PACKAGE FILE, the latter two as export.py wrote them.
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>

#include "library.h"

bool compare(const std::string& package, const joint::File& file) {
  const c10::InferenceMode without_autograd;
  const at::Tensor hidden = file["hidden"];
  joint::add_width(hidden.size(-1), file["matrix"]);
  torch::inductor::AOTIModelPackageLoader block(package);
  // The compiler orders the sums of products otherwise than eager PyTorch does.
  return joint::agrees("block", block.run({hidden}).at(0), file["result"], 1e-5);
}

int main(int count, char** arguments) {
  return joint::run([&] {
    TORCH_CHECK(count == 4, "use: run_package SHARED_OBJECT PACKAGE FILE");
    setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0);  // without it, a package takes inputs of any shape at their word
    joint::load_kernels(arguments[1]);
    return compare(arguments[2], joint::File(arguments[3]));
  });
}
