#include "../simd/scalar.h"
#include "instruction_set.h"

namespace zoext::cpu::scalar {

extern const InstructionSet instruction_set;

namespace {

constexpr char name[] = "scalar";

}  // namespace

#include "loops.inl"

}  // namespace zoext::cpu::scalar
