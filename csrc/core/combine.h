// A combination of directions, sum_k c_k z_k, and what it does to an element.
#pragma once

#include "lane.h"

namespace zoext {

// Minus zero, because x + (-0) is x for every x, including signed zeros: an empty sum changes no bit.
constexpr float empty_sum = -0.0f;

// Terms are added in the order of k, each by one fused multiply-add. A term whose coefficient is zero is left out,
// so that an estimate that was zeroed because its loss was not finite moves nothing.
ZOEXT_HD bool contributes(float coefficient) { return coefficient != 0.0f; }

template <class Number>
ZOEXT_HD Number add_term(Number coefficient, Number z, Number sum) {
  return fused_multiply_add(coefficient, z, sum);
}

// Decoupled weight decay joins the sum, not theta: `(1 - decay) * theta` would lose a decay below
// half a unit in the last place of 1.
template <class Number>
ZOEXT_HD Number subtract_decay_term(Number decay, Number theta, Number sum) {
  return fused_multiply_add(-decay, theta, sum);
}

template <class Number>
ZOEXT_HD Number add_decay(Number decay, Number theta, Number sum) {
  return contributes(static_cast<float>(decay)) ? subtract_decay_term(decay, theta, sum) : sum;
}

}  // namespace zoext
