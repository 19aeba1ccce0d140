// The shares of a thread.
#pragma once

#include <type_traits>

#include "../../core/storage.h"
#include "chunks.h"

namespace zoext::cuda {

// The blocks that a multiprocessor is to hold at once: as many as registers allow without one being spilled
// (tests/cuda/test_static_budget.py).
template <class Direction>
constexpr int resident_blocks(int blocks) {
  constexpr int most_of_doubles = 3;
  const bool is_wide = std::is_same_v<typename Arithmetic<typename Direction::Storage>::type, double>;
  return is_wide && blocks > most_of_doubles ? most_of_doubles : blocks;
}

// The share of a thread in a whole chunk of one of these tensors.
template <class Storage, class Tiling, class TensorSlot>
WholeShare<Storage, Tiling> whole_share_of(const TensorSlot&);
template <class Storage, class Tiling, class TensorSlot>
WholeShareInPlace<Storage, Tiling, TensorSlot> whole_share_of(const InPlace<TensorSlot>&);

// f(slot, share) for every share of the calling thread. The loop of whole shares has no branch but those
// of `f`; it is the one that nearly all blocks run.
template <class Storage, class Tiling, class List, class F>
__device__ void for_each_share(const List& table, F f) {
  const auto& slot = table.slot_of(blockIdx.x);
  using Whole = decltype(whole_share_of<Storage, Tiling>(slot));
  const int64_t first =
      static_cast<int64_t>(blockIdx.x - slot.first_chunk) * Tiling::shares_per_chunk + threadIdx.x;
  if (Whole::is_whole_chunk(slot, first - threadIdx.x)) {
    Whole share(slot, first);
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

}  // namespace zoext::cuda
