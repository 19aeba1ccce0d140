// The arithmetic of one lane. The vector types of csrc/cpu overload the same names, so that the
// formulas of this folder are written once for both. Every operation is exact or rounded once, to
// nearest: that is what makes results equal on every processor.
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

ZOEXT_HD float square_root(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
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

// All ones where the top bit is set, else zero.
ZOEXT_HD uint32_t spread_top_bit(uint32_t word) { return static_cast<uint32_t>(static_cast<int32_t>(word) >> 31); }

// `a` where the top bit of `word` is set, else `b`.
ZOEXT_HD float select_by_top_bit(uint32_t word, float a, float b) {
  return static_cast<int32_t>(word) < 0 ? a : b;
}

template <class Float>
struct Lanes;  // how to fill a lane type with one value

template <>
struct Lanes<float> {
  using Word = uint32_t;
  static ZOEXT_HD float fill(float a) { return a; }
  static ZOEXT_HD uint32_t fill_word(uint32_t word) { return word; }
};

}  // namespace zoext
