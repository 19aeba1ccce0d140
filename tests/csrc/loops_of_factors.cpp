// Directions L^T R of matrices.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/combine.h"
#include "core/moments.h"
#include "loops.h"

namespace zoext {
namespace {

using cpu::InstructionSet;
using cpu::tile_elements;

// A matrix whose factors lie in memory without a number to spare.
struct FactoredMatrix {
  int64_t rows, columns, rank;
  std::vector<float> left, right;

  FactoredMatrix(int64_t rows, int64_t columns, int64_t rank) : rows(rows), columns(columns), rank(rank) {
    const Field field{21, 0, 0};
    for (int64_t i = 0; i < 2 * rank * rows; ++i) left.push_back(core_normal(field, i));
    for (int64_t i = 0; i < 2 * rank * columns; ++i) right.push_back(core_normal(field, 1000000 + i));
  }

  // Of term `term`: the sum over the rank, in its order.
  template <class Number>
  Number entry(int64_t term, int64_t element) const {
    const int64_t row = element / columns, column = element % columns;
    Number sum{empty_sum};
    for (int64_t q = term * rank; q < (term + 1) * rank; ++q)
      sum = add_term<Number>(left[q * rows + row], right[q * columns + column], sum);
    return sum;
  }
};

template <class Number>
void entries_are_the_cores(const InstructionSet& set, const FactoredMatrix& matrix) {
  const cpu::Term terms[] = {{1, 0, 0.3f}, {0, 0, -1.7f}};
  const cpu::Step steps[] = {{0, 0.2f, 0.4f, terms, 1}, {1, 0.5f, 0.1f, terms, 2}};
  const cpu::Factors factors{
      matrix.left.data(),        matrix.right.data(),         matrix.rows, matrix.columns, matrix.rank,
      matrix.rank * matrix.rows, matrix.rank * matrix.columns};
  const cpu::FactoredLoops<Number>& loops = set.arithmetic<Number>().factored;
  const Number minus_lr = -0.1f, eps = 1e-3f;
  const int64_t elements = matrix.rows * matrix.columns;
  for (int64_t from : {int64_t{0}, elements / 3, elements - 1}) {
    const int64_t count = std::min<int64_t>(elements - from, tile_elements);
    std::vector<Number> sum(count + cpu::widest_pack - 1), change(sum);
    loops.combine(factors, terms, 2, from, count, sum.data(), cpu::nothing);
    loops.step(factors, steps, 2, minus_lr, eps, from, count, change.data(), cpu::nothing);
    for (int64_t i = 0; i < count; ++i) {
      const Number one = add_term<Number>(0.3f, matrix.entry<Number>(1, from + i), Number{empty_sum});
      const Number both = add_term<Number>(-1.7f, matrix.entry<Number>(0, from + i), one);
      Number m{empty_sum}, v{0};
      add_moments<Number>(0.2f, 0.4f, one, m, v);
      add_moments<Number>(0.5f, 0.1f, both, m, v);
      CHECK(same(sum[i], both), "%s: element %d is %a, not %a", set.name, int(from + i), double(sum[i]),
            double(both));
      CHECK(same(change[i], moments_step(minus_lr, eps, m, v)), "%s: step of element %d is %a", set.name,
            int(from + i), double(change[i]));
    }
  }
}

}  // namespace

void factored_directions_are_the_cores(const InstructionSet& set) {
  for (int64_t columns : {1, 2, 7, 16, 17, 64, 131, 1500})
    for (int64_t rank : {0, 1, 3}) {
      entries_are_the_cores<float>(set, {70, columns, rank});
      entries_are_the_cores<double>(set, {70, columns, rank});
    }
}

}  // namespace zoext
