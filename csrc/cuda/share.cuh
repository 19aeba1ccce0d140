// The shares of a thread: which they are, and the weights of one, read, moved, rounded and written.
#pragma once

#include "chunks.h"
#include "combination.cuh"
#include "group.cuh"
#include "words.cuh"

namespace zoext::cuda {

// f(slot, share) for every share of the calling thread.
template <class Tiling, class TensorSlot, class F>
__device__ void for_each_share(const Table<TensorSlot>& table, F f) {
  const TensorSlot& slot = table.slot_of(blockIdx.x);
  const int64_t first =
      static_cast<int64_t>(blockIdx.x - slot.first_chunk) * Tiling::shares_per_chunk + threadIdx.x;
  auto share = share_of<Tiling>(slot, first);
#pragma unroll 1
  for (int i = 0; i < Tiling::shares_per_thread; ++i) {
    if (i > 0) share = slot.is_one_run() ? share.next() : share_of<Tiling>(slot, first + i * threads_per_chunk);
    if (!share.is_empty()) f(slot, share);
  }
}

template <class Storage, class Tiling>
class Weights {
 public:
  __device__ Weights(const Slot& slot, const Share<Tiling>& share) {
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) groups_[g].load(slot.theta, share.group(g));
  }

  // out = round(theta + (change - decay theta)); `seeds` begin with that of the rounding bits.
  template <Rounding rounding, class Number>
  __device__ void move(const Slot& slot, const Share<Tiling>& share, const Sum<Number, Tiling>& change,
                       Number decay, const int64_t* seeds) {
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) {
      Words<uint32_t> random{};
      if constexpr (rounding == Rounding::stochastic) {
        const Field field{seed_at(seeds, 0), slot.key, static_cast<uint32_t>(Stream::rounding)};
        random = words_of(field, (share.index + g * Tiling::step) / roundings_per_block);
      }
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i) {
        Storage& element = groups_[g].element[i];
        const Number value = widen(element);
        const Number moved = value + add_decay<Number>(decay, value, change.of[g][i]);
        if constexpr (rounding == Rounding::stochastic)
          element = round_stochastically<Storage>(moved, rounding_bits(random, i));
        else
          element = round_to_nearest<Storage>(moved);
      }
      groups_[g].store(slot.out, share.group(g));
    }
  }

 private:
  Group<Storage, Tiling::vector> groups_[Tiling::groups];
};

}  // namespace zoext::cuda
