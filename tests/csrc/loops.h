// The checks of one instruction set's loops against the core, which test_loops.cpp makes for each of them.
#pragma once

#include <cstdint>

#include "check.h"
#include "core/normal.h"
#include "core/sign.h"
#include "core/stream.h"
#include "cpu/loops/instruction_set.h"

namespace zoext {

void directions_are_the_cores(const cpu::InstructionSet& set);
void factored_directions_are_the_cores(const cpu::InstructionSet& set);
void displaced_weights_are_the_cores(const cpu::InstructionSet& set);
void products_of_rows_are_the_cores(const cpu::InstructionSet& set);
void linear_layers_are_the_cores(const cpu::InstructionSet& set);

inline float core_normal(const Field& field, uint64_t index) {
  const Words<uint32_t> words = field.words(index / 4);
  float sine, cosine;
  box_muller(words.w[index % 4 / 2 * 2], words.w[index % 4 / 2 * 2 + 1], sine, cosine);
  return index % 2 ? cosine : sine;
}

}  // namespace zoext
