// Rademacher signs: one bit an element, 128 elements a Philox block.
#pragma once

#include "stream.h"

namespace zoext {

constexpr int signs_per_block = 128;

// The word that holds the sign of element `index`; its bit is `index % 32`.
ZOEXT_HD uint32_t sign_word(const Field& field, uint64_t index) {
  return field.words(index / signs_per_block).w[index / 32 % 4];
}

// The sign in bit `bit`: a set bit is minus one.
ZOEXT_HD float sign_of_bit(uint32_t word, unsigned bit) { return (word >> bit & 1u) ? -1.0f : 1.0f; }

}  // namespace zoext
