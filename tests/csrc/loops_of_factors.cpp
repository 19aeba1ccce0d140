// Directions L^T R of matrices.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/combine.h"
#include "core/rules.h"
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
  const int64_t elements = matrix.rows * matrix.columns;
  for (int64_t from : {int64_t{0}, elements / 3, elements - 1}) {
    const int64_t count = std::min<int64_t>(elements - from, tile_elements);
    std::vector<Number> sum(count + cpu::widest_pack - 1);
    loops.combine(factors, terms, 2, from, count, sum.data(), cpu::nothing);
    std::vector<Number> m, v;
    for (int64_t i = 0; i < count; ++i) {
      const Number one = add_term<Number>(0.3f, matrix.entry<Number>(1, from + i), Number{empty_sum});
      const Number both = add_term<Number>(-1.7f, matrix.entry<Number>(0, from + i), one);
      m.push_back(add_first_moment<Number>(0.5f, both, add_first_moment<Number>(0.2f, one, Number{empty_sum})));
      v.push_back(add_second_moment<Number>(0.1f, both, add_second_moment<Number>(0.4f, one, Number{0})));
      CHECK(same(sum[i], both), "%s: element %d is %a, not %a", set.name, int(from + i), double(sum[i]),
            double(both));
    }
    for (int number = 0; number < Rules::count; ++number)
      Rules::call(number, [&](auto functor) {
        using Rule = decltype(functor);
        const bool has_v = Rule::second_moment == SecondMoment::elements;
        const Number shared_v = Rule::second_moment == SecondMoment::projections ? Number(0.7f) : Number{0};
        const cpu::Scale<Number> scale{Number(-0.1f), Number(1e-3f), shared_v};
        std::vector<Number> change(count + cpu::widest_pack - 1);
        set.arithmetic<Number>().rules[number].move_factored(factors, steps, 2, scale, from, count, change.data(),
                                                             cpu::nothing);
        for (int64_t i = 0; i < count; ++i)
          CHECK(same(change[i], Rule::move(scale.minus_lr, scale.eps, m[i], has_v ? v[i] : shared_v)),
                "%s, %s: move of element %d is %a", set.name, Rule::name, int(from + i), double(change[i]));
      });
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
