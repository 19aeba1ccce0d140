// Update rules that are not linear in the gradient: from the moments of an element to its move.
//
// With g_h the gradient estimate of step h of a window and p_h = sum_k c_hk its projected gradient,
//
//     m = sum_h first_weight_h g_h,   v = sum_h second_weight_h s_h^2,   theta += move(m, v).
//
// A rule is a functor that says which s_h it squares and how m and v make the move. To add one, write the functor,
// append it to `Rules`, which numbers the rules, and give `Rule` in zoext/ops a member of the same name and
// number. Numbers are part of the operators' schemas: they are never reused or changed.
//
// Number is float, double, or a vector of either with the same operations.
#pragma once

#include "combine.h"

namespace zoext {

// What the second moment is of.
enum class SecondMoment {
  none,         // the rule does not use it: v = 0
  elements,     // s_h = g_h: each element has its own
  projections,  // s_h = p_h: all elements share one
};

namespace rules {

// AdaMeZO, arXiv 2605.00650, section 3, with eps inside the root as printed.
struct Adam {
  static constexpr const char* name = "adam";
  static constexpr SecondMoment second_moment = SecondMoment::elements;

  template <class Number>
  static ZOEXT_HD Number move(Number minus_lr, Number eps, Number m, Number v) {
    return multiply(minus_lr, divide(m, square_root(v + eps)));
  }
};

// The sign of the momentum: Signum, arXiv 1802.04434, algorithm 2. The sign of zero, and of what is no number, is
// 0.
struct Sign {
  static constexpr const char* name = "sign";
  static constexpr SecondMoment second_moment = SecondMoment::none;

  template <class Number>
  static ZOEXT_HD Number move(Number minus_lr, Number, Number m, Number) {
    return multiply(minus_lr, sign_of(m));
  }
};

// MEAZO: one second moment, of the projected gradients, for all elements. Here eps is outside the root.
struct ScalarAdam {
  static constexpr const char* name = "scalar_adam";
  static constexpr SecondMoment second_moment = SecondMoment::projections;

  template <class Number>
  static ZOEXT_HD Number move(Number minus_lr, Number eps, Number m, Number v) {
    return multiply(minus_lr, divide(m, square_root(v) + eps));
  }
};

}  // namespace rules

template <class... Functors>
struct RuleList {
  static constexpr int count = sizeof...(Functors);
  static constexpr const char* names[count] = {Functors::name...};

  // f(Functor{}) with the functor of a checked number.
  template <class F>
  static void call(int number, F f) {
    int i = 0;
    static_cast<void>(((i++ == number && (f(Functors{}), true)) || ...));
  }
};

// The number of a rule is its place in this list.
using Rules = RuleList<rules::Adam, rules::Sign, rules::ScalarAdam>;

// Whether a rule needs v for each element.
template <class Rule>
constexpr bool has_moments_of_elements = Rule::second_moment == SecondMoment::elements;

// m takes in the estimate of a step.
template <class Number>
ZOEXT_HD Number add_first_moment(Number first_weight, Number g, Number m) {
  return fused_multiply_add(first_weight, g, m);
}

// v takes in what a rule squares.
template <class Number>
ZOEXT_HD Number add_second_moment(Number second_weight, Number s, Number v) {
  return fused_multiply_add(second_weight, multiply(s, s), v);
}

}  // namespace zoext
