#include "kernel_table.h"

#if defined(__x86_64__)
#include "../../common/cpu/avx512-inl.h"

namespace {

constexpr long lanes = Words::lanes;

#include "kernel-inl.h"

}  // namespace

const linearpatch::topk_kl::KernelTable* linearpatch::topk_kl::avx512_kernels() { return &table; }

#else

const linearpatch::topk_kl::KernelTable* linearpatch::topk_kl::avx512_kernels() { return nullptr; }

#endif
