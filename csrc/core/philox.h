// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
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
  const uint64_t product = static_cast<uint64_t>(constant) * word;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
}

// A vector type supplies `multiply_wide`, `^` and construction from a word.
template <class Word>
ZOEXT_HD Words<Word> philox4x32_10(Words<Word> counter, uint64_t seed) {
  constexpr uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
  constexpr uint32_t weyl0 = 0x9E3779B9u, weyl1 = 0xBB67AE85u;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const Product<Word> a = multiply_wide(multiplier0, counter.w[0]);
    const Product<Word> b = multiply_wide(multiplier1, counter.w[2]);
    counter = {{b.high ^ counter.w[1] ^ Word(key0), b.low, a.high ^ counter.w[3] ^ Word(key1), a.low}};
    key0 += weyl0;
    key1 += weyl1;
  }
  return counter;
}

}  // namespace zoext
