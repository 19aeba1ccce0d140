// Google Benchmark over csrc/core and the loops of csrc/cpu, on one thread. See benchmarks/README.md.
#include <benchmark/benchmark.h>

#include <string>

#include "weights.h"

namespace zoext::benchmarks {

void register_copy();
void register_noise();
void register_dense();
void register_windows();
void register_factored();
void register_power_iteration();

}  // namespace zoext::benchmarks

int main(int count, char** arguments) {
  using namespace zoext::benchmarks;
  benchmark::Initialize(&count, arguments);
  if (benchmark::ReportUnrecognizedArguments(count, arguments)) return 1;
  benchmark::AddCustomContext("bytes of a piece", std::to_string(piece_bytes()));
  benchmark::AddCustomContext("bytes of pieces in memory", std::to_string(memory_bytes()));
  register_copy();
  register_noise();
  register_dense();
  register_windows();
  register_factored();
  register_power_iteration();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
