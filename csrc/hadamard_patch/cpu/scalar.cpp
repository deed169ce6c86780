// Also for rows that are too short for a vector unit.
#include "kernel_table.h"

#include "../../common/cpu/scalar-inl.h"

#include "../orders.h"

namespace {

struct Vector : Words {
  static constexpr int pass_bits = 3;
  static constexpr int rows_together = 4;

  HOT Reg set1(float a) { return a; }
  HOT Reg add(Reg a, Reg b) { return a + b; }
  HOT Reg sub(Reg a, Reg b) { return a - b; }
  HOT Reg mul(Reg a, Reg b) { return a * b; }
  HOT Reg multiply_add(Reg a, Reg b, Reg c) { return a * b + c; }
  HOT Reg multiply_subtract(Reg a, Reg b, Reg c) { return a * b - c; }
  HOT Reg negated_multiply_add(Reg a, Reg b, Reg c) { return c - a * b; }
  HOT void prefetch(const void*) {}  // by the line, not by the float: left to the machine
  HOT void prefetch_second_level(const void*) {}
  HOT void prefetch_write(const void*) {}

  // No lanes, no butterflies between them.
  HOT Reg load_low(const float* p) { return *p; }
  HOT Reg low(Reg v) { return v; }
  HOT Reg load_high(const float* p) { return *p; }
  HOT Reg turned(Reg v, const float* scale) { return v * *scale; }
  HOT Reg middle(Reg v) { return v; }
  HOT Reg folded(Reg v) { return v; }
};

#include "kernel-inl.h"

}  // namespace

const linearpatch::KernelTable* linearpatch::scalar_kernels() { return &table; }
