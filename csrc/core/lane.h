// The arithmetic of one lane. The vector types of csrc/cpu/simd overload the same names, so that each formula of
// this folder is written once for both. Every operation is exact or rounded once, to nearest, which makes results
// equal on every processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "platform.h"

namespace zoext {

ZOEXT_HD float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

ZOEXT_HD double fused_multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

ZOEXT_HD float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);  // never contracted with a neighbouring addition
#else
  return a * b;
#endif
}

ZOEXT_HD double multiply(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// sqrt(a) from an estimate of 1 / sqrt(a), by one step of Newton's method.
ZOEXT_HD float corrected_square_root(float a, float estimate) {
  const float root = multiply(a, estimate), half = multiply(0.5f, estimate);
  return fused_multiply_add(fused_multiply_add(-root, root, a), half, root);
}

ZOEXT_HD float square_root(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

// The same for a between 2^-100 and 2^127.
ZOEXT_HD float square_root_of_normal(float a) {
#if defined(__CUDA_ARCH__)
  // The code that ptxas generates for sqrt.rn.f32, without its branch for other numbers. One correction gives
  // the correctly rounded root for every estimate whose error is at most 3/4 of what PTX allows (the C++ tests
  // try all of them). ptxas relies on the same accuracy of the hardware.
  float estimate;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(a));
  return corrected_square_root(a, estimate);
#else
  return __builtin_sqrtf(a);
#endif
}

ZOEXT_HD double square_root(double a) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(a);
#else
  return __builtin_sqrt(a);
#endif
}

ZOEXT_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

ZOEXT_HD double divide(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __ddiv_rn(a, b);
#else
  return a / b;
#endif
}

ZOEXT_HD uint32_t bits_of(float a) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(a);
#else
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
#endif
}

ZOEXT_HD float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
#endif
}

// The word read as a two's complement integer.
ZOEXT_HD float signed_to_float(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word)); }

// The smaller one of two words read as two's complement integers.
ZOEXT_HD uint32_t smaller_signed(uint32_t a, uint32_t b) {
  return static_cast<int32_t>(a) < static_cast<int32_t>(b) ? a : b;
}

// 0 where `a` is negative, 1 where it is positive.
ZOEXT_HD float unit_step(float a) { return a < 0.0f ? 0.0f : 1.0f; }

// -1, 0 or 1. Zero also for what is no number.
ZOEXT_HD float sign_of(float a) { return a > 0.0f ? 1.0f : a < 0.0f ? -1.0f : 0.0f; }
ZOEXT_HD double sign_of(double a) { return a > 0.0 ? 1.0 : a < 0.0 ? -1.0 : 0.0; }

template <class Float>
struct Lanes;  // how to fill a lane type with one value

template <>
struct Lanes<float> {
  using Word = uint32_t;
  static ZOEXT_HD float fill(float a) { return a; }
  static ZOEXT_HD uint32_t fill_word(uint32_t word) { return word; }
};

}  // namespace zoext
