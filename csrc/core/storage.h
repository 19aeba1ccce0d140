// The types weights are stored in, and the one rounding on the way out.
#pragma once

#include "lane.h"
#include "stream.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace zoext {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// What happens to the fraction of a unit in the last place: rounding to nearest loses it, stochastic rounding
// makes it the probability of rounding up, and a residual keeps it in a byte beside the weight.
enum class Rounding : int64_t { nearest = 0, stochastic = 1, residual = 2 };

// What each type of weights is called in torch, what it is moved in, and whether it holds less than that: then a
// move is rounded, in one of the ways above, and a residual may keep what is lost.
template <class Storage>
struct StorageTraits;
template <>
struct StorageTraits<float> {
  static constexpr const char* name = "float32";
  using Arithmetic = float;
  static constexpr bool can_round = false;
};
template <>
struct StorageTraits<double> {
  static constexpr const char* name = "float64";
  using Arithmetic = double;
  static constexpr bool can_round = false;
};
template <>
struct StorageTraits<BFloat16> {
  static constexpr const char* name = "bfloat16";
  using Arithmetic = float;
  static constexpr bool can_round = true;
};
template <>
struct StorageTraits<Half> {
  static constexpr const char* name = "float16";
  using Arithmetic = float;
  static constexpr bool can_round = true;
};

template <class Storage>
struct Arithmetic {
  using type = typename StorageTraits<Storage>::Arithmetic;
};

template <class Storage>
constexpr bool can_round = StorageTraits<Storage>::can_round;

template <class... Types>
struct StorageList {
  // f(Storage{}) for each type.
  template <class F>
  static void for_each(F f) {
    (f(Types{}), ...);
  }
};
using Storages = StorageList<float, double, BFloat16, Half>;

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
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(a))};
#else
  const uint32_t bits = bits_of(a);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // quiet NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
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

// The magnitude of a number as a float16 pattern followed by 13 more bits, also where float16 is subnormal: scaled
// by this factor, float32 is subnormal there too, in the same steps. Only bits beyond those 13 are lost, in
// float16's subnormal range, and these are rounded to nearest.
ZOEXT_HD uint32_t half_pattern(float magnitude) { return bits_of(multiply(magnitude, 0x1p-112f)); }

// Stochastic rounding: up with probability equal to the fraction that lies above the lower
// neighbour, so the expectation is the unrounded value. `random` is uniform on 0 .. 65535.
// Values that no neighbour bounds (not finite, or beyond the largest) are rounded to nearest.
template <class Storage>
ZOEXT_HD Storage round_stochastically(float a, uint32_t random);

template <>
ZOEXT_HD BFloat16 round_stochastically<BFloat16>(float a, uint32_t random) {
  const uint32_t bits = bits_of(a);
  if ((bits & 0x7fffffffu) >= 0x7f7f0000u) return round_to_nearest<BFloat16>(a);
  return {static_cast<uint16_t>((bits + random) >> 16)};
}

template <>
ZOEXT_HD Half round_stochastically<Half>(float a, uint32_t random) {
  const uint32_t bits = bits_of(a), magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477fe000u) return round_to_nearest<Half>(a);  // from 65504 on
  const uint32_t pattern = half_pattern(float_of_bits(magnitude)) + (random >> 3);
  return {static_cast<uint16_t>((bits & 0x80000000u) >> 16 | pattern >> 13)};
}

// 16 random bits per element. The second eight elements of a block reuse its words, rotated by a byte. The bits of
// each element are uniform, and two elements share at most one byte: the lower one of the first and the upper one
// of the second. The probability that both round up is therefore within 1/1000 of the product of their
// probabilities.
constexpr int roundings_per_block = 16;

// The bits of the element that is number `i` of its block.
ZOEXT_HD uint32_t rounding_bits(const Words<uint32_t>& block, int i) {
  const uint32_t word = block.w[i % 8 / 2], turned = i < 8 ? word : word << 8 | word >> 24;
  return turned >> 16 * (i % 2) & 0xffffu;
}

// A block of random words for rounding. Each element's bits decide one rounding and no statistic of the directions
// depends on them, so that the smallest number of rounds known to be enough is used.
ZOEXT_HD Words<uint32_t> rounding_words(const Field& field, uint64_t block) {
  return philox4x32<least_rounds>(field.counter(block), RoundKeys{field.seed});
}

ZOEXT_HD uint32_t rounding_bits(const Field& field, uint64_t index) {
  return rounding_bits(rounding_words(field, index / roundings_per_block),
                       static_cast<int>(index % roundings_per_block));
}

// A float of 24 bits in two parts: the nearest number of 16 bits, and how much farther from zero the whole number
// lies, in 1/256 of a unit in the last place. Consecutive bit patterns are consecutive numbers, also across powers
// of two and into the subnormal range, so that the two parts together are the upper 24 bits of a longer pattern.
template <class Storage>
struct Split {
  Storage nearest;
  int8_t residual;
};

// The whole number, exactly. A residual beside zero is not negative; one that is, because other code has set the
// weight to zero, counts modulo 128. A residual beside an infinity or a NaN is ignored.
template <class Storage>
ZOEXT_HD float join(Split<Storage> a);

ZOEXT_HD uint32_t residual_of(uint16_t nearest, int8_t residual) {
  return static_cast<uint32_t>((nearest & 0x7fffu) == 0 ? residual & 0x7f : static_cast<int32_t>(residual));
}

// Rounds to 24 bits, to nearest, ties away from zero. Values within half a unit of 16 bits of infinity or beyond,
// and NaNs, are rounded to 16 bits with the residual 0.
template <class Storage>
ZOEXT_HD Split<Storage> split(float a);

template <>
ZOEXT_HD float join<BFloat16>(Split<BFloat16> a) {
  if ((a.nearest.bits & 0x7fffu) >= 0x7f80u) return widen(a.nearest);
  return float_of_bits((static_cast<uint32_t>(a.nearest.bits) << 16) +
                       (residual_of(a.nearest.bits, a.residual) << 8));
}

template <>
ZOEXT_HD Split<BFloat16> split<BFloat16>(float a) {
  const uint32_t bits = bits_of(a), rounded = bits + 0x80u;
  if ((bits & 0x7fffffffu) >= 0x7f7f7f80u) return {round_to_nearest<BFloat16>(a), 0};
  return {{static_cast<uint16_t>((rounded + 0x8000u) >> 16)}, static_cast<int8_t>(rounded >> 8)};
}

template <>
ZOEXT_HD float join<Half>(Split<Half> a) {
  const uint32_t sign = static_cast<uint32_t>(a.nearest.bits & 0x8000u) << 16,
                 magnitude = a.nearest.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return widen(a.nearest);
  const float scaled = float_of_bits((magnitude << 13) + (residual_of(a.nearest.bits, a.residual) << 5));
  return float_of_bits(sign | bits_of(multiply(scaled, 0x1p112f)));
}

template <>
ZOEXT_HD Split<Half> split<Half>(float a) {
  const uint32_t bits = bits_of(a), magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477feff0u) return {round_to_nearest<Half>(a), 0};  // from 65519.9375 on
  const uint32_t rounded = half_pattern(float_of_bits(magnitude)) + 0x10u;
  return {{static_cast<uint16_t>((bits & 0x80000000u) >> 16 | (rounded + 0x1000u) >> 13)},
          static_cast<int8_t>(rounded >> 5)};
}

}  // namespace zoext
