// Philox4x32: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "platform.h"

namespace zoext {

// Four 32-bit words, each alone (`uint32_t`) or one per 64-bit lane of a vector.
template <class Word>
struct Words {
  Word w[4];
};

template <class Word>
struct Product {
  Word high, low;
};

ZOEXT_HD Product<uint32_t> multiply_wide(uint32_t constant, uint32_t word) {
#if defined(__CUDA_ARCH__)
  return {__umulhi(constant, word), constant * word};  // of 64-bit factors ptxas adds up halves that are zero
#else
  const uint64_t product = static_cast<uint64_t>(constant) * word;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
#endif
}

constexpr int most_rounds = 10;  // as the paper recommends
constexpr int least_rounds = 7;  // as few as pass BigCrush, in the paper's table 2

// The keys of the rounds: Weyl sequences that start at the halves of the seed.
struct RoundKeys {
  uint64_t seed;

  ZOEXT_HD uint32_t first(int round) const {
    return static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * 0x9E3779B9u;
  }
  ZOEXT_HD uint32_t second(int round) const {
    return static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * 0xBB67AE85u;
  }
};

ZOEXT_HD uint32_t xor_of_three(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }

// A vector type supplies `multiply_wide`, `xor_of_three` and keys of its own.
template <int rounds, class Word, class Keys>
ZOEXT_HD Words<Word> philox4x32(Words<Word> counter, const Keys& keys) {
  constexpr uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < rounds; ++round) {
    const Product<Word> a = multiply_wide(multiplier0, counter.w[0]);
    const Product<Word> b = multiply_wide(multiplier1, counter.w[2]);
    counter = {{xor_of_three(b.high, counter.w[1], keys.first(round)), b.low,
                xor_of_three(a.high, counter.w[3], keys.second(round)), a.low}};
  }
  return counter;
}

}  // namespace zoext
