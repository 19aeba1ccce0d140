// The uses of random words, which the last word of the counter separates.
#pragma once

#include "philox.h"

namespace zoext {

// Part of the file format of a recorded run: numbers are never reused or changed.
enum class Stream : uint32_t {
  dense = 0,            // normals of a dense direction
  left_factor = 1,      // normals of the left factor of a low-rank direction
  right_factor = 2,     // normals of its right factor
  rounding = 3,         // bits of stochastic rounding
  power_iteration = 4,  // start of a power iteration
  seed = 5,             // seeds derived from the seed of a run
  sign = 6,             // signs of a dense Rademacher direction
};

// The distribution of the entries of a dense direction.
enum class Distribution : int64_t { normal = 0, sign = 1 };

// The field of one direction on one parameter: a function of the block number alone.
struct Field {
  uint64_t seed;
  uint32_t key;
  uint32_t stream;

  ZOEXT_HD Words<uint32_t> counter(uint64_t block) const {
    return {{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), key, stream}};
  }

  ZOEXT_HD Words<uint32_t> words(uint64_t block) const {
    return philox4x32<most_rounds>(counter(block), RoundKeys{seed});
  }
};

// The seed of draw `draw` of step `step`: 64 bits that depend only on the arguments, so that a run has no
// generator state.
ZOEXT_HD uint64_t step_seed(uint64_t seed, uint64_t step, uint32_t draw) {
  const Words<uint32_t> words = Field{seed, draw, static_cast<uint32_t>(Stream::seed)}.words(step);
  return static_cast<uint64_t>(words.w[1]) << 32 | words.w[0];
}

}  // namespace zoext
