// What the benchmarks share: their names, the terms they take, and how a pass over weights is timed.
#pragma once

#include <benchmark/benchmark.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/loops/weight_tile.h"
#include "weights.h"

namespace zoext::benchmarks {

// Registers `name/SET` for every instruction set of this processor: run(state, set).
template <class Run>
void for_each_set(const std::string& name, Run run) {
  for (const std::string& set_name : cpu::available_instruction_sets()) {
    cpu::use_instruction_set(set_name);
    const cpu::InstructionSet& set = cpu::instruction_set();
    benchmark::RegisterBenchmark((name + "/" + set_name).c_str(),
                                 [&set, run](benchmark::State& state) { run(state, set); });
  }
}

// Registers `name/cache/SET` and `name/memory/SET`: run(state, where, set).
template <class Run>
void for_each_place(const std::string& name, Run run) {
  for (const Where where : {Where::cache, Where::memory})
    for_each_set(
        name + (where == Where::cache ? "/cache" : "/memory"),
        [where, run](benchmark::State& state, const cpu::InstructionSet& set) { run(state, where, set); });
}

template <class Storage>
constexpr const char* dtype = nullptr;
template <>
inline constexpr const char* dtype<float> = "float32";
template <>
inline constexpr const char* dtype<double> = "float64";
template <>
inline constexpr const char* dtype<BFloat16> = "bfloat16";
template <>
inline constexpr const char* dtype<Half> = "float16";

// Large enough to move a weight of any dtype, and none of them zero: a zero would leave out its term.
constexpr float coefficient = 1e-3f;
constexpr uint32_t key = 7;
constexpr int adam = 0;  // its number among the rules

inline std::vector<cpu::Term> some_terms(int64_t count) {
  std::vector<cpu::Term> terms;
  for (int64_t k = 0; k < count; ++k)
    terms.push_back({k, step_seed(1, 0, static_cast<uint32_t>(k)), coefficient / static_cast<float>(1 + k)});
  return terms;
}

// A window as AdaMeZO has it, betas 0.7 and 0.9: a step per estimate, a term per step.
inline std::vector<cpu::Step> some_window(const std::vector<cpu::Term>& terms) {
  std::vector<cpu::Step> steps;
  for (size_t h = 0; h < terms.size(); ++h) {
    const auto lag = static_cast<float>(terms.size() - 1 - h);
    steps.push_back(
        {static_cast<int64_t>(h), 0.3f * std::pow(0.7f, lag), 0.1f * std::pow(0.9f, lag), &terms[h], 1});
  }
  return steps;
}

// Whether a pass moves most elements of a piece, and leaves all of them finite.
template <class Storage, class Work>
bool moves(const Piece<Storage>& piece, Work& work) {
  const int64_t count = Weights<Storage>::count();
  const Storage* const theta = piece.theta;
  const std::vector<Storage> before(theta, theta + count);
  work(piece);
  int64_t moved = 0, finite = 0;
  for (int64_t i = 0; i < count; ++i) {
    moved += std::memcmp(&theta[i], &before[i], sizeof(Storage)) != 0;
    finite += std::isfinite(widen(theta[i]));
  }
  return moved > count / 2 && finite == count;
}

// Times work(theta, residuals), a pass that reads and writes a piece of weights once. There are residuals
// where `rounding` keeps them.
template <class Storage, class Work>
void time_pass(benchmark::State& state, Where where, Rounding rounding, Work work) {
  Weights<Storage> weights(where, rounding);
  if (!moves(weights.next(), work)) throw std::logic_error("a pass leaves weights where they were, or not finite");
  for (auto _ : state) {
    work(weights.next());
    benchmark::ClobberMemory();
  }
  const int64_t elements = state.iterations() * Weights<Storage>::count();
  state.SetItemsProcessed(elements);
  state.SetBytesProcessed(2 * elements * Weights<Storage>::bytes_per_element(rounding));
}

// f(weights) over a piece, tile by tile as an operator does it on one thread.
template <class Storage, class F>
void for_each_weight_tile(const cpu::InstructionSet& set, const Piece<Storage>& piece, int64_t longest, F f) {
  const int64_t count = Weights<Storage>::count();
  cpu::for_each_tile(0, Span{0, count, count}, 0, count, longest, [&](const cpu::Tile& tile) {
    Storage* const theta = piece.theta + tile.local;
    int8_t* const residuals = piece.residuals ? piece.residuals + tile.local : nullptr;
    cpu::WeightTile<Storage> weights(set, tile, key, theta, theta, residuals);
    f(weights);
  });
}

}  // namespace zoext::benchmarks
