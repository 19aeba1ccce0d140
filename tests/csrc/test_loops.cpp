// The loops of every instruction set, bit for bit those of the core. test_core_in_cpp.py builds it with
// the files beside it that are called loops_*.cpp, and runs it.
#include <string>

#include "loops.h"

using namespace zoext;

int main() {
  std::string names;
  for (const std::string& name : cpu::available_instruction_sets()) {
    cpu::use_instruction_set(name);
    const cpu::InstructionSet& set = cpu::instruction_set();
    directions_are_the_cores(set);
    factored_directions_are_the_cores(set);
    displaced_weights_are_the_cores(set);
    products_of_rows_are_the_cores(set);
    linear_layers_are_the_cores(set);
    names += " " + name;
  }
  return finish(("instruction sets:" + names).c_str());
}
