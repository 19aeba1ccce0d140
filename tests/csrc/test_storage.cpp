// Numbers of 16 bits, how they are rounded, and those of 24 bits in two parts. test_core_in_cpp.py builds
// and runs it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "check.h"
#include "core/storage.h"

using namespace zoext;

namespace {

template <class Storage>
struct Format;
template <>
struct Format<BFloat16> {
  static constexpr int mantissa_bits = 7, bias = 127;
};
template <>
struct Format<Half> {
  static constexpr int mantissa_bits = 10, bias = 15;
};

template <class Storage>
constexpr uint32_t infinity = 0x7fffu >> Format<Storage>::mantissa_bits << Format<Storage>::mantissa_bits;

// The value of a pattern without sign; that of infinity is the power of two that would come next.
template <class Storage>
double magnitude(uint32_t pattern) {
  constexpr int bits = Format<Storage>::mantissa_bits;
  const int exponent = static_cast<int>(pattern >> bits), mantissa = static_cast<int>(pattern % (1u << bits));
  return std::ldexp(exponent ? mantissa + (1 << bits) : mantissa,
                    std::max(exponent, 1) - Format<Storage>::bias - bits);
}

template <class Storage>
const std::vector<double>& magnitudes() {
  static const std::vector<double> table = [] {
    std::vector<double> all;
    for (uint32_t pattern = 0; pattern <= infinity<Storage>; ++pattern) all.push_back(magnitude<Storage>(pattern));
    return all;
  }();
  return table;
}

// The neighbour below in magnitude, and how far the value lies towards the one above.
template <class Storage>
struct Neighbours {
  uint32_t lower;
  double fraction;

  explicit Neighbours(double value) {
    const std::vector<double>& table = magnitudes<Storage>();
    const double* above = std::upper_bound(table.data(), table.data() + table.size(), value);
    lower = static_cast<uint32_t>(above - table.data()) - 1;
    fraction = (value - above[-1]) / (above[0] - above[-1]);
  }
};

template <class Storage>
uint32_t plainly_to_nearest(float value) {
  const uint32_t sign = std::signbit(value) ? 0x8000u : 0u;
  if (std::fabs(value) >= magnitudes<Storage>().back()) return sign | infinity<Storage>;
  const Neighbours<Storage> at(std::fabs(value));
  const bool up = at.fraction > 0.5 || (at.fraction == 0.5 && at.lower % 2 == 1);
  return sign | (at.lower + up);
}

template <class Storage>
uint32_t plainly_stochastic(float value, uint32_t random) {
  const uint32_t sign = std::signbit(value) ? 0x8000u : 0u;
  if (std::fabs(value) >= magnitudes<Storage>().end()[-2]) return plainly_to_nearest<Storage>(value);
  const Neighbours<Storage> at(std::fabs(value));
  // float16 has 13 bits of fraction, to which only its subnormal numbers are rounded.
  const double fraction =
      Format<Storage>::mantissa_bits == 10 ? std::nearbyint(at.fraction * 8192) * 8 : at.fraction * 65536;
  return sign | (at.lower + (std::floor(fraction) + random >= 65536));
}

template <class Storage>
void check_rounding(float value) {
  const uint32_t nearest = round_to_nearest<Storage>(value).bits, expected = plainly_to_nearest<Storage>(value);
  CHECK(nearest == expected, "%a rounds to %04x, not %04x", value, nearest, expected);
  for (uint32_t random : {0u, 7u, 0x61b6u, 0x8000u, 0xffffu}) {
    const uint32_t drawn = round_stochastically<Storage>(value, random).bits;
    const uint32_t plain = plainly_stochastic<Storage>(value, random);
    CHECK(drawn == plain, "%a with random bits %04x rounds to %04x, not %04x", value, random, drawn, plain);
  }
}

// Every pattern is widened, comes back, and so do all sorts of values between it and the next one.
template <class Storage>
void conversions_are_exact() {
  for (uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
    const float value = widen(Storage{static_cast<uint16_t>(pattern)});
    const uint32_t unsigned_pattern = pattern & 0x7fff;
    CHECK(std::signbit(value) == (pattern >> 15 == 1), "sign of %04x", pattern);
    if (unsigned_pattern > infinity<Storage>) {
      CHECK(std::isnan(value), "%04x", pattern);
      const uint32_t nearest = round_to_nearest<Storage>(value).bits;
      const uint32_t quiet = pattern | 1u << (Format<Storage>::mantissa_bits - 1);
      CHECK(nearest == quiet, "NaN %04x becomes %04x", pattern, nearest);
      CHECK(round_stochastically<Storage>(value, 0xffff).bits == quiet, "NaN %04x", pattern);
    } else if (unsigned_pattern == infinity<Storage>) {
      CHECK(std::isinf(value), "%04x", pattern);
      CHECK(round_to_nearest<Storage>(value).bits == pattern, "infinity");
      CHECK(round_stochastically<Storage>(value, 0xffff).bits == pattern, "infinity");
    } else {
      const double low = magnitude<Storage>(unsigned_pattern),
                   step = magnitude<Storage>(unsigned_pattern + 1) - low;
      CHECK(std::fabs(value) == low, "%04x widens to %a", pattern, value);
      for (double fraction : {0.0, 0.5, 0.6183}) {
        const float between = static_cast<float>(std::copysign(low + fraction * step, value));
        for (float target : {between, std::copysign(0.0f, value), std::copysign(INFINITY, value)})
          if (std::isfinite(std::nextafterf(between, target)))
            check_rounding<Storage>(std::nextafterf(between, target));
      }
    }
  }
  const float largest = std::numeric_limits<float>::max(), smallest = std::numeric_limits<float>::denorm_min();
  for (float value : {0.0f, -0.0f, largest, -largest, smallest, -smallest}) check_rounding<Storage>(value);
}

// What lies between two neighbours of 24 bits goes to the nearest, and a tie to the one above. What float16
// drops in its subnormal range is first rounded to 13 bits.
template <class Storage>
void check_nearest_split(float below, float above) {
  const double middle = (double{below} + above) / 2;
  const auto centre = static_cast<float>(middle);
  for (float value : {std::nextafterf(centre, 0.0f), centre, std::nextafterf(centre, INFINITY)}) {
    if (value < below || value > above) continue;
    const bool is_counted = std::is_same_v<Storage, Half> && value < 0x1p-14f;
    const double kept = is_counted ? std::nearbyint(double{value} * 0x1p37) * 0x1p-37 : double{value};
    const float expected = kept < middle ? below : above, whole = join<Storage>(split<Storage>(value));
    CHECK(whole == expected, "%a becomes %a, not %a", value, whole, expected);
  }
}

// The value of a pattern of 16 bits and of 256 steps to the next one, which are equal between neighbours.
template <class Storage>
double long_magnitude(int64_t pattern) {
  const std::vector<double>& table = magnitudes<Storage>();
  const double low = table[pattern / 256];
  return pattern % 256 == 0 ? low
                            : low + (table[pattern / 256 + 1] - low) * static_cast<double>(pattern % 256) / 256;
}

// Every number of 24 bits is joined from its parts and comes back; between two of them lies the nearest.
template <class Storage>
void splits_are_numbers_of_24_bits() {
  float before = -1;
  const int64_t end = 256 * static_cast<int64_t>(infinity<Storage>) - 128;  // from here on nearest is infinity
  for (int64_t pattern = 0; pattern < end; ++pattern) {
    const auto upper = static_cast<uint16_t>((pattern + 128) / 256);
    const auto lower = static_cast<int8_t>(pattern - 256 * upper);
    const float whole = join<Storage>({{upper}, lower});
    CHECK(whole == long_magnitude<Storage>(pattern), "%04x and %d are %a", upper, lower, whole);
    CHECK(whole > before, "%04x and %d are not more than what comes before", upper, lower);
    const auto negative = static_cast<uint16_t>(0x8000u | upper);
    CHECK(same(join<Storage>({{negative}, lower}), -whole), "-%04x and %d", upper, lower);
    for (float sign : {1.0f, -1.0f}) {
      const Split<Storage> parts = split<Storage>(sign * whole);
      CHECK(parts.nearest.bits == (sign < 0 ? negative : upper) && parts.residual == lower,
            "%a splits to %04x, %d", sign * whole, parts.nearest.bits, parts.residual);
    }
    if (pattern % 7 == 1) check_nearest_split<Storage>(before, whole);
    before = whole;
  }
  for (int lower = -128; lower < 0; ++lower) {  // where somebody else has set a weight to zero
    const float whole = join<Storage>({{0}, static_cast<int8_t>(lower)});
    CHECK(whole == long_magnitude<Storage>(lower + 128), "zero and %d are %a", lower, whole);
    CHECK(same(join<Storage>({{0x8000u}, static_cast<int8_t>(lower)}), -whole), "-0 and %d", lower);
  }
  for (uint32_t upper = infinity<Storage>; upper <= 0x7fffu; ++upper)  // where somebody else has set it
    for (int lower = -128; lower < 128; ++lower)
      for (uint32_t sign : {0x0000u, 0x8000u}) {
        const Storage nearest{static_cast<uint16_t>(sign | upper)};
        const float whole = join<Storage>({nearest, static_cast<int8_t>(lower)});
        CHECK(same(whole, widen(nearest)), "%04x and %d are %a", nearest.bits, lower, whole);
      }
  for (float beyond : {before * 2, INFINITY, NAN})
    for (float value : {beyond, -beyond}) {
      const Split<Storage> parts = split<Storage>(value);
      CHECK(parts.nearest.bits == round_to_nearest<Storage>(value).bits && parts.residual == 0, "%a", value);
      CHECK(std::isnan(value) || std::isinf(join<Storage>(parts)), "%a", value);
    }
}

}  // namespace

int main() {
  conversions_are_exact<BFloat16>();
  conversions_are_exact<Half>();
  splits_are_numbers_of_24_bits<BFloat16>();
  splits_are_numbers_of_24_bits<Half>();
  return finish("numbers of 16 and 24 bits");
}
