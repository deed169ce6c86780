// Written by factor_orders.py; tests/ops/test_cpu_kernel.py holds it to linearpatch_kernels.hadamard.
#pragma once

#include <cstdint>

enum StepKind : uint8_t { sum, difference, negated_sum, plus_half, minus_half };

// Values 0..M-1 are the inputs; step i makes value M + i of values a and b: a + b, a - b, -a - b, a + b/2, a - b/2.
struct Step {
  uint16_t a, b;
  StepKind kind;
};

// How to multiply M values by H_M, or by its transpose.
template <int M, bool transposed>
struct Order;

template <>
struct Order<12, false> {  // 48 additions, 4.00 an element
  static constexpr Step steps[] = {
      {6, 11, sum}, {6, 11, difference}, {3, 4, difference}, {3, 4, sum}, {12, 15, sum}, {14, 13, difference},
      {0, 9, difference}, {0, 9, sum}, {18, 17, difference}, {14, 18, sum}, {7, 8, difference}, {7, 8, sum},
      {22, 21, sum}, {18, 22, difference}, {14, 22, difference}, {13, 26, sum}, {13, 25, difference},
      {19, 23, difference}, {1, 10, difference}, {1, 10, sum}, {31, 16, sum}, {30, 29, sum}, {12, 31, difference},
      {2, 5, sum}, {2, 5, difference}, {36, 34, difference}, {31, 36, difference}, {15, 36, difference},
      {15, 38, difference}, {12, 39, difference}, {33, 41, negated_sum}, {41, 33, difference}, {28, 40, sum},
      {28, 40, difference}, {37, 24, difference}, {24, 37, negated_sum}, {30, 35, difference}, {23, 48, sum},
      {30, 35, sum}, {19, 35, sum}, {23, 51, sum}, {19, 50, difference}, {27, 53, negated_sum},
      {27, 53, difference}, {52, 32, sum}, {32, 52, difference}, {49, 20, difference}, {49, 20, negated_sum}};
  static constexpr uint16_t outputs[] = {
      56, 58, 46, 59, 57, 54, 55, 44, 42, 47, 45, 43};
};

template <>
struct Order<12, true> {  // 48 additions, 4.00 an element
  static constexpr Step steps[] = {
      {7, 9, sum}, {7, 9, difference}, {1, 3, sum}, {1, 3, difference}, {12, 14, difference}, {12, 14, sum},
      {6, 11, difference}, {6, 11, sum}, {18, 13, difference}, {15, 20, difference}, {0, 4, difference},
      {0, 4, sum}, {23, 16, sum}, {14, 23, sum}, {2, 10, sum}, {2, 10, difference}, {12, 26, difference},
      {23, 28, difference}, {26, 17, sum}, {26, 25, difference}, {22, 27, difference}, {22, 27, sum},
      {19, 27, difference}, {19, 33, sum}, {5, 8, sum}, {5, 8, difference}, {36, 32, sum}, {36, 19, sum},
      {22, 39, difference}, {36, 34, difference}, {24, 41, sum}, {24, 41, difference}, {40, 30, difference},
      {40, 30, sum}, {38, 21, difference}, {38, 21, sum}, {18, 37, sum}, {15, 48, sum}, {29, 49, sum},
      {29, 49, difference}, {13, 37, difference}, {13, 37, sum}, {15, 53, difference}, {18, 52, sum},
      {55, 31, difference}, {55, 31, negated_sum}, {35, 54, difference}, {35, 54, sum}};
  static constexpr uint16_t outputs[] = {
      44, 50, 58, 56, 42, 46, 43, 47, 59, 45, 51, 57};
};

template <>
struct Order<20, false> {  // 128 additions, 6.40 an element
  static constexpr Step steps[] = {
      {2, 19, sum}, {2, 19, difference}, {18, 21, sum}, {3, 18, sum}, {3, 18, difference}, {0, 24, difference},
      {1, 23, difference}, {1, 20, sum}, {1, 20, difference}, {8, 21, sum}, {8, 13, sum}, {8, 13, difference},
      {24, 31, difference}, {0, 31, sum}, {4, 17, sum}, {4, 17, difference}, {22, 35, difference}, {29, 35, sum},
      {34, 30, sum}, {9, 34, sum}, {9, 12, sum}, {9, 12, difference}, {1, 40, difference}, {42, 38, sum},
      {43, 16, difference}, {23, 40, sum}, {45, 28, sum}, {46, 11, difference}, {10, 11, sum}, {10, 11, difference},
      {2, 49, sum}, {36, 49, difference}, {51, 33, difference}, {10, 35, sum}, {35, 49, difference}, {23, 48, sum},
      {44, 48, difference}, {42, 55, sum}, {57, 13, difference}, {1, 54, sum}, {59, 32, sum}, {5, 16, sum},
      {5, 16, difference}, {12, 62, sum}, {63, 31, sum}, {64, 49, difference}, {65, 25, difference}, {53, 62, sum},
      {0, 62, sum}, {3, 61, sum}, {61, 27, sum}, {34, 61, sum}, {71, 26, sum}, {72, 19, difference},
      {73, 30, difference}, {21, 68, sum}, {70, 15, difference}, {76, 34, difference}, {77, 48, difference},
      {6, 15, sum}, {6, 15, difference}, {6, 41, sum}, {81, 0, difference}, {67, 80, sum}, {83, 33, difference},
      {69, 79, sum}, {85, 1, difference}, {79, 27, sum}, {58, 79, difference}, {39, 79, difference}, {0, 79, sum},
      {0, 80, sum}, {80, 41, difference}, {17, 92, sum}, {93, 75, difference}, {87, 14, difference},
      {95, 61, difference}, {96, 30, difference}, {7, 14, sum}, {7, 14, difference}, {60, 99, difference},
      {100, 75, difference}, {101, 92, difference}, {50, 99, difference}, {103, 41, difference}, {7, 41, sum},
      {105, 54, difference}, {106, 25, difference}, {104, 91, difference}, {5, 99, sum}, {109, 21, difference},
      {110, 24, difference}, {111, 91, difference}, {82, 99, difference}, {113, 32, difference}, {37, 99, sum},
      {115, 68, difference}, {98, 40, sum}, {90, 117, sum}, {118, 55, sum}, {119, 38, sum}, {120, 70, sum},
      {86, 117, difference}, {4, 98, sum}, {123, 30, difference}, {124, 48, difference}, {125, 26, difference},
      {89, 98, difference}, {127, 28, difference}, {47, 98, difference}, {84, 129, sum}, {84, 129, difference},
      {66, 128, sum}, {66, 128, difference}, {94, 126, sum}, {94, 126, difference}, {52, 122, sum},
      {52, 122, difference}, {116, 88, sum}, {116, 88, difference}, {114, 78, sum}, {114, 78, difference},
      {112, 56, sum}, {112, 56, difference}, {108, 74, sum}, {108, 74, difference}, {107, 97, sum},
      {107, 97, difference}};
  static constexpr uint16_t outputs[] = {
      121, 102, 144, 136, 134, 142, 140, 146, 138, 132, 130, 131, 133, 139, 147, 141, 143, 135, 137, 145};
};

template <>
struct Order<20, true> {  // 128 additions, 6.40 an element
  static constexpr Step steps[] = {
      {2, 19, sum}, {2, 19, difference}, {16, 21, sum}, {5, 16, sum}, {5, 16, difference}, {0, 24, sum},
      {21, 25, sum}, {13, 25, sum}, {27, 21, difference}, {8, 13, sum}, {8, 13, difference}, {2, 29, sum},
      {0, 30, sum}, {0, 15, sum}, {6, 15, sum}, {6, 15, difference}, {8, 34, sum}, {0, 34, difference}, {0, 35, sum},
      {11, 32, sum}, {10, 11, sum}, {10, 11, difference}, {5, 40, sum}, {29, 40, sum}, {9, 41, sum}, {9, 12, sum},
      {9, 12, difference}, {35, 46, difference}, {1, 45, difference}, {42, 48, difference}, {36, 48, difference},
      {1, 20, sum}, {1, 20, difference}, {23, 51, sum}, {7, 23, sum}, {54, 29, sum}, {55, 34, difference},
      {56, 51, difference}, {7, 14, sum}, {7, 14, difference}, {19, 59, sum}, {60, 46, sum}, {61, 38, sum},
      {62, 41, difference}, {33, 59, sum}, {10, 58, sum}, {58, 45, sum}, {37, 66, difference}, {1, 66, sum},
      {1, 59, sum}, {69, 26, sum}, {70, 47, sum}, {4, 26, sum}, {72, 47, difference}, {68, 18, difference},
      {74, 23, difference}, {75, 34, difference}, {34, 58, sum}, {77, 52, sum}, {78, 12, difference}, {3, 18, sum},
      {3, 18, difference}, {0, 81, difference}, {22, 81, sum}, {83, 38, sum}, {84, 59, difference},
      {81, 30, difference}, {64, 86, sum}, {87, 46, difference}, {44, 82, sum}, {89, 24, difference},
      {90, 30, difference}, {1, 80, difference}, {43, 92, sum}, {65, 80, difference}, {94, 45, difference},
      {95, 52, difference}, {80, 40, sum}, {67, 97, difference}, {50, 97, difference}, {93, 17, difference},
      {100, 58, difference}, {73, 101, sum}, {73, 101, difference}, {4, 17, sum}, {4, 17, difference},
      {3, 105, sum}, {106, 41, sum}, {107, 32, sum}, {108, 21, difference}, {105, 41, difference},
      {71, 110, difference}, {111, 86, difference}, {14, 110, sum}, {113, 82, sum}, {114, 46, difference},
      {28, 105, difference}, {116, 59, difference}, {39, 105, difference}, {118, 24, difference},
      {119, 35, difference}, {104, 29, sum}, {98, 121, difference}, {49, 121, difference}, {122, 53, difference},
      {31, 104, difference}, {125, 23, difference}, {126, 92, difference}, {6, 104, sum}, {128, 40, sum},
      {129, 53, difference}, {79, 104, difference}, {91, 131, sum}, {91, 131, difference}, {88, 130, sum},
      {88, 130, difference}, {63, 127, sum}, {63, 127, difference}, {85, 123, sum}, {85, 123, difference},
      {120, 96, sum}, {120, 96, difference}, {117, 99, sum}, {117, 99, difference}, {115, 57, sum},
      {115, 57, difference}, {109, 76, sum}, {109, 76, difference}};
  static constexpr uint16_t outputs[] = {
      124, 112, 136, 146, 102, 138, 134, 144, 142, 132, 140, 141, 133, 143, 145, 135, 139, 103, 147, 137};
};

template <>
struct Order<28, false> {  // 215 additions, 7.68 an element
  static constexpr Step steps[] = {
      {2, 3, sum}, {2, 3, difference}, {8, 29, sum}, {6, 8, sum}, {6, 8, difference}, {29, 32, difference},
      {29, 32, sum}, {28, 31, difference}, {15, 29, sum}, {15, 26, sum}, {15, 26, difference}, {0, 38, sum},
      {10, 38, sum}, {10, 19, sum}, {10, 19, difference}, {2, 42, sum}, {14, 42, sum}, {44, 39, difference},
      {14, 27, sum}, {14, 27, difference}, {42, 47, difference}, {17, 48, sum}, {17, 24, sum}, {17, 24, difference},
      {51, 39, sum}, {42, 52, sum}, {41, 50, sum}, {41, 50, difference}, {12, 50, sum}, {12, 20, sum},
      {12, 20, difference}, {57, 50, difference}, {25, 58, sum}, {60, 38, sum}, {13, 25, sum}, {13, 25, difference},
      {58, 63, sum}, {62, 37, sum}, {28, 62, sum}, {1, 62, difference}, {1, 37, difference}, {66, 68, sum},
      {37, 67, sum}, {21, 63, sum}, {71, 34, sum}, {11, 21, sum}, {11, 21, difference}, {20, 74, sum}, {75, 38, sum},
      {76, 29, difference}, {77, 48, difference}, {0, 74, sum}, {0, 73, sum}, {73, 46, difference},
      {28, 73, difference}, {13, 82, sum}, {70, 82, sum}, {84, 55, sum}, {83, 41, difference}, {85, 22, difference},
      {16, 22, sum}, {16, 22, difference}, {16, 32, sum}, {90, 58, sum}, {73, 88, difference}, {57, 88, sum},
      {28, 93, sum}, {0, 89, difference}, {0, 89, sum}, {36, 96, difference}, {4, 88, sum}, {4, 7, sum},
      {4, 7, difference}, {7, 79, difference}, {101, 64, difference}, {91, 100, difference}, {99, 65, sum},
      {1, 99, difference}, {86, 105, difference}, {99, 57, sum}, {107, 68, sum}, {108, 3, difference},
      {109, 31, difference}, {110, 81, difference}, {1, 104, sum}, {112, 9, difference}, {113, 94, difference},
      {100, 63, difference}, {45, 115, difference}, {116, 34, difference}, {100, 74, sum}, {100, 74, difference},
      {49, 118, sum}, {1, 118, sum}, {121, 64, sum}, {122, 89, difference}, {120, 58, difference},
      {124, 95, difference}, {18, 58, sum}, {126, 47, sum}, {127, 51, sum}, {128, 115, sum}, {129, 39, difference},
      {5, 51, sum}, {131, 32, difference}, {132, 42, difference}, {133, 79, difference}, {5, 9, sum},
      {5, 9, difference}, {0, 136, difference}, {136, 33, sum}, {102, 138, difference}, {61, 136, difference},
      {140, 32, difference}, {141, 51, difference}, {136, 51, difference}, {43, 143, sum}, {97, 143, difference},
      {145, 119, difference}, {144, 96, difference}, {142, 95, difference}, {78, 137, difference}, {1, 135, sum},
      {80, 150, sum}, {151, 54, sum}, {152, 104, sum}, {153, 94, sum}, {150, 27, difference}, {6, 135, sum},
      {156, 99, difference}, {157, 88, difference}, {158, 67, difference}, {159, 81, difference}, {11, 135, sum},
      {161, 55, sum}, {162, 57, difference}, {163, 37, difference}, {164, 105, difference}, {150, 59, sum},
      {166, 19, difference}, {167, 46, difference}, {168, 35, difference}, {150, 35, sum}, {170, 92, sum},
      {171, 23, difference}, {172, 41, difference}, {130, 173, sum}, {130, 173, difference}, {18, 23, sum},
      {18, 23, difference}, {63, 177, sum}, {147, 178, difference}, {40, 178, sum}, {180, 119, sum},
      {181, 96, difference}, {30, 177, sum}, {183, 58, difference}, {184, 53, difference}, {155, 176, difference},
      {186, 59, difference}, {187, 92, difference}, {117, 188, sum}, {117, 188, difference}, {31, 176, sum},
      {31, 176, difference}, {46, 176, difference}, {46, 191, sum}, {154, 194, sum}, {67, 194, sum},
      {196, 26, difference}, {197, 41, difference}, {198, 57, difference}, {98, 193, sum}, {200, 68, difference},
      {201, 54, difference}, {106, 193, difference}, {56, 192, sum}, {204, 62, difference}, {205, 88, difference},
      {206, 105, difference}, {69, 192, sum}, {208, 24, difference}, {209, 135, difference}, {125, 210, sum},
      {125, 210, difference}, {149, 207, sum}, {149, 207, difference}, {148, 203, sum}, {148, 203, difference},
      {139, 202, sum}, {139, 202, difference}, {146, 199, sum}, {146, 199, difference}, {185, 160, sum},
      {185, 160, difference}, {47, 177, difference}, {47, 177, sum}, {123, 224, difference},
      {225, 53, difference}, {226, 138, difference}, {134, 224, difference}, {72, 223, sum},
      {229, 95, difference}, {103, 223, difference}, {231, 137, difference}, {232, 87, sum},
      {232, 87, difference}, {230, 165, sum}, {230, 165, difference}, {228, 114, sum}, {228, 114, difference},
      {182, 169, sum}, {182, 169, difference}, {179, 111, sum}, {179, 111, difference}};
  static constexpr uint16_t outputs[] = {
      195, 227, 241, 242, 217, 237, 221, 218, 222, 238, 239, 235, 213, 215, 189, 219, 233, 211, 174,
      240, 214, 236, 234, 175, 212, 216, 220, 190};
};

template <>
struct Order<28, true> {  // 215 additions, 7.68 an element
  static constexpr Step steps[] = {
      {2, 3, sum}, {2, 3, difference}, {12, 29, sum}, {12, 20, sum}, {12, 20, difference}, {6, 32, sum}, {6, 8, sum},
      {6, 8, difference}, {2, 34, sum}, {28, 34, difference}, {29, 35, difference}, {29, 35, sum}, {9, 35, sum},
      {5, 9, sum}, {5, 9, difference}, {42, 38, sum}, {0, 42, difference}, {13, 42, sum}, {45, 35, sum},
      {13, 25, sum}, {13, 25, difference}, {32, 48, sum}, {24, 32, sum}, {17, 24, sum}, {17, 24, difference},
      {42, 52, difference}, {46, 52, sum}, {17, 41, sum}, {55, 28, difference}, {56, 47, difference},
      {31, 51, difference}, {1, 47, difference}, {1, 41, sum}, {4, 7, sum}, {4, 7, difference},
      {62, 48, difference}, {1, 61, difference}, {22, 62, sum}, {16, 22, sum}, {16, 22, difference},
      {0, 67, difference}, {54, 68, sum}, {69, 32, difference}, {50, 68, sum}, {11, 68, sum}, {72, 48, difference},
      {73, 39, difference}, {0, 67, sum}, {1, 67, sum}, {3, 75, sum}, {31, 66, sum}, {28, 78, sum}, {5, 79, sum},
      {80, 1, difference}, {61, 66, sum}, {82, 59, sum}, {47, 66, sum}, {84, 64, sum}, {85, 20, difference},
      {86, 51, difference}, {19, 75, sum}, {26, 75, sum}, {89, 53, sum}, {15, 26, sum}, {15, 26, difference},
      {88, 92, difference}, {70, 92, difference}, {1, 91, difference}, {47, 91, sum}, {61, 96, sum},
      {81, 97, difference}, {16, 91, difference}, {31, 91, sum}, {100, 64, sum}, {99, 59, difference},
      {57, 95, difference}, {101, 21, difference}, {104, 41, difference}, {11, 21, sum}, {11, 21, difference},
      {28, 106, difference}, {102, 108, difference}, {106, 66, difference}, {0, 106, difference},
      {111, 60, difference}, {0, 92, sum}, {0, 107, sum}, {4, 114, sum}, {115, 49, sum}, {116, 43, sum},
      {62, 107, sum}, {62, 107, difference}, {90, 119, sum}, {120, 29, difference}, {52, 113, sum}, {27, 113, sum},
      {123, 63, sum}, {124, 39, sum}, {23, 113, sum}, {126, 32, difference}, {18, 23, sum}, {18, 23, difference},
      {48, 129, sum}, {77, 130, sum}, {93, 130, difference}, {132, 119, difference}, {34, 128, sum},
      {34, 128, difference}, {87, 135, difference}, {103, 135, difference}, {14, 128, sum}, {138, 58, sum},
      {139, 110, sum}, {140, 60, difference}, {14, 27, sum}, {14, 27, difference}, {127, 143, difference},
      {144, 52, difference}, {145, 63, difference}, {106, 142, difference}, {142, 128, difference},
      {142, 134, sum}, {36, 147, sum}, {150, 61, difference}, {83, 147, sum}, {152, 8, difference},
      {153, 41, difference}, {151, 31, difference}, {155, 95, difference}, {10, 142, sum}, {157, 37, sum},
      {158, 60, difference}, {159, 58, difference}, {133, 160, sum}, {133, 160, difference}, {10, 19, sum},
      {10, 19, difference}, {164, 122, sum}, {131, 164, difference}, {166, 53, difference}, {40, 164, sum},
      {168, 114, sum}, {125, 164, difference}, {164, 143, difference}, {30, 171, sum}, {71, 171, difference},
      {173, 118, difference}, {172, 44, sum}, {175, 107, difference}, {176, 92, difference}, {33, 165, sum},
      {178, 29, difference}, {179, 129, difference}, {163, 64, sum}, {181, 148, sum}, {182, 25, difference},
      {183, 108, difference}, {15, 163, sum}, {185, 31, sum}, {186, 59, difference}, {187, 149, difference},
      {18, 163, sum}, {189, 60, difference}, {190, 37, difference}, {191, 110, difference}, {146, 192, sum},
      {146, 192, difference}, {163, 51, sum}, {163, 51, difference}, {105, 196, difference},
      {109, 196, difference}, {112, 195, difference}, {199, 97, difference}, {200, 79, difference},
      {201, 149, difference}, {95, 195, sum}, {203, 7, difference}, {204, 66, difference}, {205, 148, difference},
      {117, 206, sum}, {117, 206, difference}, {121, 188, sum}, {121, 188, difference}, {94, 184, sum},
      {94, 184, difference}, {143, 129, difference}, {143, 129, sum}, {76, 214, sum}, {215, 165, sum},
      {216, 43, sum}, {217, 118, difference}, {218, 49, difference}, {169, 214, sum}, {220, 52, difference},
      {74, 213, difference}, {65, 213, sum}, {223, 44, sum}, {224, 35, difference}, {225, 32, difference},
      {226, 198, sum}, {226, 198, difference}, {222, 197, sum}, {222, 197, difference}, {221, 98, sum},
      {221, 98, difference}, {180, 154, sum}, {180, 154, difference}, {177, 136, sum}, {177, 136, difference},
      {174, 137, sum}, {174, 137, difference}, {170, 141, sum}, {170, 141, difference}, {167, 156, sum},
      {167, 156, difference}};
  static constexpr uint16_t outputs[] = {
      202, 219, 241, 242, 207, 231, 233, 208, 234, 232, 161, 229, 235, 211, 239, 209, 227, 237, 193,
      162, 236, 230, 228, 194, 238, 212, 210, 240};
};

template <>
struct Order<36, false> {  // 284 additions, 7.89 an element
  static constexpr Step steps[] = {
      {0, 1, sum}, {0, 1, difference}, {2, 3, sum}, {2, 3, difference}, {37, 39, sum}, {37, 39, difference},
      {36, 38, difference}, {36, 38, sum}, {4, 5, sum}, {4, 5, difference}, {6, 7, sum}, {6, 7, difference},
      {8, 9, sum}, {8, 9, difference}, {10, 11, sum}, {10, 11, difference}, {12, 13, sum}, {12, 13, difference},
      {14, 15, sum}, {14, 15, difference}, {16, 17, sum}, {16, 17, difference}, {18, 19, sum}, {18, 19, difference},
      {20, 21, sum}, {20, 21, difference}, {59, 61, sum}, {59, 61, difference}, {58, 60, sum}, {58, 60, difference},
      {22, 23, sum}, {22, 23, difference}, {57, 67, sum}, {57, 67, difference}, {40, 68, difference}, {56, 66, sum},
      {56, 66, difference}, {43, 71, difference}, {24, 25, sum}, {24, 25, difference}, {55, 75, sum},
      {55, 75, difference}, {76, 62, difference}, {76, 62, sum}, {39, 79, sum}, {41, 79, sum}, {40, 78, sum},
      {54, 74, sum}, {54, 74, difference}, {83, 64, sum}, {83, 64, difference}, {43, 86, sum}, {38, 85, sum},
      {42, 85, sum}, {26, 27, sum}, {26, 27, difference}, {53, 91, sum}, {82, 92, difference}, {53, 91, difference},
      {52, 90, sum}, {87, 95, difference}, {52, 90, difference}, {28, 29, sum}, {28, 29, difference}, {51, 99, sum},
      {81, 100, difference}, {101, 68, minus_half}, {51, 99, difference}, {103, 94, sum}, {104, 63, sum},
      {103, 77, sum}, {50, 98, sum}, {89, 107, difference}, {108, 71, minus_half}, {50, 98, difference},
      {110, 97, sum}, {111, 65, sum}, {110, 84, sum}, {30, 31, sum}, {30, 31, difference}, {49, 115, sum},
      {49, 115, difference}, {105, 117, difference}, {118, 77, plus_half}, {117, 94, sum}, {116, 100, sum},
      {116, 100, difference}, {40, 122, sum}, {123, 76, difference}, {40, 116, difference}, {41, 121, sum},
      {48, 114, sum}, {48, 114, difference}, {112, 128, difference}, {129, 84, plus_half}, {128, 97, sum},
      {127, 107, difference}, {127, 107, sum}, {42, 133, sum}, {43, 127, difference}, {43, 132, sum},
      {136, 83, difference}, {32, 33, sum}, {32, 33, difference}, {47, 139, sum}, {126, 140, difference},
      {93, 140, plus_half}, {141, 92, minus_half}, {140, 68, sum}, {140, 68, difference}, {125, 145, difference},
      {146, 62, plus_half}, {80, 144, sum}, {41, 144, sum}, {47, 139, difference}, {150, 94, sum},
      {151, 69, difference}, {152, 63, difference}, {150, 103, sum}, {154, 69, sum}, {155, 77, difference},
      {156, 117, plus_half}, {150, 117, sum}, {158, 77, sum}, {159, 63, sum}, {160, 103, minus_half},
      {46, 138, sum}, {134, 162, difference}, {96, 162, plus_half}, {163, 95, minus_half}, {162, 71, sum},
      {162, 71, difference}, {135, 167, difference}, {168, 64, plus_half}, {42, 166, sum}, {46, 138, difference},
      {171, 97, sum}, {172, 72, difference}, {173, 65, difference}, {171, 110, sum}, {175, 72, sum},
      {176, 84, difference}, {177, 128, plus_half}, {171, 128, sum}, {179, 84, sum}, {180, 65, sum},
      {181, 110, minus_half}, {34, 35, sum}, {34, 35, difference}, {45, 184, sum}, {149, 185, difference},
      {186, 76, minus_half}, {124, 185, plus_half}, {185, 92, difference}, {185, 92, sum}, {148, 190, sum},
      {191, 121, sum}, {41, 190, sum}, {193, 62, difference}, {194, 116, minus_half}, {192, 36, difference},
      {70, 189, difference}, {197, 100, plus_half}, {37, 189, sum}, {199, 145, sum}, {200, 78, difference},
      {201, 122, difference}, {202, 38, difference}, {198, 161, sum}, {198, 161, difference},
      {205, 98, difference}, {204, 50, difference}, {195, 157, sum}, {195, 157, difference},
      {209, 114, difference}, {208, 48, difference}, {187, 119, sum}, {187, 119, difference},
      {213, 74, difference}, {212, 54, difference}, {45, 184, difference}, {216, 117, sum}, {217, 103, sum},
      {218, 69, difference}, {219, 150, minus_half}, {216, 77, sum}, {221, 69, sum}, {222, 63, difference},
      {223, 94, plus_half}, {120, 216, difference}, {225, 150, difference}, {226, 69, plus_half},
      {106, 216, difference}, {228, 94, difference}, {229, 63, minus_half}, {153, 216, minus_half},
      {188, 231, sum}, {188, 231, difference}, {233, 183, difference}, {232, 44, difference}, {44, 183, sum},
      {44, 183, difference}, {237, 128, sum}, {238, 110, sum}, {239, 72, difference}, {240, 171, minus_half},
      {237, 84, sum}, {242, 72, sum}, {243, 65, difference}, {244, 97, plus_half}, {131, 237, difference},
      {246, 171, difference}, {247, 72, plus_half}, {113, 237, difference}, {249, 97, difference},
      {250, 65, minus_half}, {174, 237, minus_half}, {170, 236, difference}, {253, 83, minus_half},
      {137, 236, plus_half}, {236, 95, difference}, {236, 95, sum}, {88, 257, sum}, {258, 166, sum},
      {259, 133, sum}, {260, 37, sum}, {42, 257, sum}, {262, 64, difference}, {263, 127, minus_half},
      {36, 256, sum}, {265, 167, sum}, {266, 132, difference}, {267, 86, difference}, {268, 39, sum},
      {73, 256, difference}, {270, 107, plus_half}, {271, 182, sum}, {271, 182, difference}, {273, 99, sum},
      {272, 51, sum}, {264, 178, sum}, {264, 178, difference}, {277, 115, sum}, {276, 49, sum}, {255, 252, sum},
      {255, 252, difference}, {281, 184, sum}, {280, 45, sum}, {254, 130, sum}, {254, 130, difference},
      {285, 75, sum}, {284, 55, sum}, {169, 251, sum}, {169, 251, difference}, {289, 61, sum}, {288, 59, sum},
      {109, 248, sum}, {109, 248, difference}, {293, 67, sum}, {292, 57, sum}, {165, 245, sum},
      {165, 245, difference}, {297, 91, sum}, {296, 53, sum}, {164, 241, sum}, {164, 241, difference},
      {301, 139, sum}, {300, 47, sum}, {147, 230, sum}, {147, 230, difference}, {305, 60, difference},
      {304, 58, difference}, {102, 227, sum}, {102, 227, difference}, {309, 66, difference},
      {308, 56, difference}, {143, 224, sum}, {143, 224, difference}, {313, 90, difference},
      {312, 52, difference}, {142, 220, sum}, {142, 220, difference}, {317, 138, difference},
      {316, 46, difference}};
  static constexpr uint16_t outputs[] = {
      261, 196, 269, 203, 283, 235, 303, 319, 279, 211, 275, 207, 299, 315, 287, 215, 295, 311, 291,
      307, 290, 306, 294, 310, 286, 214, 298, 314, 274, 206, 278, 210, 302, 318, 282, 234};
};

template <>
struct Order<36, true> : Order<36, false> {};
