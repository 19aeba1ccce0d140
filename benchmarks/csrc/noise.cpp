// Random words, normals and signs alone, into a tile that stays in the first-level cache.
#include "passes.h"

namespace zoext::benchmarks {
namespace {

constexpr int64_t count = cpu::tile_elements;
constexpr Field field{0x123456789abcdef, key, static_cast<uint32_t>(Stream::dense)};

template <class Number, class Write>
void time_tiles(benchmark::State& state, Write write) {
  alignas(64) Number tile[count];
  uint64_t index = 0;
  for (auto _ : state) {
    write(index, tile);
    benchmark::DoNotOptimize(&tile[0]);
    benchmark::ClobberMemory();
    index += count;
  }
  state.SetItemsProcessed(state.iterations() * count);
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(sizeof(tile)));
}

void rounding_bits(benchmark::State& state, const cpu::InstructionSet& set) {
  time_tiles<uint16_t>(state,
                       [&](uint64_t index, uint16_t* tile) { set.rounding_bits(field, index, count, tile); });
}

void time_direction(benchmark::State& state, const cpu::DirectionLoops<float>& direction) {
  time_tiles<float>(
      state, [&](uint64_t index, float* tile) { direction.start(field, 1.0f, index, count, tile, cpu::nothing); });
}

}  // namespace

void register_noise() {
  for_each_set("noise/rounding_bits", rounding_bits);
  for_each_set("noise/normals", [](benchmark::State& state, const cpu::InstructionSet& set) {
    time_direction(state, set.fp32.normals);
  });
  for_each_set("noise/signs", [](benchmark::State& state, const cpu::InstructionSet& set) {
    time_direction(state, set.fp32.signs);
  });
}

}  // namespace zoext::benchmarks
