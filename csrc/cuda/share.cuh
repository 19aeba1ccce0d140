// The shares of a thread: which they are, and the weights of one, read, moved, rounded and written.
#pragma once

#include "chunks.h"
#include "combination.cuh"
#include "group.cuh"
#include "words.cuh"

namespace zoext::cuda {

// The blocks that a multiprocessor is to hold at once: as many as registers allow without one being spilled
// (tests/test_cuda_static_budget.py).
template <class Direction>
constexpr int resident_blocks(int blocks) {
  constexpr int most_of_doubles = 3;
  const bool is_wide = sizeof(typename Direction::Storage) == sizeof(double);
  return is_wide && blocks > most_of_doubles ? most_of_doubles : blocks;
}

// f(slot, share) for every share of the calling thread. The loop of whole shares has no branch but those
// of `f`; it is the one that nearly all blocks run.
template <class Storage, class Tiling, class List, class F>
__device__ void for_each_share(const List& table, F f) {
  const auto& slot = table.slot_of(blockIdx.x);
  const int64_t first =
      static_cast<int64_t>(blockIdx.x - slot.first_chunk) * Tiling::shares_per_chunk + threadIdx.x;
  if (WholeShare<Storage, Tiling>::is_whole_chunk(slot, first - threadIdx.x)) {
    WholeShare<Storage, Tiling> share(slot, first);
#pragma unroll 1
    for (int i = 0; i < Tiling::shares_per_thread; ++i, share.advance()) f(slot, share);
    return;
  }
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
  template <class AnyShare>
  __device__ Weights(const Slot& slot, const AnyShare& share) {
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) groups_[g].load(share.theta(slot), share.group(g));
  }

  // out = round(theta + (change - decay theta)); `seeds` begin with that of the rounding bits.
  template <Rounding rounding, class AnyShare, class Number>
  __device__ void move(const Slot& slot, const AnyShare& share, Sum<Number, Tiling>& change, Number decay,
                       const int64_t* seeds) const {
    // Once for all elements: nvcc would make predicates of as many questions.
    if (contributes(static_cast<float>(decay))) subtract_decay(decay, change);
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) {
      Words<uint32_t> random{};
      if constexpr (rounding == Rounding::stochastic) {
        const Field field{seed_at(seeds, 0), slot.key, static_cast<uint32_t>(Stream::rounding)};
        random = words_of(field, (share.index + g * Tiling::step) / roundings_per_block);
      }
      // Another group than the one read: nvcc would put each half of a word into its place on its own.
      Group<Storage, Tiling::vector> moved;
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i) {
        const Number exact = groups_[g].number(i) + change.of[g][i];
        if constexpr (rounding == Rounding::stochastic)
          moved.element[i] = round_stochastically<Storage>(exact, rounding_bits(random, i));
        else
          moved.element[i] = round_to_nearest<Storage>(exact);
      }
      moved.store(share.out(slot), share.group(g));
    }
  }

 private:
  // change -= decay theta
  template <class Number>
  __device__ void subtract_decay(Number decay, Sum<Number, Tiling>& change) const {
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g)
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i)
        change.of[g][i] = subtract_decay_term<Number>(decay, groups_[g].number(i), change.of[g][i]);
  }

  Group<Storage, Tiling::vector> groups_[Tiling::groups];
};

}  // namespace zoext::cuda
