// The loops of one instruction set, over stretches of a parameter short enough to stay in the
// first-level cache. Included once per instruction set, inside the namespace of its lane types.

// clang-format off: each builds on those above it
#include "packs.inl"
#include "directions.inl"
#include "window.inl"
#include "factored.inl"
#include "storage.inl"
#include "rounding.inl"
#include "rows.inl"
#include "linear.inl"
// clang-format on

template <class Rule, class Number>
constexpr RuleLoops<Number> rule_loops{
    Rule::second_moment,
    &add_normals_to_moments<Rule, Number>,
    &add_signs_to_moments<Rule, Number>,
    &add_estimate_to_moments<Rule, Number>,
    &move_moments<Rule, Number>,
    &move_estimates<Rule, Number>,
    &move_factored<Rule, Number>,
};

template <class Number, class... Functors>
constexpr ArithmeticLoops<Number> arithmetic_loops_of(RuleList<Functors...>) {
  return {
      {&add_normals<Number, true>, &add_normals<Number, false>},
      {&add_signs<Number, true>, &add_signs<Number, false>},
      {&add_drawn<Number, true>, &add_drawn<Number, false>},
      {&combine_factored<Number>},
      {rule_loops<Functors, Number>...},
  };
}

template <class Number>
constexpr ArithmeticLoops<Number> arithmetic_loops = arithmetic_loops_of<Number>(Rules{});

template <class Storage>
constexpr LinearLoops<Storage> linear_loops{
    &multiply_rows<Storage>, &combine_weights<typename Arithmetic<Storage>::type>, &add_products<Storage>};

template <class Storage>
constexpr StorageLoops<Storage> storage_loops{&displace<Storage>, &write<Storage>, &to_fp32<Storage>,
                                              linear_loops<Storage>};

template <class Storage>
constexpr RoundedLoops<Storage> rounded_loops{storage_loops<Storage>, &displace_stochastically<Storage>,
                                              &displace_split<Storage>};

const InstructionSet instruction_set{
    name,
    rounding_bits,
    arithmetic_loops<float>,
    arithmetic_loops<double>,
    storage_loops<float>,
    storage_loops<double>,
    rounded_loops<BFloat16>,
    rounded_loops<Half>,
    row_loops,
};
