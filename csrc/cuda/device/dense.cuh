// Dense directions: the noise field on the share of a thread.
#pragma once

#include "../../core/normal.h"
#include "../../core/sign.h"
#include "chunks.h"
#include "combination.cuh"

namespace zoext::cuda {

struct Normals {
  static constexpr Stream stream = Stream::dense;
  static constexpr int displace_blocks = 5, steps_blocks = 4, window_blocks = 4, windows_blocks = 2;
  template <class Storage>
  using Tiling = NormalTiling<Storage>;

  // sum += coefficient * z on the share that begins at `index`.
  template <class Number, class Tiling>
  static __device__ void add(const Field& field, Number coefficient, uint64_t index, Sum<Number, Tiling>& sum) {
    // A share begins at a multiple of its vector in a multiple of its unit: what follows has other bits.
    const uint64_t first_block = index / 4;
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g)
#pragma unroll
      for (int i = 0; i < Tiling::vector; i += 4)
        add_block(words_of(field, first_block | (g * Tiling::step + i) / 4), coefficient, &sum.of[g][i]);
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
  static constexpr int displace_blocks = 3, steps_blocks = 2, window_blocks = 2, windows_blocks = 2;
  template <class Storage>
  using Tiling = SignTiling<Storage>;

  template <class Number, class Tiling>
  static __device__ void add(const Field& field, Number coefficient, uint64_t index, Sum<Number, Tiling>& sum) {
    static_assert(Tiling::groups == 2 && Tiling::step == 32, "a share has bits of two words");
    const Words<uint32_t> words = words_of(field, index / signs_per_block);
    const bool is_upper = index / Tiling::unit % 2 != 0;
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) {
      const uint32_t bits = (is_upper ? words.w[2 + g] : words.w[g]) >> index % 32;
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i)
        sum.of[g][i] = add_term<Number>(coefficient, sign_of_bit(bits, i), sum.of[g][i]);
    }
  }
};

// Directions on the share that begins at `index`.
template <class Noise, class Tiling>
struct DenseFrom {
  uint32_t key;
  uint64_t index;

  template <class Number>
  __device__ void add(const Term& term, Sum<Number, Tiling>& sum) const {
    const Field field{term.seed, key, static_cast<uint32_t>(Noise::stream)};
    Noise::template add<Number>(field, term.coefficient, index, sum);
  }
};

template <class Noise, class StorageType>
struct Dense {
  using Storage = StorageType;
  using Tiling = typename Noise::template Tiling<Storage>;
  using TensorSlot = Slot;
  static constexpr bool has_rounds = true;  // of Philox
  static constexpr int displace_blocks = Noise::displace_blocks, steps_blocks = Noise::steps_blocks,
                       window_blocks = Noise::window_blocks, windows_blocks = Noise::windows_blocks;

  template <class AnyShare>
  static __device__ DenseFrom<Noise, Tiling> on(const Slot& slot, const AnyShare& share) {
    return {slot.key, share.index};
  }
};

// f(Noise{}) with the noise of a distribution.
template <class F>
void for_noise(Distribution distribution, F f) {
  distribution == Distribution::sign ? f(Signs{}) : f(Normals{});
}

}  // namespace zoext::cuda
