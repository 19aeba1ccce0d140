// The moments of a window of gradient estimates, and the step they make: AdaMeZO, arXiv 2605.00650,
// section 3, with delta inside the root as printed.
//
// Number is float, double, or a vector of floats with the same operations.
#pragma once

#include "combine.h"

namespace zoext {

// m += first_weight g and v += second_weight g^2, for the gradient estimate g of one step.
template <class Number>
ZOEXT_HD void add_moments(Number first_weight, Number second_weight, Number g, Number& m, Number& v) {
  m = fused_multiply_add(first_weight, g, m);
  v = fused_multiply_add(second_weight, multiply(g, g), v);
}

// -lr m / sqrt(v + eps)
template <class Number>
ZOEXT_HD Number moments_step(Number minus_lr, Number eps, Number m, Number v) {
  return multiply(minus_lr, divide(m, square_root(v + eps)));
}

}  // namespace zoext
