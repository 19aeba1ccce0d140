// Factored displacements of linear layers on the CPU: threads divide the rows of activations.
#include "../../ops/factored_linear.h"

#include <algorithm>
#include <vector>

#include "terms.h"
#include "tiles.h"

namespace zoext::cpu {
namespace {

constexpr int64_t tile_rows = 24;  // share a pass over the weights; a multiple of what loops take at once

// The factors of a copy as far as they contribute. There are `count` products of each row, and a row of weights
// for each of them: of the left vectors and coefficients from `weight * step` on, as many as `terms`.
struct FactorsOfCopy {
  std::vector<const float*> right, left;
  std::vector<float> coefficients;
  int64_t terms = 0;

  int64_t count() const { return static_cast<int64_t>(right.size()); }
  const float* const* left_of(int64_t product) const { return left.data() + product * terms; }
  const float* coefficients_of(int64_t product) const { return coefficients.data() + product * terms; }
};

FactorsOfCopy factors_of(const ops::FactoredLinear& call, int64_t copy) {
  const FactoredLinearShape& shape = call.shape;
  const float* const coefficients = floats_in(call.coefficients) + copy * shape.terms;
  const auto left = [&](int64_t k, int64_t q) {
    return floats_in(call.left) + ((shape.has_shared_left ? 0 : k) * shape.rank + q) * shape.outputs;
  };
  const auto right = [&](int64_t k, int64_t q) {
    return floats_in(call.right) + ((shape.has_shared_right ? 0 : k) * shape.rank + q) * shape.features;
  };
  std::vector<int64_t> contributing;
  for (int64_t k = 0; k < shape.terms; ++k)
    if (contributes(coefficients[k])) contributing.push_back(k);
  FactorsOfCopy factors;
  if (contributing.empty()) return factors;
  const auto add = [&](int64_t k, int64_t q) {
    factors.left.push_back(left(k, q));
    factors.coefficients.push_back(coefficients[k]);
  };
  if (shape.has_shared_right) {
    factors.terms = static_cast<int64_t>(contributing.size());
    for (int64_t q = 0; q < shape.rank; ++q) {
      factors.right.push_back(right(0, q));
      for (const int64_t k : contributing) add(k, q);
    }
  } else {
    factors.terms = 1;
    for (const int64_t k : contributing)
      for (int64_t q = 0; q < shape.rank; ++q) {
        factors.right.push_back(right(k, q));
        add(k, q);
      }
  }
  return factors;
}

// What a thread works in: the products of a tile, and the weights of a stretch of columns.
template <class Number>
struct Workspace {
  explicit Workspace(int64_t products_of_row)
      : products(static_cast<size_t>(tile_rows * products_of_row)),
        weights(static_cast<size_t>(linear_columns * products_of_row)) {}

  std::vector<Number> products, weights;
};

template <class Storage>
void add_to_tile(const LinearLoops<Storage>& loops, const FactoredLinearShape& shape, const FactorsOfCopy& factors,
                 const Storage* input, Storage* out, int64_t rows,
                 Workspace<typename Arithmetic<Storage>::type>& work) {
  loops.multiply(input, rows, shape.features, factors.right.data(), factors.count(), work.products.data());
  std::vector<const float*> left(static_cast<size_t>(factors.terms));
  for (int64_t column = 0; column < shape.outputs; column += linear_columns) {
    const int64_t columns = std::min(linear_columns, shape.outputs - column);
    for (int64_t v = 0; v < factors.count(); ++v) {
      std::transform(factors.left_of(v), factors.left_of(v) + factors.terms, left.begin(),
                     [&](const float* vector) { return vector + column; });
      loops.combine(left.data(), factors.coefficients_of(v), factors.terms, columns,
                    work.weights.data() + v * linear_columns);
    }
    loops.add(out + column, rows, shape.outputs, columns, work.products.data(), work.weights.data(),
              factors.count());
  }
}

template <class Storage>
void add(const ops::FactoredLinear& call) {
  const FactoredLinearShape& shape = call.shape;
  const LinearLoops<Storage>& loops = instruction_set().storage<Storage>().linear;
  const auto* const input = static_cast<const Storage*>(call.input.const_data_ptr());
  auto* const out = static_cast<Storage*>(call.out.mutable_data_ptr());
  std::vector<FactorsOfCopy> copies;
  for (int64_t copy = 0; copy < shape.copies; ++copy) copies.push_back(factors_of(call, copy));

  constexpr int64_t worth_a_thread = 1 << 15;  // products
  const int64_t products = shape.products() * (shape.features + shape.outputs);
  torch::stable::parallel_for(0, shape.copies * shape.rows, (worth_a_thread + products - 1) / products,
                              [&](int64_t begin, int64_t end) {
                                const IeeeArithmetic ieee;
                                Workspace<typename Arithmetic<Storage>::type> work(shape.products());
                                for (int64_t row = begin, next; row < end; row = next) {
                                  const int64_t copy = row / shape.rows;
                                  const FactorsOfCopy& factors = copies[static_cast<size_t>(copy)];
                                  next = std::min(end, (copy + 1) * shape.rows);
                                  if (factors.count() == 0) continue;
                                  next = std::min(next, row + tile_rows);
                                  add_to_tile(loops, shape, factors, input + row * shape.features,
                                              out + row * shape.outputs, next - row, work);
                                }
                              });
}

void add_any(const ops::FactoredLinear& call) {
  for_storage(call.out.scalar_type(), [&](auto storage) { add<decltype(storage)>(call); });
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) {
  m.impl("factored_linear_", TORCH_BOX(&zoext::ops::factored_linear_<&zoext::cpu::add_any>));
}
