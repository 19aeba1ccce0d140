// Dense directions: the noise field on the share of a thread.
#pragma once

#include "../core/normal.h"
#include "../core/sign.h"
#include "chunks.h"
#include "combination.cuh"
#include "launch.h"

namespace zoext::cuda {

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

// The direction of a seed on one share of a tensor.
template <class Noise, class StorageType>
class Dense {
 public:
  using Storage = StorageType;
  using Tiling = typename Noise::template Tiling<Storage>;
  using TensorSlot = Slot;

  __device__ Dense(const Slot& slot, const Share<Tiling>& share) : key_(slot.key), index_(share.index) {}

  template <class Number>
  __device__ void add(const Term& term, Number coefficient, Sum<Number, Tiling>& sum) const {
    Noise::template add<Number>({term.seed, key_, static_cast<uint32_t>(Noise::stream)}, coefficient, index_, sum);
  }

 private:
  const uint32_t key_;
  const uint64_t index_;
};

// f(Noise{}) with the noise of a distribution.
template <class F>
void for_noise(Distribution distribution, F f) {
  distribution == Distribution::sign ? f(Signs{}) : f(Normals{});
}

}  // namespace zoext::cuda
