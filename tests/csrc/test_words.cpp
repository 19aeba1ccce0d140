// The words of the noise field, and the signs and seeds that are made of them. test_core_in_cpp.py builds
// and runs it.
#include <cstdint>
#include <initializer_list>

#include "check.h"
#include "core/sign.h"
#include "core/storage.h"
#include "core/stream.h"

using namespace zoext;

namespace {

struct Answer {
  uint32_t counter[4];
  uint64_t seed;
  uint32_t output[4];

  Field field() const { return {seed, counter[2], counter[3]}; }
  uint64_t block() const { return static_cast<uint64_t>(counter[1]) << 32 | counter[0]; }
  void check(const Words<uint32_t>& words) const {
    for (int i = 0; i < 4; ++i)
      CHECK(words.w[i] == output[i], "word %d is %08x, not %08x", i, words.w[i], output[i]);
  }
};

void philox_gives_the_known_answers() {
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
  for (const Answer& answer : answers) answer.check(answer.field().words(answer.block()));
}

// Random123, tests/kat_vectors, philox4x32 7.
void rounding_words_are_those_of_seven_rounds() {
  const Answer answers[] = {
      {{0, 0, 0, 0}, 0, {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}},
      {{~0u, ~0u, ~0u, ~0u}, ~0ull, {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       0x299f31d0a4093822ull,
       {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}},
  };
  for (const Answer& answer : answers) answer.check(rounding_words(answer.field(), answer.block()));
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

}  // namespace

int main() {
  philox_gives_the_known_answers();
  rounding_words_are_those_of_seven_rounds();
  step_seeds_are_words_of_their_stream();
  signs_are_bits_of_words();
  return finish("words");
}
