// The torch-free core and the loops of every instruction set, against plain references. A program of
// its own: it exits with 0 when all checks hold. tests/test_core_in_cpp.py builds and runs it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "core/combine.h"
#include "core/moments.h"
#include "core/normal.h"
#include "core/power_iteration.h"
#include "core/sign.h"
#include "core/span.h"
#include "core/storage.h"
#include "core/stream.h"
#include "cpu/instruction_set.h"

using namespace zoext;

namespace {

// --- Arithmetic ----------------------------------------------------------------------------------

// The root on CUDA is corrected from an estimate. Of all mantissas of both parities, with all estimates
// within three quarters of the error that PTX allows to rsqrt.approx, 2^-22.9.
void one_correction_makes_the_root() {
  const double bound = 0.75 * std::exp2(-22.9);
  for (uint32_t bits = 0x3f800000u; bits < 0x40800000u; ++bits) {
    const float a = float_of_bits(bits), root = square_root(a);
    const double exact = 1 / std::sqrt(double{a});
    float estimate = static_cast<float>(exact * (1 - bound));
    if (estimate < exact * (1 - bound)) estimate = std::nextafter(estimate, 2.0f);
    for (; estimate <= exact * (1 + bound); estimate = std::nextafter(estimate, 2.0f))
      CHECK(corrected_square_root(a, estimate) == root, "%a with 1/sqrt about %a", a, estimate);
  }
}

// --- Words ---------------------------------------------------------------------------------------

void philox_gives_the_known_answers() {
  struct Answer {
    uint32_t counter[4];
    uint64_t seed;
    uint32_t output[4];
  };
  // Random123, tests/kat_vectors; the rest is curand_init(42, subsequence, 4 * block).
  const Answer answers[] = {
      {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       0x299f31d0a4093822ull,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
      {{0, 0, 0, 0}, 42, {0x9ceaf053, 0x77f5493b, 0x12bf50ad, 0x5742b3d7}},
      {{1, 0, 0, 0}, 42, {0xfcdb2127, 0x53ba6cfd, 0x838f5a6e, 0x744e06fb}},
      {{0, 0, 7, 0}, 42, {0x67ee6f2c, 0xe55410cc, 0x6c7eca35, 0x557398d3}},
  };
  for (const Answer& answer : answers) {
    const auto& c = answer.counter;
    const Field field{answer.seed, c[2], c[3]};
    const Words<uint32_t> words = field.words(static_cast<uint64_t>(c[1]) << 32 | c[0]);
    for (int i = 0; i < 4; ++i)
      CHECK(words.w[i] == answer.output[i], "word %d is %08x, not %08x", i, words.w[i], answer.output[i]);
  }
}

// Random123, tests/kat_vectors, philox4x32 7.
void rounding_words_are_those_of_seven_rounds() {
  struct Answer {
    uint32_t counter[4];
    uint64_t seed;
    uint32_t output[4];
  };
  const Answer answers[] = {
      {{0, 0, 0, 0}, 0, {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}},
      {{~0u, ~0u, ~0u, ~0u}, ~0ull, {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       0x299f31d0a4093822ull,
       {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}},
  };
  for (const Answer& answer : answers) {
    const auto& c = answer.counter;
    const Words<uint32_t> words =
        rounding_words({answer.seed, c[2], c[3]}, static_cast<uint64_t>(c[1]) << 32 | c[0]);
    for (int i = 0; i < 4; ++i)
      CHECK(words.w[i] == answer.output[i], "word %d is %08x, not %08x", i, words.w[i], answer.output[i]);
  }
}

void step_seeds_are_words_of_their_stream() {
  const Words<uint32_t> words = Field{42, 3, 5}.words(1ull << 40);
  CHECK(step_seed(42, 1ull << 40, 3) == (static_cast<uint64_t>(words.w[1]) << 32 | words.w[0]), "step_seed");
}

void signs_are_bits_of_words() {
  const Field field{7, 1, static_cast<uint32_t>(Stream::sign)};
  for (uint64_t index : {0ull, 31ull, 32ull, 127ull, 128ull, 129ull, (1ull << 39) - 1, 1ull << 39}) {
    const uint32_t word = field.words(index / 128).w[index % 128 / 32];
    const float expected = (word >> index % 32) & 1 ? -1.0f : 1.0f;
    CHECK(sign_of_bit(sign_word(field, index), index % 32) == expected, "index %llu",
          static_cast<unsigned long long>(index));
  }
}

// --- Normals -------------------------------------------------------------------------------------

void check_normals(uint32_t first, uint32_t second) {
  const double two_pi = 6.283185307179586476925;
  const double u = (first + 0.5) / 4294967296.0, v = (second + 0.5) / 4294967296.0;
  const double r = std::sqrt(-2 * std::log(u));
  float sine, cosine;
  box_muller(first, second, sine, cosine);
  CHECK(std::abs(sine - r * std::sin(two_pi * v)) <= 1.5e-6, "words %08x %08x: sine %.9g", first, second, sine);
  CHECK(std::abs(cosine - r * std::cos(two_pi * v)) <= 1.5e-6, "words %08x %08x: cosine %.9g", first, second,
        cosine);
  CHECK(std::abs(radius<float>(first) - r) <= 1.5e-6, "word %08x: radius %.9g", first, radius<float>(first));
}

void normals_are_box_mullers() {
  std::vector<uint32_t> edges;
  for (int bit = 0; bit < 32; ++bit)
    for (int offset = -2; offset <= 2; ++offset)
      for (uint32_t centre : {1u << bit, 0u - (1u << bit), 0x20000000u * static_cast<uint32_t>(bit)})
        edges.push_back(centre + static_cast<uint32_t>(offset));
  for (uint32_t first : edges)
    for (uint32_t second : edges) check_normals(first, second);
  const Field field{2026, 0, 0};
  for (uint64_t block = 0; block < 200000; ++block) {
    const Words<uint32_t> words = field.words(block);
    check_normals(words.w[0], words.w[1]);
    check_normals(words.w[2], words.w[3]);
  }
}

// --- Storage -------------------------------------------------------------------------------------

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

template <class Number>
bool same(Number a, Number b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
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
  for (float beyond : {before * 2, INFINITY, NAN})
    for (float value : {beyond, -beyond}) {
      const Split<Storage> parts = split<Storage>(value);
      CHECK(parts.nearest.bits == round_to_nearest<Storage>(value).bits && parts.residual == 0, "%a", value);
      CHECK(std::isnan(value) || std::isinf(join<Storage>(parts)), "%a", value);
    }
}

// --- Combinations and spans ----------------------------------------------------------------------

void an_empty_sum_moves_no_bit() {
  for (float theta : {0.0f, -0.0f, 1.0f, -INFINITY, std::numeric_limits<float>::denorm_min()})
    CHECK(bits_of(theta + add_decay(0.0f, theta, empty_sum)) == bits_of(theta), "theta %a", theta);
  CHECK(!contributes(0.0f) && !contributes(-0.0f) && contributes(NAN) && contributes(1e-45f), "contributes");
  CHECK(add_term(2.0f, 3.0f, 1.0f) == 7.0f && add_decay(0.5f, 4.0f, 1.0f) == -1.0f, "one term, one decay");
}

void a_step_is_adams() {
  // Estimates 3 and -1 with weights 1/4 and 1/2 in m, 1/4 and 3/4 in v: m = 1/4, v = 3, and with eps 1
  // -lr m / sqrt(v + eps) is -lr / 8.
  float m = empty_sum, v = 0;
  add_moments(0.25f, 0.25f, 3.0f, m, v);
  add_moments(0.5f, 0.75f, -1.0f, m, v);
  CHECK(m == 0.25f && v == 3.0f, "m %a, v %a", m, v);
  CHECK(moments_step(-16.0f, 1.0f, m, v) == -2.0f, "%a", moments_step(-16.0f, 1.0f, m, v));
  const double third = moments_step(-1.0, 0.0, 1.0, 9.0);
  CHECK(third == -1.0 / 3, "%a", third);
}

void spans_find_the_place_in_the_whole() {
  // Rows 2 to 4 and columns 3 to 7 of a matrix of 11 columns.
  const Span block{2 * 11 + 3, 5, 11};
  int64_t i = 0;
  for (uint64_t row = 2; row < 5; ++row)
    for (uint64_t column = 3; column < 8; ++column)
      CHECK(block.index(i++) == row * 11 + column, "element %d", int(i));
  const Span shard{int64_t{1} << 40, 100, 0};
  CHECK(shard.index(99) == (uint64_t{1} << 40) + 99, "one run");
  const Span far{(int64_t{1} << 62) - 7, 3, int64_t{1} << 33};
  CHECK(far.index(3 * 1000 + 2) == (uint64_t{1} << 62) - 7 + 1000 * (uint64_t{1} << 33) + 2, "64 bits");
}

// --- Power iteration -----------------------------------------------------------------------------

struct OneThread {
  static int64_t first() { return 0; }
  static int64_t step() { return 1; }
  static void wait() {}
  template <class F>
  auto once(F f) const {
    return f();
  }
};

// A symmetric matrix whose element (i, j) is `entry(i, j)` for i >= j.
template <class Entry>
void check_eigenvectors(const char* name, int64_t size, Entry entry) {
  std::vector<double> matrix(size * size), memory(Eigenproblem::doubles(size) + 1, 77.0);
  const Eigenproblem problem = Eigenproblem::in(memory.data(), size);
  double norm = 0;
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) {
      const double value = matrix[i * size + j] = i < j ? entry(j, i) : entry(i, j);
      problem.matrix[i * size + j] = value;
      norm += value * value;
    }
  norm = std::sqrt(norm);
  solve(OneThread{}, problem);
  CHECK(memory.back() == 77.0, "%s of %d: writes beyond its memory", name, int(size));
  for (int64_t a = 0; a < size; ++a)
    for (int64_t i = 0; i < size; ++i) {
      double image = 0, product = 0;
      for (int64_t j = 0; j < size; ++j) {
        image += matrix[i * size + j] * problem.vectors[a * size + j];
        product += problem.vectors[a * size + j] * problem.vectors[i * size + j];
      }
      const double residual = image - problem.values[a] * problem.vectors[a * size + i];
      CHECK(std::fabs(residual) <= 1e-13 * norm, "%s of %d: residual %g of vector %d", name, int(size), residual,
            int(a));
      CHECK(std::fabs(product - (a == i)) <= 1e-13, "%s of %d: product %g of vectors %d, %d", name, int(size),
            product, int(a), int(i));
    }
}

void eigenvectors_solve_their_equation() {
  for (int64_t size : {1, 2, 3, 5, 16, 33, 64}) {
    const auto random = [&](int64_t i, int64_t j) {
      return static_cast<double>(Field{1, 0, 0}.words(i * size + j).w[0]) * 0x1p-31 - 1;
    };
    check_eigenvectors("random", size, random);
    check_eigenvectors("zero", size, [](int64_t, int64_t) { return 0.0; });
    check_eigenvectors("identity", size, [](int64_t i, int64_t j) { return i == j ? 1.0 : 0.0; });
    check_eigenvectors("ones", size, [](int64_t, int64_t) { return 1.0; });
    check_eigenvectors("tiny", size, [&](int64_t i, int64_t j) { return 1e-120 * random(i, j); });
    check_eigenvectors("graded", size, [&](int64_t i, int64_t j) {
      return std::pow(10.0, -(double)(i + j) / 4) * (i == j ? 2 : random(i, j));
    });
    check_eigenvectors("with empty rows", size,
                       [&](int64_t i, int64_t j) { return i % 3 && j % 3 ? random(i, j) : 0.0; });
  }
}

void scales_are_powers_of_two_near_one() {
  for (float magnitude : {1.0f, 1.99f, 3e-25f, 7e30f, 0x1p-126f, 0x1.8p126f}) {
    const float scaled = magnitude * scale_to_one(magnitude);
    CHECK(scaled >= 1 && scaled < 2, "%a becomes %a", magnitude, scaled);
  }
  for (float magnitude : {0.0f, 1e-45f, 0x1.fffffep127f, INFINITY, NAN})
    CHECK(std::isfinite(scale_to_one(magnitude)) && scale_to_one(magnitude) > 0, "scale of %a", magnitude);
}

void dependent_vectors_are_dropped() {
  CHECK(inverse_norm(4, 4, 4) == 0.5f, "an independent vector");
  CHECK(inverse_norm(4, 1e-11f, 1e-11f) > 0, "a remainder of 1.6e-6");
  CHECK(inverse_norm(4, 3e-12f, 3e-12f) == 0, "a remainder below 1e-6");
  CHECK(inverse_norm(4, 1e-11f, 2e-12f) == 0, "a remainder that was rounding errors");
  CHECK(inverse_norm(0, 0, 0) == 0, "no vector");
  CHECK(std::isnan(inverse_norm(NAN, NAN, NAN)), "not a number");
}

void more_blocks_than_the_space_has_room_for_are_left_out() {
  CHECK(KrylovShape::of(1000, 500, 4, 3).blocks == 4, "few of many");
  CHECK(KrylovShape::of(1000, 10, 4, 99).blocks == 4, "ten features are three blocks of four, and a last one");
  CHECK(KrylovShape::of(1, 10, 4, 99).blocks == 2, "one token");
  CHECK(KrylovShape::of(0, 10, 4, 99).blocks == 1, "no tokens");
}

// --- The loops of an instruction set -------------------------------------------------------------

using cpu::InstructionSet;
using cpu::tile_alignment;
using cpu::tile_elements;

// Aligned starts from which a tile crosses each carry of the counter: normals, rounding bits, signs.
const std::vector<uint64_t> starts = {0,
                                      tile_alignment,
                                      (1ull << 34) - tile_alignment,
                                      (1ull << 34) - 5 * tile_alignment,
                                      (1ull << 36) - tile_alignment,
                                      (1ull << 36) - 2 * tile_alignment,
                                      (1ull << 39) - 3 * tile_alignment,
                                      (1ull << 62) - tile_alignment};

void rounding_bits_are_the_cores(const InstructionSet& set) {
  const Field field{0xfedcba9876543210ull, 9, 3};
  for (uint64_t start : starts)
    for (int64_t count : {tile_alignment, 3 * tile_alignment, tile_elements}) {
      std::vector<uint16_t> out(count + 64, 0xabcd);
      set.rounding_bits(field, start, count, out.data());
      for (int64_t i = 0; i < count; ++i)
        CHECK(out[i] == rounding_bits(field, start + i), "%s: element %d from %llu", set.name, int(i),
              static_cast<unsigned long long>(start));
      for (size_t i = count; i < out.size(); ++i)
        CHECK(out[i] == 0xabcd, "%s writes beyond %d elements", set.name, int(count));
    }
}

float core_normal(const Field& field, uint64_t index) {
  const Words<uint32_t> words = field.words(index / 4);
  float sine, cosine;
  box_muller(words.w[index % 4 / 2 * 2], words.w[index % 4 / 2 * 2 + 1], sine, cosine);
  return index % 2 ? cosine : sine;
}

float core_sign(const Field& field, uint64_t index) {
  return sign_of_bit(sign_word(field, index), static_cast<unsigned>(index % 32));
}

template <class Number, class Core>
void terms_are_the_cores(const InstructionSet& set, const cpu::DirectionLoops<Number>& loops, Core core) {
  const Field one{11, 2, 6}, other{~0ull, 2, 6};
  const Number guard = 77;
  for (uint64_t start : starts)
    for (int64_t count : {tile_alignment, 5 * tile_alignment, tile_elements}) {
      std::vector<Number> buffer(count + 32, guard);
      Number* sum = buffer.data() + 16;
      loops.start(one, Number(0.3f), start, count, sum, cpu::nothing);
      loops.add(other, Number(-1.7f), start, count, sum, cpu::nothing);
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t index = start + static_cast<uint64_t>(i);
        const Number first = add_term<Number>(0.3f, core(one, index), Number{empty_sum});
        const Number expected = add_term<Number>(-1.7f, core(other, index), first);
        CHECK(same(sum[i], expected), "%s: element %llu is %a, not %a", set.name,
              static_cast<unsigned long long>(index), double(sum[i]), double(expected));
      }
      for (int i = 0; i < 16; ++i)
        CHECK(buffer[i] == guard && sum[count + i] == guard, "%s writes beyond the tile", set.name);
    }
}

template <class Number, class Core>
void moments_are_the_cores(const InstructionSet& set, const cpu::DirectionLoops<Number>& loops, Core core) {
  const Field older{11, 2, 6}, newer{~0ull, 2, 6};
  const cpu::WindowLoops<Number>& window = set.arithmetic<Number>().window;
  const Number guard = 77, minus_lr = -0.1f, eps = 1e-3f;
  for (uint64_t start : starts)
    for (int64_t count : {tile_alignment, 5 * tile_alignment}) {
      std::vector<Number> m(count + 16, guard), v(count + 16, guard), g(count), change(count + 16, guard);
      std::fill_n(m.data(), count, Number{empty_sum});
      std::fill_n(v.data(), count, Number{0});
      loops.add_moments(older, Number(0.3f), Number(0.2f), Number(0.4f), start, count, m.data(), v.data(),
                        cpu::nothing);
      loops.start(newer, Number(-1.7f), start, count, g.data(), cpu::nothing);
      loops.add(older, Number(0.9f), start, count, g.data(), cpu::nothing);
      window.add_moments(Number(0.5f), Number(0.1f), g.data(), count, m.data(), v.data());
      window.step(minus_lr, eps, m.data(), v.data(), count, change.data());
      std::vector<Number> first_g(count), both(count + 16, guard);
      loops.start(older, Number(0.3f), start, count, first_g.data(), cpu::nothing);
      const cpu::Estimate<Number> estimates[] = {{first_g.data(), Number(0.2f), Number(0.4f)},
                                                 {g.data(), Number(0.5f), Number(0.1f)}};
      window.step_of(estimates, 2, minus_lr, eps, count, both.data());
      CHECK(both == change, "%s: a step of estimates in memory", set.name);
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t index = start + static_cast<uint64_t>(i);
        const Number old_z = core(older, index), new_z = core(newer, index);
        Number mean{empty_sum}, square{0};
        add_moments<Number>(0.2f, 0.4f, add_term<Number>(0.3f, old_z, Number{empty_sum}), mean, square);
        const Number first = add_term<Number>(-1.7f, new_z, Number{empty_sum});
        add_moments<Number>(0.5f, 0.1f, add_term<Number>(0.9f, old_z, first), mean, square);
        CHECK(same(m[i], mean) && same(v[i], square), "%s: moments of element %llu are %a and %a", set.name,
              static_cast<unsigned long long>(index), double(m[i]), double(v[i]));
        CHECK(same(change[i], moments_step(minus_lr, eps, mean, square)), "%s: step of element %llu is %a",
              set.name, static_cast<unsigned long long>(index), double(change[i]));
      }
      for (int i = 0; i < 16; ++i)
        CHECK(m[count + i] == guard && v[count + i] == guard && change[count + i] == guard,
              "%s writes beyond the stretch", set.name);
    }
}

// A matrix whose factors lie in memory without a number to spare.
struct FactoredMatrix {
  int64_t rows, columns, rank;
  std::vector<float> left, right;

  FactoredMatrix(int64_t rows, int64_t columns, int64_t rank) : rows(rows), columns(columns), rank(rank) {
    const Field field{21, 0, 0};
    for (int64_t i = 0; i < 2 * rank * rows; ++i) left.push_back(core_normal(field, i));
    for (int64_t i = 0; i < 2 * rank * columns; ++i) right.push_back(core_normal(field, 1000000 + i));
  }

  // Of term `term`: the sum over the rank, in its order.
  template <class Number>
  Number entry(int64_t term, int64_t element) const {
    const int64_t row = element / columns, column = element % columns;
    Number sum{empty_sum};
    for (int64_t q = term * rank; q < (term + 1) * rank; ++q)
      sum = add_term<Number>(left[q * rows + row], right[q * columns + column], sum);
    return sum;
  }
};

template <class Number>
void entries_are_the_cores(const InstructionSet& set, const FactoredMatrix& matrix) {
  const cpu::Term terms[] = {{1, 0, 0.3f}, {0, 0, -1.7f}};
  const cpu::Step steps[] = {{0, 0.2f, 0.4f, terms, 1}, {1, 0.5f, 0.1f, terms, 2}};
  const cpu::Factors factors{
      matrix.left.data(),        matrix.right.data(),         matrix.rows, matrix.columns, matrix.rank,
      matrix.rank * matrix.rows, matrix.rank * matrix.columns};
  const cpu::FactoredLoops<Number>& loops = set.arithmetic<Number>().factored;
  const Number minus_lr = -0.1f, eps = 1e-3f;
  const int64_t elements = matrix.rows * matrix.columns;
  for (int64_t from : {int64_t{0}, elements / 3, elements - 1}) {
    const int64_t count = std::min<int64_t>(elements - from, tile_elements);
    std::vector<Number> sum(count + cpu::widest_pack - 1), change(sum);
    loops.combine(factors, terms, 2, from, count, sum.data(), cpu::nothing);
    loops.step(factors, steps, 2, minus_lr, eps, from, count, change.data(), cpu::nothing);
    for (int64_t i = 0; i < count; ++i) {
      const Number one = add_term<Number>(0.3f, matrix.entry<Number>(1, from + i), Number{empty_sum});
      const Number both = add_term<Number>(-1.7f, matrix.entry<Number>(0, from + i), one);
      Number m{empty_sum}, v{0};
      add_moments<Number>(0.2f, 0.4f, one, m, v);
      add_moments<Number>(0.5f, 0.1f, both, m, v);
      CHECK(same(sum[i], both), "%s: element %d is %a, not %a", set.name, int(from + i), double(sum[i]),
            double(both));
      CHECK(same(change[i], moments_step(minus_lr, eps, m, v)), "%s: step of element %d is %a", set.name,
            int(from + i), double(change[i]));
    }
  }
}

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

// The dot product of core/power_iteration.h, as it is described there.
float plain_dot(const float* a, const float* b, int64_t length) {
  float lane[dot_lanes] = {};
  for (int64_t i = 0; i < length; ++i) lane[i % dot_lanes] = fused_multiply_add(a[i], b[i], lane[i % dot_lanes]);
  for (int half = dot_lanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

void rows_are_the_cores(const InstructionSet& set, int64_t length, int count) {
  // Of their exact size, so that the sanitizer sees a read beyond the end.
  std::vector<std::vector<float>> rows(cpu::most_rows, std::vector<float>(length));
  std::vector<float> vector(length), weights(cpu::most_rows);
  const float* pointers[cpu::most_rows];
  for (int t = 0; t < cpu::most_rows; ++t) {
    pointers[t] = rows[t].data();
    weights[t] = core_normal({3, 7, 7}, t);
    for (int64_t i = 0; i < length; ++i) rows[t][i] = core_normal({3, static_cast<uint32_t>(t), 7}, i);
  }
  for (int64_t i = 0; i < length; ++i) vector[i] = core_normal({4, 0, 7}, i);

  float products[cpu::most_rows] = {77, 77, 77, 77};
  set.rows.dot(pointers, count, vector.data(), length, products);
  for (int t = 0; t < cpu::most_rows; ++t) {
    const float expected = t < count ? plain_dot(pointers[t], vector.data(), length) : 77;
    CHECK(same(products[t], expected), "%s: product %d of %d, length %d, is %a, not %a", set.name, t, count,
          int(length), products[t], expected);
  }
  for (bool first : {true, false}) {
    std::vector<float> sum = vector;
    (first ? set.rows.start : set.rows.add)(pointers, count, weights.data(), length, sum.data());
    for (int64_t i = 0; i < length; ++i) {
      float expected = first ? 0 : vector[i];
      for (int t = 0; t < count; ++t) expected = fused_multiply_add(weights[t], rows[t][i], expected);
      CHECK(same(sum[i], expected), "%s: element %d of %d rows, length %d", set.name, int(i), count, int(length));
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

void loops_are_the_cores(const InstructionSet& set) {
  rounding_bits_are_the_cores(set);
  terms_are_the_cores(set, set.single.normals, core_normal);
  terms_are_the_cores(set, set.single.signs, core_sign);
  terms_are_the_cores(set, set.twice.normals, core_normal);
  terms_are_the_cores(set, set.twice.signs, core_sign);
  moments_are_the_cores(set, set.single.normals, core_normal);
  moments_are_the_cores(set, set.single.signs, core_sign);
  moments_are_the_cores(set, set.twice.normals, core_normal);
  moments_are_the_cores(set, set.twice.signs, core_sign);
  for (int64_t columns : {1, 2, 7, 16, 17, 64, 131, 1500})
    for (int64_t rank : {0, 1, 3}) {
      entries_are_the_cores<float>(set, {70, columns, rank});
      entries_are_the_cores<double>(set, {70, columns, rank});
    }
  for (int64_t length : {1, 3, 4, 8, 15, 16, 31, 32, 33, 40, 63, 64, 100, 131, 1000})
    for (int count = 1; count <= cpu::most_rows; ++count) rows_are_the_cores(set, length, count);
  displacements_are_the_cores(set, all_sizes<float>());
  displacements_are_the_cores(set, all_sizes<double>());
  all_displacements_are_the_cores(set, all_patterns<BFloat16>());
  all_displacements_are_the_cores(set, all_patterns<Half>());
  // Around numbers that are zero, subnormal, the smallest normal one, 4, 2^14, the largest, infinite and none.
  for (uint16_t weight : {0x0000, 0x0001, 0x03ff, 0x0400, 0x0401, 0x0402, 0x4400, 0x4401, 0x7400, 0x7401, 0x7bfe,
                          0x7bff, 0x7c00, 0x7c01, 0x7e00})
    for (float change : {0.0f, 0x1p-37f, 0x1p-31f, 0x1p-13f, 0.5f}) lanes_alone_are_the_cores(set, weight, change);
}

}  // namespace

int main() {
  one_correction_makes_the_root();
  philox_gives_the_known_answers();
  rounding_words_are_those_of_seven_rounds();
  step_seeds_are_words_of_their_stream();
  signs_are_bits_of_words();
  normals_are_box_mullers();
  conversions_are_exact<BFloat16>();
  conversions_are_exact<Half>();
  splits_are_numbers_of_24_bits<BFloat16>();
  splits_are_numbers_of_24_bits<Half>();
  an_empty_sum_moves_no_bit();
  a_step_is_adams();
  spans_find_the_place_in_the_whole();
  eigenvectors_solve_their_equation();
  scales_are_powers_of_two_near_one();
  dependent_vectors_are_dropped();
  more_blocks_than_the_space_has_room_for_are_left_out();
  std::string names;
  for (const std::string& name : cpu::available_instruction_sets()) {
    cpu::use_instruction_set(name);
    loops_are_the_cores(cpu::instruction_set());
    names += " " + name;
  }
  return finish(("instruction sets:" + names).c_str());
}
