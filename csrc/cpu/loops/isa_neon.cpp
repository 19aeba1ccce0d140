#include "instruction_set.h"

#if defined(__aarch64__)

#include "../simd/neon.h"

namespace zoext::cpu::neon {

extern const InstructionSet instruction_set;

namespace {

constexpr char name[] = "neon";

}  // namespace

#include "loops.inl"

}  // namespace zoext::cpu::neon

#endif  // __aarch64__
