// Calls the operators without Python: call_operators SHARED_OBJECT FILE, a file that export.py wrote.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>


#include "library.h"

using at::Tensor;
using Optional = std::optional<Tensor>;
using Patch = Tensor(const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, const Optional&);
using AddPatchNorm = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                                                const Optional&, const Optional&, const Optional&, const Optional&);

template <class Signature>
auto operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool compare(const joint::File& file) {
  const c10::InferenceMode without_autograd;
  const auto patch = operator_of<Patch>("linearpatch::hadamard_patch");
  const auto add_patch_rms_norm = operator_of<AddPatchNorm>("linearpatch::add_patch_rms_norm");
  const Tensor x = file["x"], scale = file["scale"], pre = file["pre_scale"], post = file["post_scale"], down = file["down"],
               up = file["up"];
  joint::add_width(x.size(-1), file["matrix"]);
  const Tensor patched = patch.call(x, scale, pre, post, down, up);
  const auto [normed, stream] =
      add_patch_rms_norm.call(x, file["residual"], scale, file["norm_weight"], 1e-6, pre, post, down, up);
  // The same kernels on the same machine: only how a thread's share of the rows is cut may differ.
  constexpr double tolerance = 1e-6;
  const bool first = joint::agrees("hadamard_patch", patched, file["patched"], tolerance);
  const bool second = joint::agrees("add_patch_rms_norm, normed", normed, file["normed"], tolerance);
  return joint::agrees("add_patch_rms_norm, stream", stream, file["stream"], tolerance) && first && second;
}

int main(int count, char** arguments) {
  return joint::run([&] {
    TORCH_CHECK(count == 3, "use: call_operators SHARED_OBJECT FILE");
    joint::load_kernels(arguments[1]);
    return compare(joint::File(arguments[2]));
  });
}
