// Directions on the device: what one thread's share of a tensor gets from a seed.
#pragma once

#include "../core/combine.h"
#include "../core/normal.h"
#include "../core/sign.h"
#include "../core/storage.h"
#include "chunks.h"

#if __has_include(<curand_philox4x32_x.h>)
#include <curand_philox4x32_x.h>
#define ZOEXT_CURAND_ROUNDS
#endif

namespace zoext::cuda {

// cuRAND's own rounds, and those of csrc/core where the toolkit has no cuRAND; the words are equal.
__device__ __forceinline__ Words<uint32_t> words_of(const Field& field, uint64_t block) {
#if defined(ZOEXT_CURAND_ROUNDS)
  const Words<uint32_t> counter = field.counter(block);
  const uint4 words =
      curand_Philox4x32_10(make_uint4(counter.w[0], counter.w[1], counter.w[2], counter.w[3]),
                           make_uint2(static_cast<uint32_t>(field.seed), static_cast<uint32_t>(field.seed >> 32)));
  return {{words.x, words.y, words.z, words.w}};
#else
  return field.words(block);
#endif
}

// One number for each element of a share; an empty sum at first.
template <class Number, class Tiling>
struct Sum {
  Number of[Tiling::groups][Tiling::vector];

  __device__ Sum() {
#pragma unroll
    for (auto& group : of)
#pragma unroll
      for (Number& number : group) number = Number{empty_sum};
  }
};

struct Normals {
  static constexpr Stream stream = Stream::dense;
  template <class Storage>
  using Tiling = NormalTiling<Storage>;

  // sum += coefficient * z on the share that begins at `index`.
  template <class Number, class Tiling>
  static __device__ void add(const Field& field, Number coefficient, uint64_t index, Sum<Number, Tiling>& sum) {
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g)
#pragma unroll
      for (int i = 0; i < Tiling::vector; i += 4)
        add_block(words_of(field, (index + g * Tiling::step + i) / 4), coefficient, &sum.of[g][i]);
  }

 private:
  template <class Number>
  static __device__ void add_block(const Words<uint32_t>& words, Number coefficient, Number* sum) {
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
      float sine, cosine;
      box_muller(words.w[pair], words.w[pair + 1], sine, cosine);
      sum[pair] = add_term<Number>(coefficient, sine, sum[pair]);
      sum[pair + 1] = add_term<Number>(coefficient, cosine, sum[pair + 1]);
    }
  }
};

struct Signs {
  static constexpr Stream stream = Stream::sign;
  template <class Storage>
  using Tiling = SignTiling<Storage>;

  template <class Number, class Tiling>
  static __device__ void add(const Field& field, Number coefficient, uint64_t index, Sum<Number, Tiling>& sum) {
    const Words<uint32_t> words = words_of(field, index / signs_per_block);
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) {
      const uint32_t bits = words.w[g] >> index % 32;
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i)
        sum.of[g][i] = add_term<Number>(coefficient, sign_of_bit(bits, i), sum.of[g][i]);
    }
  }
};

}  // namespace zoext::cuda
