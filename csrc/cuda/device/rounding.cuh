// Conversion of numbers from and to storage, a group at a time. Two numbers of 16 bits share a word and a few
// instructions, which give the bits of csrc/core/storage.h for ordinary numbers; rare ones are corrected
// afterwards.
#pragma once

#include "group.cuh"

namespace zoext::cuda {

// The random words of a share: for each group those of its half of a block.
template <class Tiling>
struct RoundingWords {
  Words<uint32_t> of[Tiling::groups];

  __device__ RoundingWords(const Field& field, uint64_t index) {
    static_assert(2 * Tiling::vector == roundings_per_block && Tiling::step % roundings_per_block == 0,
                  "all groups are the same half of their blocks");
    const uint32_t turn = static_cast<uint32_t>(index) & Tiling::vector;  // 8 bits for the second half
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) {
      of[g] = rounding_words(field, (index + g * Tiling::step) / roundings_per_block);
#pragma unroll
      for (uint32_t& word : of[g].w) word = __funnelshift_l(word, word, turn);
    }
  }

  // Here and not where they are used, where nvcc would place it otherwise.
  __device__ void make_here() {
#pragma unroll
    for (auto& block : of)
      for (uint32_t& word : block.w) asm volatile("" : "+r"(word));
  }
};

// The same for other roundings, which need no words.
struct NoWords {
  __device__ void make_here() {}
};

template <Rounding rounding, class Tiling, class AnyShare>
__device__ auto rounding_words_of(const Slot& slot, const AnyShare& share, uint64_t seed) {
  if constexpr (rounding == Rounding::stochastic)
    return RoundingWords<Tiling>({seed, slot.key, static_cast<uint32_t>(Stream::rounding)}, share.index);
  else
    return NoWords{};
}

// The upper halves of two words, and the second bytes of four.
__device__ __forceinline__ uint32_t upper_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }
__device__ __forceinline__ uint32_t second_bytes(const uint32_t* words) {
  return __byte_perm(__byte_perm(words[0], words[1], 0x0051), __byte_perm(words[2], words[3], 0x0051), 0x5410);
}

// Also false for a NaN.
__device__ __forceinline__ bool is_below(float limit, float a) { return fabsf(a) < limit; }

template <int vector>
__device__ bool are_below(float limit, const float (&numbers)[vector]) {
  float largest = fabsf(numbers[0]);
#pragma unroll
  for (int i = 1; i < vector; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(numbers[i])));
  return largest < limit;
}

// Pairs of numbers, and longer patterns of single ones: those of a number, a byte for the residual plus 128,
// and a last byte.
template <class Storage>
struct Pair;

template <>
struct Pair<BFloat16> {
  // From here on the formulas of csrc/core round to nearest.
  static constexpr float stochastic_limit = 0x1.fep+127f, split_limit = 0x1.feffp+127f;

  // Patterns are joined to numbers in this unit.
  static constexpr float unit = 1.0f;

  // What the patterns of infinities and of no numbers are joined to is not below, whatever the residual, nor is
  // what a zero and a residual that leads below it are joined to: a carry makes all bits of the exponent ones.
  static constexpr float join_limit = 0x1.ffp+127f;

  static __device__ uint32_t round_to_nearest(float a, float b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  }

  // Below the limit. Half of `random` is for each.
  static __device__ uint32_t round_stochastically(float a, float b, uint32_t random) {
    return upper_halves(bits_of(a) + (random & 0xffffu), bits_of(b) + (random >> 16));
  }

  // The last byte is zero.
  static constexpr uint32_t last_byte_mask = 0u;
  static __device__ float join(uint32_t pattern) { return float_of_bits(pattern - 0x8000u); }

  // Below the limit.
  static __device__ uint32_t split(float a) { return bits_of(a) + 0x8080u; }
  static __device__ uint32_t with_signs(uint32_t pair, float, float) { return pair; }
};

template <>
struct Pair<Half> {
  static constexpr float stochastic_limit = 65504.0f, split_limit = 0x1.ffdfep+15f;
  static constexpr float unit = 0x1p112f;               // see half_pattern
  static constexpr float join_limit = 65520.0f / unit;  // the largest number with its largest residual is below

  static __device__ uint32_t round_to_nearest(float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  }

  static __device__ uint32_t round_stochastically(float a, float b, uint32_t random) {
    // The lower half goes up first: a shift to the right and a sum are one instruction, a mask is another.
    const uint32_t lower = __byte_perm(random, 0u, 0x1044);
    const uint32_t first = bits_of(multiply(a, 1 / unit)) + (lower >> 19);
    const uint32_t second = bits_of(multiply(b, 1 / unit)) + (random >> 19);
    uint32_t pair;
    asm("cvt.rz.f16x2.f32 %0, %1, %2;"
        : "=r"(pair)
        : "f"(multiply(float_of_bits(second), unit)), "f"(multiply(float_of_bits(first), unit)));
    return pair;
  }

  // The last byte may be anything.
  static constexpr uint32_t last_byte_mask = 0xffu;
  static __device__ float join(uint32_t pattern) {
    const int32_t shifted = (static_cast<int32_t>(pattern) >> 3) - 0x1000;
    return float_of_bits(static_cast<uint32_t>(shifted) & 0x8fffffe0u);
  }

  static __device__ uint32_t split(float a) { return (bits_of(multiply(a, 1 / unit)) << 3) + 0x8080u; }
  static __device__ uint32_t with_signs(uint32_t pair, float a, float b) {
    return pair | (upper_halves(bits_of(a), bits_of(b)) & 0x80008000u);
  }
};

// Groups in 32 and 64 bits, which keep what arithmetic gives.
template <class Storage, int vector>
struct Rounder {
  static __device__ Group<Storage, vector> round_to_nearest(const Storage (&exact)[vector]) {
    Group<Storage, vector> group;
#pragma unroll
    for (int i = 0; i < vector; ++i) group.element[i] = exact[i];
    return group;
  }
};

template <class Storage, int vector>
struct PairRounder {
  using Weights = Group<Storage, vector>;
  using Residuals = Group<int8_t, vector>;
  using Two = Pair<Storage>;

  static __device__ Weights round_to_nearest(const float (&exact)[vector]) {
    Weights group;
#pragma unroll
    for (int i = 0; i < vector; i += 2) group.word[i / 2] = Two::round_to_nearest(exact[i], exact[i + 1]);
    return group;
  }

  static __device__ Weights round_stochastically(const float (&exact)[vector], const Words<uint32_t>& random) {
    Weights group;
#pragma unroll
    for (int i = 0; i < vector; i += 2)
      group.word[i / 2] = Two::round_stochastically(exact[i], exact[i + 1], random.w[i / 2]);
    if (!are_below(Two::stochastic_limit, exact)) mend(exact, Two::stochastic_limit, group);
    return group;
  }

  static __device__ Weights split(const float (&exact)[vector], Residuals& residuals) {
    uint32_t patterns[vector];
#pragma unroll
    for (int i = 0; i < vector; ++i) patterns[i] = Two::split(exact[i]);
    Weights group;
#pragma unroll
    for (int i = 0; i < vector; i += 2)
      group.word[i / 2] = Two::with_signs(upper_halves(patterns[i], patterns[i + 1]), exact[i], exact[i + 1]);
#pragma unroll
    for (int i = 0; i < vector; i += 4) residuals.word[i / 4] = second_bytes(patterns + i) ^ 0x80808080u;
    if (!are_below(Two::split_limit, exact)) {
      mend(exact, Two::split_limit, group);
#pragma unroll
      for (int i = 0; i < vector; ++i)
        if (!is_below(Two::split_limit, exact[i])) residuals.word[i / 4] &= ~(0xffu << 8 * (i % 4));
    }
    return group;
  }

  // Numbers in units of `Two::unit`.
  static __device__ void join(const Weights& group, const Residuals& residuals, float (&numbers)[vector]) {
#pragma unroll
    for (int i = 0; i < vector; i += 4) {
      const uint32_t first = group.word[i / 2], second = group.word[i / 2 + 1];
      const uint32_t bytes = residuals.word[i / 4] ^ 0x80808080u;
      const uint32_t even = bytes & (0x00ff00ffu | Two::last_byte_mask << 8 | Two::last_byte_mask << 24);
      const uint32_t odd = bytes & (0xff00ff00u | Two::last_byte_mask | Two::last_byte_mask << 16);
      numbers[i] = Two::join(__byte_perm(first, even, 0x1045));
      numbers[i + 1] = Two::join(__byte_perm(first, odd, 0x3254));
      numbers[i + 2] = Two::join(__byte_perm(second, even, 0x1065));
      numbers[i + 3] = Two::join(__byte_perm(second, odd, 0x3274));
    }
    if (!are_below(Two::join_limit, numbers))
#pragma unroll
      for (int i = 0; i < vector; ++i)
        if (!is_below(Two::join_limit, numbers[i]))
          numbers[i] = multiply(zoext::join<Storage>({group.element[i], residuals.element[i]}), 1 / Two::unit);
  }

 private:
  // Rounds numbers that are not below the limit to nearest.
  static __device__ void mend(const float (&exact)[vector], float limit, Weights& group) {
    const Weights nearest = round_to_nearest(exact);
#pragma unroll
    for (int i = 0; i < vector; ++i)
      if (!is_below(limit, exact[i]))
        group.word[i / 2] = __byte_perm(group.word[i / 2], nearest.word[i / 2], i % 2 ? 0x7610 : 0x3254);
  }
};

template <int vector>
struct Rounder<BFloat16, vector> : PairRounder<BFloat16, vector> {};

template <int vector>
struct Rounder<Half, vector> : PairRounder<Half, vector> {};

}  // namespace zoext::cuda
