// The types weights are stored in, and the one rounding on the way out.
#pragma once

#include "lane.h"
#include "stream.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace zoext {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class Rounding : int64_t { nearest = 0, stochastic = 1 };

// Arithmetic is float32, and float64 for float64 weights.
template <class Storage>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

ZOEXT_HD float widen(float a) { return a; }
ZOEXT_HD double widen(double a) { return a; }
ZOEXT_HD float widen(BFloat16 a) { return float_of_bits(static_cast<uint32_t>(a.bits) << 16); }

ZOEXT_HD float widen(Half a) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(a.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000u) << 16, magnitude = a.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, or not a number (made quiet, as processors do)
    const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
    return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | quiet);
  }
  // Read as float32 the exponent is 112 too small; the product restores it, also for subnormals.
  return float_of_bits(sign | bits_of(float_of_bits(magnitude << 13) * 0x1p112f));
#endif
}

template <class Storage>
ZOEXT_HD Storage round_to_nearest(typename Arithmetic<Storage>::type a);

template <>
ZOEXT_HD float round_to_nearest<float>(float a) {
  return a;
}

template <>
ZOEXT_HD double round_to_nearest<double>(double a) {
  return a;
}

template <>
ZOEXT_HD BFloat16 round_to_nearest<BFloat16>(float a) {
  const uint32_t bits = bits_of(a);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // quiet NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
ZOEXT_HD Half round_to_nearest<Half>(float a) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(a))};
#else
  const uint32_t bits = bits_of(a), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu))};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // from 65520 on: infinity
  if (magnitude < 0x38800000u)  // subnormal: adding 1/2 leaves units of 2^-24 in the low bits
    return {static_cast<uint16_t>(sign | (bits_of(float_of_bits(magnitude) + 0.5f) - 0x3f000000u))};
  const uint32_t odd = magnitude >> 13 & 1u;
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + odd) >> 13)};
#endif
}

// Stochastic rounding: up with probability equal to the fraction that lies above the lower
// neighbour, so the expectation is the unrounded value. `random` is uniform on 0 .. 65535.
// Values that no neighbour bounds (not finite, or beyond the largest) are rounded to nearest.
template <class Storage>
ZOEXT_HD Storage round_stochastically(typename Arithmetic<Storage>::type a, uint32_t random);

template <>
ZOEXT_HD float round_stochastically<float>(float a, uint32_t) {
  return a;
}

template <>
ZOEXT_HD double round_stochastically<double>(double a, uint32_t) {
  return a;
}

template <>
ZOEXT_HD BFloat16 round_stochastically<BFloat16>(float a, uint32_t random) {
  const uint32_t bits = bits_of(a);
  if ((bits & 0x7fffffffu) >= 0x7f7f0000u) return round_to_nearest<BFloat16>(a);
  return {static_cast<uint16_t>((bits + random) >> 16)};
}

template <>
ZOEXT_HD Half round_stochastically<Half>(float a, uint32_t random) {
  const uint32_t bits = bits_of(a), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477fe000u) return round_to_nearest<Half>(a);  // from 65504 on
  if (magnitude >= 0x38800000u) {                                  // normal: 13 bits are dropped
    const uint32_t kept = (magnitude + (random >> 3)) & ~0x1fffu;
    return round_to_nearest<Half>(float_of_bits(sign | kept));
  }
  // Subnormal: the value in units of 2^-24, with 16 bits of fraction; float32 holds fewer only
  // below 2^-17 units, whose rounding here moves the probability by less than 2^-17.
  const float scaled = multiply(float_of_bits(magnitude), 0x1p40f);  // units of 2^-40
  const uint32_t fixed = static_cast<uint32_t>(scaled);
  return {static_cast<uint16_t>(sign >> 16 | (fixed + random) >> 16)};
}

constexpr int roundings_per_block = 8;  // 16 random bits an element

ZOEXT_HD uint32_t rounding_bits(const Field& field, uint64_t index) {
  const uint32_t word = field.words(index / roundings_per_block).w[index / 2 % 4];
  return index % 2 ? word >> 16 : word & 0xffffu;
}

template <class Storage>
constexpr bool can_round = sizeof(Storage) == 2;  // float32 and float64 keep their arithmetic's value

}  // namespace zoext
