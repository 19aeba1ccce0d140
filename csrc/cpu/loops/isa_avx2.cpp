#if defined(__x86_64__)

// Standard headers come first, so that their inline functions are not compiled for this instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "../simd/avx2.h"
#include "instruction_set.h"

namespace zoext::cpu::avx2 {

extern const InstructionSet instruction_set;

namespace {

constexpr char name[] = "avx2";

}  // namespace

#include "loops.inl"

}  // namespace zoext::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
