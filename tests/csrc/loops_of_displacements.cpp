// Weights of every dtype, displaced in every way of rounding.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/combine.h"
#include "core/storage.h"
#include "loops.h"

namespace zoext {
namespace {

using cpu::InstructionSet;

// Changes of no size, of the size of a step and beyond float16, and decays.
template <class Number>
struct Change {
  Number scale, decay;
  std::vector<Number> sum;

  static std::vector<Change> all(int64_t count) {
    std::vector<Change> changes;
    const Field field{5, 0, 0};
    for (Number scale : {Number(0), Number(1e-3f), Number(3e4f)})
      for (Number decay : {Number(0), Number(0.01f)}) {
        changes.push_back({scale, decay, {}});
        for (int64_t i = 0; i < count; ++i)
          changes.back().sum.push_back(scale == 0 ? Number{empty_sum}
                                                  : multiply(scale, Number{core_normal(field, i)}));
      }
    return changes;
  }
  Number moved(Number value, int64_t i) const { return value + add_decay<Number>(decay, value, sum[i]); }
};

template <class Storage>
void displacements_are_the_cores(const InstructionSet& set, const std::vector<Storage>& theta) {
  using Number = typename Arithmetic<Storage>::type;
  const int64_t count = static_cast<int64_t>(theta.size());
  std::vector<Storage> out(count + 1);
  for (const Change<Number>& change : Change<Number>::all(count)) {
    out[count] = theta[0];
    set.storage<Storage>().displace(out.data(), theta.data(), change.sum.data(), change.decay, count);
    CHECK(same(out[count], theta[0]), "%s writes beyond the tensor", set.name);
    for (int64_t i = 0; i < count; ++i)
      CHECK(same(out[i], round_to_nearest<Storage>(change.moved(widen(theta[i]), i))),
            "%s: pattern %d of %d, scale %g, decay %g", set.name, int(i), int(count), double(change.scale),
            double(change.decay));
  }
  const std::vector<Number> sum = Change<Number>::all(count).back().sum;
  set.storage<Storage>().write(out.data(), sum.data(), count);
  for (int64_t i = 0; i < count; ++i)
    CHECK(same(out[i], round_to_nearest<Storage>(sum[i])), "%s: element %d written", set.name, int(i));
}

template <class Storage>
void stochastic_displacements_are_the_cores(const InstructionSet& set, const std::vector<Storage>& theta) {
  const int64_t count = static_cast<int64_t>(theta.size());
  std::vector<uint16_t> random(count);
  for (int64_t i = 0; i < count; ++i) random[i] = static_cast<uint16_t>(rounding_bits(Field{5, 0, 0}, i));
  std::vector<Storage> out(count + 1);
  for (const Change<float>& change : Change<float>::all(count)) {
    out[count] = theta[0];
    set.storage<Storage>().displace_stochastically(out.data(), theta.data(), change.sum.data(), change.decay,
                                                   count, random.data());
    CHECK(same(out[count], theta[0]), "%s writes beyond the tensor", set.name);
    for (int64_t i = 0; i < count; ++i)
      CHECK(same(out[i], round_stochastically<Storage>(change.moved(widen(theta[i]), i), random[i])),
            "%s: pattern %d of %d, scale %g, decay %g", set.name, int(i), int(count), double(change.scale),
            double(change.decay));
  }
}

// With residuals of all kinds, also beside patterns that have none.
template <class Storage>
void split_displacements_are_the_cores(const InstructionSet& set, const std::vector<Storage>& theta) {
  const int64_t count = static_cast<int64_t>(theta.size());
  for (const Change<float>& change : Change<float>::all(count))
    for (int64_t stride : {1, 77}) {
      std::vector<Storage> upper = theta;
      std::vector<int8_t> lower(count + 1);
      for (int64_t i = 0; i <= count; ++i) lower[i] = static_cast<int8_t>(stride * i - 128);
      const std::vector<int8_t> before = lower;
      upper.push_back(theta[0]);
      set.storage<Storage>().displace_split(upper.data(), lower.data(), change.sum.data(), change.decay, count);
      CHECK(same(upper[count], theta[0]) && lower[count] == before[count], "%s writes beyond the tensor",
            set.name);
      for (int64_t i = 0; i < count; ++i) {
        const Split<Storage> parts = split<Storage>(change.moved(join<Storage>({theta[i], before[i]}), i));
        CHECK(same(upper[i], parts.nearest) && lower[i] == parts.residual,
              "%s: pattern %d of %d with %d, scale %g, decay %g, becomes %04x with %d, not %04x with %d", set.name,
              int(i), int(count), before[i], change.scale, change.decay, upper[i].bits, lower[i],
              parts.nearest.bits, parts.residual);
      }
    }
}

template <class Storage>
void all_displacements_are_the_cores(const InstructionSet& set, const std::vector<Storage>& theta) {
  displacements_are_the_cores(set, theta);
  stochastic_displacements_are_the_cores(set, theta);
  split_displacements_are_the_cores(set, theta);
}

// Moves from `weight` by steps of `change` in every lane, between normal numbers in an odd number of elements:
// loops that take several packs at a time may not overlook one of them.
void lanes_alone_are_the_cores(const InstructionSet& set, uint16_t weight, float change) {
  constexpr int64_t count = 2 * 64 + 5;
  for (int64_t lane = 0; lane < count; ++lane)
    for (uint16_t sign : {0x0000, 0x8000}) {
      std::vector<Half> theta(count, Half{0x3555}), rounded(count), nearest = theta;
      theta[lane] = nearest[lane] = {static_cast<uint16_t>(sign | weight)};
      std::vector<float> sum(count, 0.0f);
      sum[lane] = change * static_cast<float>(lane - count / 2);
      std::vector<uint16_t> random(count, static_cast<uint16_t>(509 * lane));
      std::vector<int8_t> residuals(count, static_cast<int8_t>(97 * lane));
      set.float16.displace_stochastically(rounded.data(), theta.data(), sum.data(), 0.0f, count, random.data());
      set.float16.displace_split(nearest.data(), residuals.data(), sum.data(), 0.0f, count);
      for (int64_t i = 0; i < count; ++i) {
        const Half expected = round_stochastically<Half>(widen(theta[i]) + sum[i], random[i]);
        const Split<Half> parts = split<Half>(join<Half>({theta[i], static_cast<int8_t>(97 * lane)}) + sum[i]);
        CHECK(same(rounded[i], expected), "%s: element %d, %04x in lane %d becomes %04x, not %04x", set.name,
              int(i), theta[lane].bits, int(lane), rounded[i].bits, expected.bits);
        CHECK(same(nearest[i], parts.nearest) && residuals[i] == parts.residual,
              "%s: element %d, %04x in lane %d becomes %04x with %d, not %04x with %d", set.name, int(i),
              theta[lane].bits, int(lane), nearest[i].bits, residuals[i], parts.nearest.bits, parts.residual);
      }
    }
}

template <class Storage>
std::vector<Storage> all_patterns() {
  std::vector<Storage> patterns;
  for (uint32_t pattern = 0; pattern < 0x10000; ++pattern) patterns.push_back({static_cast<uint16_t>(pattern)});
  patterns.push_back({1});  // an odd number of elements
  return patterns;
}

template <class Number>
std::vector<Number> all_sizes() {
  using Limits = std::numeric_limits<Number>;
  std::vector<Number> numbers = {Limits::max(), Limits::min(), Limits::denorm_min(), Limits::infinity(), 0};
  for (int exponent = Limits::min_exponent; exponent < Limits::max_exponent; ++exponent)
    numbers.push_back(std::ldexp(Number(1.2345678), exponent));
  for (size_t i = 0, n = numbers.size(); i < n; ++i) numbers.push_back(-numbers[i]);
  numbers.push_back(Limits::quiet_NaN());
  return numbers;
}

}  // namespace

void displaced_weights_are_the_cores(const InstructionSet& set) {
  displacements_are_the_cores(set, all_sizes<float>());
  displacements_are_the_cores(set, all_sizes<double>());
  all_displacements_are_the_cores(set, all_patterns<BFloat16>());
  all_displacements_are_the_cores(set, all_patterns<Half>());
  // Around numbers that are zero, subnormal, the smallest normal one, 4, 2^14, the largest, infinite and none.
  for (uint16_t weight : {0x0000, 0x0001, 0x03ff, 0x0400, 0x0401, 0x0402, 0x4400, 0x4401, 0x7400, 0x7401, 0x7bfe,
                          0x7bff, 0x7c00, 0x7c01, 0x7e00})
    for (float change : {0.0f, 0x1p-37f, 0x1p-31f, 0x1p-13f, 0.5f}) lanes_alone_are_the_cores(set, weight, change);
}

}  // namespace zoext
