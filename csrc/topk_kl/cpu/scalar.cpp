#include "kernel_table.h"

#include "../../common/cpu/scalar-inl.h"

namespace {

constexpr long lanes = 4;  // which the compiler turns into whatever its target has

#include "kernel-inl.h"

}  // namespace

const linearpatch::topk_kl::KernelTable* linearpatch::topk_kl::scalar_kernels() { return &table; }
