// Noise, dense directions, and what the rules make of their moments.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/combine.h"
#include "core/rules.h"
#include "core/storage.h"
#include "loops.h"

namespace zoext {
namespace {

using cpu::InstructionSet;
using cpu::tile_alignment;
using cpu::tile_elements;

// Aligned starts from which a tile crosses each carry of the counter: normals, rounding bits, signs.
const std::vector<uint64_t> starts = {0,
                                      tile_alignment,
                                      (1ull << 34) - tile_alignment,
                                      (1ull << 34) - 5 * tile_alignment,
                                      (1ull << 36) - tile_alignment,
                                      (1ull << 36) - 2 * tile_alignment,
                                      (1ull << 39) - 3 * tile_alignment,
                                      (1ull << 62) - tile_alignment};

void rounding_bits_are_the_cores(const InstructionSet& set) {
  const Field field{0xfedcba9876543210ull, 9, 3};
  for (uint64_t start : starts)
    for (int64_t count : {tile_alignment, 3 * tile_alignment, tile_elements}) {
      std::vector<uint16_t> out(count + 64, 0xabcd);
      set.rounding_bits(field, start, count, out.data());
      for (int64_t i = 0; i < count; ++i)
        CHECK(out[i] == rounding_bits(field, start + i), "%s: element %d from %llu", set.name, int(i),
              static_cast<unsigned long long>(start));
      for (size_t i = count; i < out.size(); ++i)
        CHECK(out[i] == 0xabcd, "%s writes beyond %d elements", set.name, int(count));
    }
}

float core_sign(const Field& field, uint64_t index) {
  return sign_of_bit(sign_word(field, index), static_cast<unsigned>(index % 32));
}

template <class Number, class Core>
void terms_are_the_cores(const InstructionSet& set, const cpu::DirectionLoops<Number>& loops, Core core) {
  const Field one{11, 2, 6}, other{~0ull, 2, 6};
  const Number guard = 77;
  for (uint64_t start : starts)
    for (int64_t count : {tile_alignment, 5 * tile_alignment, tile_elements}) {
      std::vector<Number> buffer(count + 32, guard);
      Number* sum = buffer.data() + 16;
      loops.start(one, Number(0.3f), start, count, sum, cpu::nothing);
      loops.add(other, Number(-1.7f), start, count, sum, cpu::nothing);
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t index = start + static_cast<uint64_t>(i);
        const Number first = add_term<Number>(0.3f, core(one, index), Number{empty_sum});
        const Number expected = add_term<Number>(-1.7f, core(other, index), first);
        CHECK(same(sum[i], expected), "%s: element %llu is %a, not %a", set.name,
              static_cast<unsigned long long>(index), double(sum[i]), double(expected));
      }
      for (int i = 0; i < 16; ++i)
        CHECK(buffer[i] == guard && sum[count + i] == guard, "%s writes beyond the tile", set.name);
    }
}

template <class Rule, class Number, class Core>
void moves_are_the_cores(const InstructionSet& set, const cpu::RuleLoops<Number>& rule,
                         typename cpu::RuleLoops<Number>::AddTerm add_term_to_moments,
                         const cpu::DirectionLoops<Number>& loops, Core core) {
  const Field older{11, 2, 6}, newer{~0ull, 2, 6};
  const Number guard = 77;
  const bool has_v = Rule::second_moment == SecondMoment::elements;
  const Number shared_v = Rule::second_moment == SecondMoment::projections ? Number(0.7f) : Number{0};
  const cpu::Scale<Number> scale{Number(-0.1f), Number(1e-3f), shared_v};
  for (uint64_t start : starts)
    for (int64_t count : {tile_alignment, 5 * tile_alignment}) {
      std::vector<Number> m(count + 16, guard), v(count + 16, guard), g(count), change(count + 16, guard);
      std::fill_n(m.data(), count, Number{empty_sum});
      if (has_v) std::fill_n(v.data(), count, Number{0});
      add_term_to_moments(older, Number(0.3f), Number(0.2f), Number(0.4f), start, count, m.data(), v.data(),
                          cpu::nothing);
      loops.start(newer, Number(-1.7f), start, count, g.data(), cpu::nothing);
      loops.add(older, Number(0.9f), start, count, g.data(), cpu::nothing);
      rule.add_estimate({g.data(), Number(0.5f), Number(0.1f)}, count, m.data(), v.data());
      rule.move(scale, m.data(), v.data(), count, change.data());
      std::vector<Number> first_g(count), both(count + 16, guard);
      loops.start(older, Number(0.3f), start, count, first_g.data(), cpu::nothing);
      const cpu::Estimate<Number> estimates[] = {{first_g.data(), Number(0.2f), Number(0.4f)},
                                                 {g.data(), Number(0.5f), Number(0.1f)}};
      rule.move_estimates(estimates, 2, scale, count, both.data());
      CHECK(both == change, "%s, %s: a move of estimates in memory", set.name, Rule::name);
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t index = start + static_cast<uint64_t>(i);
        const Number old_z = core(older, index), new_z = core(newer, index);
        const Number first = add_term<Number>(0.3f, old_z, Number{empty_sum});
        const Number second = add_term<Number>(0.9f, old_z, add_term<Number>(-1.7f, new_z, Number{empty_sum}));
        const Number mean =
            add_first_moment<Number>(0.5f, second, add_first_moment<Number>(0.2f, first, Number{empty_sum}));
        const Number square =
            has_v ? add_second_moment<Number>(0.1f, second, add_second_moment<Number>(0.4f, first, Number{0}))
                  : guard;
        CHECK(same(m[i], mean) && same(v[i], square), "%s, %s: moments of element %llu are %a and %a", set.name,
              Rule::name, static_cast<unsigned long long>(index), double(m[i]), double(v[i]));
        const Number expected = Rule::move(scale.minus_lr, scale.eps, mean, has_v ? square : shared_v);
        CHECK(same(change[i], expected), "%s, %s: move of element %llu is %a", set.name, Rule::name,
              static_cast<unsigned long long>(index), double(change[i]));
      }
      for (int i = 0; i < 16; ++i)
        CHECK(m[count + i] == guard && v[count + i] == guard && change[count + i] == guard,
              "%s, %s writes beyond the stretch", set.name, Rule::name);
    }
}

// The sign of everything that has none, or an uncertain one, in every lane.
template <class Number>
void signs_of_moments_are_the_cores(const InstructionSet& set) {
  const float values[] = {0.0f, -0.0f, NAN, -NAN, INFINITY, -INFINITY, 1e-45f, -1e-45f, 3.0f, -3.0f};
  std::vector<Number> m, change(tile_alignment);
  for (int i = 0; i < tile_alignment; ++i) m.push_back(values[i % 10]);
  const int sign = 1;
  set.arithmetic<Number>().rules[sign].move({-2, 0, 0}, m.data(), nullptr, tile_alignment, change.data());
  for (int i = 0; i < tile_alignment; ++i) {
    const Number expected = rules::Sign::move<Number>(-2, 0, m[i], 0);
    CHECK(same(change[i], expected), "%s: the sign of %a moves by %a", set.name, double(m[i]), double(change[i]));
  }
}

template <class Number>
void directions_of(const InstructionSet& set) {
  const cpu::ArithmeticLoops<Number>& loops = set.arithmetic<Number>();
  terms_are_the_cores(set, loops.normals, core_normal);
  terms_are_the_cores(set, loops.signs, core_sign);
  for (int number = 0; number < Rules::count; ++number)
    Rules::call(number, [&](auto functor) {
      using Rule = decltype(functor);
      const cpu::RuleLoops<Number>& rule = loops.rules[number];
      CHECK(rule.second_moment == Rule::second_moment, "%s: rule %d is not %s", set.name, number, Rule::name);
      moves_are_the_cores<Rule>(set, rule, rule.add_normals, loops.normals, core_normal);
      moves_are_the_cores<Rule>(set, rule, rule.add_signs, loops.signs, core_sign);
    });
  signs_of_moments_are_the_cores<Number>(set);
}

}  // namespace

void directions_are_the_cores(const InstructionSet& set) {
  rounding_bits_are_the_cores(set);
  directions_of<float>(set);
  directions_of<double>(set);
}

}  // namespace zoext
