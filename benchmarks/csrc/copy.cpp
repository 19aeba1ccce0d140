// memcpy, the reference for what memory allows.
#include <cstring>

#include "passes.h"

namespace zoext::benchmarks {

// One half of a piece to the other: as many bytes of cache as a pass takes, read and written.
void copy(benchmark::State& state, Where where) {
  Weights<float> weights(where, Rounding::nearest);
  const int64_t bytes = piece_bytes() / 2;
  for (auto _ : state) {
    char* const piece = reinterpret_cast<char*>(weights.next().theta);
    std::memcpy(piece, piece + bytes, static_cast<size_t>(bytes));
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * bytes / static_cast<int64_t>(sizeof(float)));
  state.SetBytesProcessed(state.iterations() * 2 * bytes);
}

void register_copy() {
  benchmark::RegisterBenchmark("copy/cache", copy, Where::cache);
  benchmark::RegisterBenchmark("copy/memory", copy, Where::memory);
}

}  // namespace zoext::benchmarks
