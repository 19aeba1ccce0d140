// The parts of a power iteration: a pass over activations, the orthonormalisation of a vector, and the
// small eigenproblem. What the operator adds to them is the division of tokens among threads.
#include <algorithm>

#include "cpu/loops/vectors.h"
#include "passes.h"

namespace zoext::benchmarks {
namespace {

std::vector<float> normals(const cpu::InstructionSet& set, int64_t count) {
  std::vector<float> z(static_cast<size_t>(count));
  set.fp32.normals.start({1, key, static_cast<uint32_t>(Stream::power_iteration)}, 1.0f, 0, count, z.data(),
                         cpu::nothing);
  return z;
}

// sum = sum_t <row_t, vector> row_t over a piece of rows, each of which comes from memory once.
template <class Storage>
void add_products(const cpu::InstructionSet& set, const Storage* piece, const float* vector, float* sum) {
  float converted[cpu::most_rows * columns];
  const int64_t rows = Weights<Storage>::count() / columns;
  for (int64_t t = 0; t < rows; t += cpu::most_rows) {
    const int count = static_cast<int>(std::min<int64_t>(cpu::most_rows, rows - t));
    const float* row[cpu::most_rows];
    for (int i = 0; i < count; ++i) {
      const Storage* const stored = piece + (t + i) * columns;
      if constexpr (std::is_same_v<Storage, float>) {
        row[i] = stored;
      } else {
        set.storage<Storage>().to_fp32(stored, columns, converted + i * columns);
        row[i] = converted + i * columns;
      }
    }
    float products[cpu::most_rows];
    set.rows.dot(row, count, vector, columns, products);
    (t == 0 ? set.rows.start : set.rows.add)(row, count, products, columns, sum);
  }
}

template <class Storage>
void rows(benchmark::State& state, Where where, const cpu::InstructionSet& set) {
  Weights<Storage> activations(where, Rounding::nearest);
  const std::vector<float> vector = normals(set, columns);
  std::vector<float> sum(columns);
  for (auto _ : state) {
    add_products(set, activations.next().theta, vector.data(), sum.data());
    benchmark::DoNotOptimize(sum.data());
    benchmark::ClobberMemory();
  }
  const int64_t elements = state.iterations() * Weights<Storage>::count();
  state.SetItemsProcessed(elements);
  state.SetBytesProcessed(elements * static_cast<int64_t>(sizeof(Storage)));
}

// A vector against eight others: items are elements of these, each of which is read four times.
void orthonormal(benchmark::State& state, const cpu::InstructionSet& set) {
  constexpr int64_t count = 8;
  const cpu::VectorLoops loops{set};
  std::vector<float> basis = normals(set, (count + 1) * columns), projections(count);
  const auto finish = [&](int64_t q) {
    orthonormalise(loops, basis.data(), q, &basis[q * columns], columns, projections.data());
  };
  for (int64_t q = 0; q < count; ++q) finish(q);
  // A vector that is orthonormal already takes the same operations as one that is not.
  for (auto _ : state) {
    finish(count);
    benchmark::ClobberMemory();
  }
  const float* const vector = &basis[count * columns];
  if (std::abs(loops.dot(vector, vector, columns) - 1.0f) > 1e-5f)
    throw std::logic_error("a vector is not normal");
  state.SetItemsProcessed(state.iterations() * count * columns);
}

// The Rayleigh-Ritz step of `size` vectors in four blocks; items are eigenproblems.
void ritz(benchmark::State& state, int64_t size) {
  const cpu::InstructionSet& set = cpu::instruction_set();
  const int64_t tokens = cpu::tile_alignment, rank = size / 4;
  const std::vector<float> products = normals(set, size * tokens);
  std::vector<double> gram(size * size), memory(Eigenproblem::doubles(size));
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j)
      for (int64_t t = 0; t < tokens; ++t)
        gram[i * size + j] += double{products[i * tokens + t]} * double{products[j * tokens + t]};
  std::vector<float> coefficients(rank * size), values(rank);
  for (auto _ : state) {
    std::copy(gram.begin(), gram.end(), memory.begin());
    solve_ritz(cpu::OneThread{}, Eigenproblem::in(memory.data(), size), rank, 1.0f, coefficients.data(),
               values.data());
    benchmark::DoNotOptimize(coefficients.data());
    benchmark::DoNotOptimize(values.data());
    benchmark::ClobberMemory();
  }
  if (!(values[0] > 0.0f)) throw std::logic_error("an eigenproblem has no solution");
  state.SetItemsProcessed(state.iterations());
}

}  // namespace

void register_power_iteration() {
  for_each_place("power_iteration/rows/float32", rows<float>);
  for_each_place("power_iteration/rows/bfloat16", rows<BFloat16>);
  for_each_set("power_iteration/orthonormalise", orthonormal);
  for (const int64_t size : {4, 16})
    benchmark::RegisterBenchmark(("power_iteration/ritz/vectors:" + std::to_string(size)).c_str(), ritz, size);
}

}  // namespace zoext::benchmarks
