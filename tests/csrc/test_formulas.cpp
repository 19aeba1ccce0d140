// What an element becomes in a step, and its place in the whole tensor. test_core_in_cpp.py builds and runs
// it.
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "check.h"
#include "core/combine.h"
#include "core/rules.h"
#include "core/span.h"

using namespace zoext;

namespace {

void an_empty_sum_moves_no_bit() {
  for (float theta : {0.0f, -0.0f, 1.0f, -INFINITY, std::numeric_limits<float>::denorm_min()})
    CHECK(bits_of(theta + add_decay(0.0f, theta, empty_sum)) == bits_of(theta), "theta %a", theta);
  CHECK(!contributes(0.0f) && !contributes(-0.0f) && contributes(NAN) && contributes(1e-45f), "contributes");
  CHECK(add_term(2.0f, 3.0f, 1.0f) == 7.0f && add_decay(0.5f, 4.0f, 1.0f) == -1.0f, "one term, one decay");
}

void moves_are_those_of_the_rules() {
  // Estimates 3 and -1 with weights 1/4 and 1/2 in m, 1/4 and 3/4 in v.
  const float m = add_first_moment(0.5f, -1.0f, add_first_moment(0.25f, 3.0f, empty_sum));
  const float v = add_second_moment(0.75f, -1.0f, add_second_moment(0.25f, 3.0f, 0.0f));
  CHECK(m == 0.25f && v == 3.0f, "m %a, v %a", m, v);
  // -lr m / sqrt(v + eps) with eps 1
  CHECK(rules::Adam::move(-16.0f, 1.0f, m, v) == -2.0f, "%a", rules::Adam::move(-16.0f, 1.0f, m, v));
  const double third = rules::Adam::move(-1.0, 0.0, 1.0, 9.0);
  CHECK(third == -1.0 / 3, "%a", third);
  // -lr m / (sqrt(v) + eps) with v 9 and eps 1
  const float scalar = rules::ScalarAdam::move(-16.0f, 1.0f, m, 9.0f);
  CHECK(scalar == -1.0f, "%a", scalar);
  for (const float moment : {2.0f, 1e-45f, INFINITY})
    CHECK(rules::Sign::move(-3.0f, 0.0f, moment, 0.0f) == -3.0f &&
              rules::Sign::move(-3.0, 0.0, -double{moment}, 0.0) == 3.0,
          "sign of %a", moment);
  for (const float none : {0.0f, -0.0f, NAN})
    CHECK(bits_of(rules::Sign::move(-3.0f, 0.0f, none, 0.0f)) == bits_of(-0.0f), "the sign of %a moves theta",
          none);
}

void rules_are_numbered_in_their_order() {
  int number = 0;
  for (const char* name : Rules::names) {
    Rules::call(number, [&](auto rule) { CHECK(rule.name == name, "rule %d is %s", number, rule.name); });
    ++number;
  }
  CHECK(number == 3, "%d rules", number);
}

void spans_find_the_place_in_the_whole() {
  // Rows 2 to 4 and columns 3 to 7 of a matrix of 11 columns.
  const Span block{2 * 11 + 3, 5, 11};
  int64_t i = 0;
  for (uint64_t row = 2; row < 5; ++row)
    for (uint64_t column = 3; column < 8; ++column)
      CHECK(block.index(i++) == row * 11 + column, "element %d", int(i));
  const Span shard{int64_t{1} << 40, 100, 0};
  CHECK(shard.index(99) == (uint64_t{1} << 40) + 99, "one run");
  const Span far{(int64_t{1} << 62) - 7, 3, int64_t{1} << 33};
  CHECK(far.index(3 * 1000 + 2) == (uint64_t{1} << 62) - 7 + 1000 * (uint64_t{1} << 33) + 2, "64 bits");
}

}  // namespace

int main() {
  an_empty_sum_moves_no_bit();
  moves_are_those_of_the_rules();
  rules_are_numbered_in_their_order();
  spans_find_the_place_in_the_whole();
  return finish("steps and spans");
}
