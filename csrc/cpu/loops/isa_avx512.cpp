#if defined(__x86_64__)

// Standard headers come first, so that their inline functions are not compiled for this instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif

#include "../simd/avx512.h"
#include "instruction_set.h"

namespace zoext::cpu::avx512 {

extern const InstructionSet instruction_set;

namespace {

constexpr char name[] = "avx512";

}  // namespace

#include "loops.inl"

}  // namespace zoext::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
