// Standard normals from pairs of words: Box and Muller, Ann. Math. Stat. 29 (1958), in cuRAND's
// order (sine first) and with its uniforms (word + 1/2) / 2^32.
//
// Only fused multiply-adds, products, IEEE square roots and integer operations, so the bits are the
// same on every processor. The polynomials are made by tools/fit_polynomials.py.
#pragma once

#include "lane.h"

namespace zoext {

// sum_j coefficients[j] x^j, by Horner's rule.
template <class Float, int N>
ZOEXT_HD Float polynomial(Float x, const float (&coefficients)[N]) {
  Float sum = Lanes<Float>::fill(coefficients[N - 1]);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 16
#endif
  for (int j = N - 2; j >= 0; --j) sum = fused_multiply_add(sum, x, Lanes<Float>::fill(coefficients[j]));
  return sum;
}

// sqrt(-2 log((word + 1/2) / 2^32)), never zero and at most 6.77.
template <class Float, class Word = typename Lanes<Float>::Word>
ZOEXT_HD Float radius(Word word) {
  using L = Lanes<Float>;
  // -2 log(1 - w) / w for 0 < w <= 1/2, relative error 1.8e-7.
  constexpr float log_coefficients[8] = {0x1.fffffcp+0f, 0x1.0004cap+0f, 0x1.53d3ccp-1f,  0x1.16c8d8p-1f,
                                         0x1.3771dep-4f, 0x1.9223f8p+0f, -0x1.14dfc8p+1f, 0x1.2f57a6p+1f};
  // The word read as a signed integer: its uniform u where that is at most 1/2, else u - 1. So the
  // upper half keeps the low bits that u itself would lose next to 1.
  const Float nearest = fused_multiply_add(signed_to_float(word), L::fill(0x1p-32f), L::fill(0x1p-33f));
  const Word bits = bits_of(nearest), none = L::fill_word(0u);
  // u = mantissa 2^exponent with a mantissa in 1/2 .. 1; in the upper half u - 1 and 0 stand for them.
  const Word exponent = smaller_signed((bits >> 23) - L::fill_word(126u), none);
  const Float mantissa = float_of_bits(bits - (exponent << 23));
  const Float w = unit_step(nearest) - mantissa;
  const Float log_mantissa = multiply(w, polynomial(w, log_coefficients));
  const Float minus_two_log_2 = L::fill(-0x1.62e430p+0f);
  return square_root_of_normal(fused_multiply_add(signed_to_float(exponent), minus_two_log_2, log_mantissa));
}

// radius(first) * sin(t) and radius(first) * cos(t) with t = 2 pi (second + 1/2) / 2^32.
template <class Float, class Word = typename Lanes<Float>::Word>
ZOEXT_HD void box_muller(Word first, Word second, Float& sine, Float& cosine) {
  using L = Lanes<Float>;
  // sin(2 pi a) / a and cos(2 pi a) in powers of a^2, |a| <= 1/4, absolute errors 5e-8 and 9e-8.
  constexpr float sine_coefficients[5] = {0x1.921fb4p+2f, -0x1.4abbb6p+5f, 0x1.46676ep+6f, -0x1.3232fap+6f,
                                          0x1.3c4b2cp+5f};
  constexpr float cosine_coefficients[5] = {0x1.fffffep-1f, -0x1.3bd3a6p+4f, 0x1.03bd06p+6f, -0x1.54f61cp+6f,
                                            0x1.c1f080p+5f};
  // Dropping the top bit folds the turn onto half a turn; sine and cosine then change sign together,
  // so the sign goes to the radius.
  const Word twice = second << 1;
  const Word sign = (second ^ twice) & L::fill_word(0x80000000u);
  const Float turns = fused_multiply_add(signed_to_float(twice), L::fill(0x1p-33f), L::fill(0x1p-33f));
  const Float square = multiply(turns, turns);
  const Float signed_radius = float_of_bits(bits_of(radius<Float>(first)) ^ sign);
  sine = multiply(signed_radius, multiply(turns, polynomial(square, sine_coefficients)));
  cosine = multiply(signed_radius, polynomial(square, cosine_coefficients));
}

}  // namespace zoext
