// Several copies of the weights of a share, displaced along the same directions.
#pragma once

#include "combination.cuh"
#include "share.cuh"
#include "weights.cuh"

namespace zoext::cuda {

// Seeds [terms] and coefficients [copies, terms].
struct CopiesOfTerms {
  const int64_t* seeds;
  const float* coefficients;
  int copies, terms;

  // Zero for copies that there are not.
  __device__ float coefficient(int copy, int k) const {
    return copy < copies ? __ldg(coefficients + static_cast<int64_t>(copy) * terms + k) : 0.0f;
  }

  // Whether term `k` contributes to one of the copies [begin, end).
  __device__ bool contributes_to(int begin, int end, int k) const {
    for (int c = begin; c < end; ++c)
      if (contributes(coefficient(c, k))) return true;
    return false;
  }
};

// A tensor whose copies lie one after the other at `out`.
struct CopiesSlot : Slot {
  // Whether all copies begin at addresses for 16-byte accesses if the first one does.
  template <class Tiling>
  ZOEXT_HD bool is_regular() const {
    return count % Tiling::vector == 0;
  }
};

// Writes the weights of a share where they belong in copy `copy`.
template <class Storage, class Tiling>
__device__ void store_copy(const Weights<Storage, Tiling>& weights, const CopiesSlot& slot,
                           WholeShare<Storage, Tiling> share, int copy) {
  share.to += copy * slot.count;
  weights.store(slot, share);
}
template <class Storage, class Tiling>
__device__ void store_copy(const Weights<Storage, Tiling>& weights, const CopiesSlot& slot,
                           const Share<Tiling>& share, int copy) {
  Slot shifted = slot;
  shifted.out = static_cast<Storage*>(slot.out) + copy * slot.count;
  weights.store(shifted, share);
}

}  // namespace zoext::cuda
