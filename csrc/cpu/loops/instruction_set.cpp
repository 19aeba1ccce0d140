#include "instruction_set.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace zoext::cpu {

namespace scalar {
extern const InstructionSet instruction_set;
}
#if defined(__x86_64__)
namespace avx2 {
extern const InstructionSet instruction_set;
}
namespace avx512 {
extern const InstructionSet instruction_set;
}
#elif defined(__aarch64__)
namespace neon {
extern const InstructionSet instruction_set;
}
#endif

namespace {

std::vector<const InstructionSet*> available() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(&avx512::instruction_set);
  if (avx2) sets.push_back(&avx2::instruction_set);
#elif defined(__aarch64__)
  sets.push_back(&neon::instruction_set);  // part of the architecture
#endif
  sets.push_back(&scalar::instruction_set);
  return sets;
}

const InstructionSet& find(const std::string& name) {
  std::string known;
  for (const InstructionSet* set : available()) {
    if (name == set->name) return *set;
    known += (known.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here; use one of: " + known);
}

const InstructionSet& chosen_at_start() {
  const char* name = std::getenv("ZOEXT_ISA");
  return name && *name ? find(name) : *available().front();
}

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> set{&chosen_at_start()};
  return set;
}

}  // namespace

const InstructionSet& instruction_set() { return *current().load(std::memory_order_acquire); }

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : available()) names.emplace_back(set->name);
  return names;
}

void use_instruction_set(const std::string& name) { current().store(&find(name), std::memory_order_release); }

}  // namespace zoext::cpu
