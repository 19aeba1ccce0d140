// The weights of a share in the registers of a thread: read, moved and rounded, and written.
#pragma once

#include "combination.cuh"
#include "rounding.cuh"

namespace zoext::cuda {

template <class Storage, class Tiling>
class Weights {
  static constexpr int vector = Tiling::vector;
  using Number = typename Arithmetic<Storage>::type;
  using Rounds = Rounder<Storage, vector>;

 public:
  template <class AnyShare>
  __device__ Weights(const Slot& slot, const AnyShare& share) {
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) groups_[g].load(share.theta(slot), share.group(g));
  }

  template <class TensorSlot, class AnyShare>
  __device__ void load_residuals(const InPlace<TensorSlot>& slot, const AnyShare& share) {
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) residuals_[g].load(share.residuals(slot), share.group(g));
  }

  // weights = round(weights + (change - decay weights))
  template <Rounding rounding, class AnyWords>
  __device__ void move(Sum<Number, Tiling>& change, Number decay, const AnyWords& random) {
    const Sum<Number, Tiling> numbers = unrounded<rounding>();
    // Once for all elements: nvcc would make predicates of as many questions.
    if (contributes(static_cast<float>(decay))) subtract_decay<rounding>(numbers, decay, change);
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) {
      Number exact[vector];
#pragma unroll
      for (int i = 0; i < vector; ++i) exact[i] = sum_of<rounding>(numbers.of[g][i], change.of[g][i]);
      if constexpr (rounding == Rounding::stochastic)
        groups_[g] = Rounds::round_stochastically(exact, random.of[g]);
      else if constexpr (rounding == Rounding::residual)
        groups_[g] = Rounds::split(exact, residuals_[g]);
      else
        groups_[g] = Rounds::round_to_nearest(exact);
    }
  }

  template <class AnyShare>
  __device__ void store(const Slot& slot, const AnyShare& share) const {
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) groups_[g].store(share.out(slot), share.group(g));
  }

  template <class TensorSlot, class AnyShare>
  __device__ void store_residuals(const InPlace<TensorSlot>& slot, const AnyShare& share) const {
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) residuals_[g].store(share.residuals(slot), share.group(g));
  }

 private:
  struct Nothing {};

  template <Rounding rounding>
  static constexpr bool has_unit = rounding == Rounding::residual && std::is_same_v<Storage, Half>;

  // In the unit of joined numbers, if they have one: its product is part of the sum with the change.
  template <Rounding rounding>
  __device__ Sum<Number, Tiling> unrounded() const {
    Sum<Number, Tiling> numbers{Number{0}};
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g)
      if constexpr (rounding == Rounding::residual) {
        Rounds::join(groups_[g], residuals_[g], numbers.of[g]);
      } else {
#pragma unroll
        for (int i = 0; i < vector; ++i) numbers.of[g][i] = groups_[g].number(i);
      }
    return numbers;
  }

  template <Rounding rounding>
  static __device__ Number sum_of(Number number, Number change) {
    if constexpr (has_unit<rounding>)
      return fused_multiply_add(number, Pair<Storage>::unit, change);  // the product is exact
    else
      return number + change;
  }

  // change -= decay weights
  template <Rounding rounding>
  static __device__ void subtract_decay(const Sum<Number, Tiling>& numbers, Number decay,
                                        Sum<Number, Tiling>& change) {
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g)
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        Number number = numbers.of[g][i];
        if constexpr (has_unit<rounding>) number = multiply(number, Pair<Storage>::unit);
        change.of[g][i] = subtract_decay_term<Number>(decay, number, change.of[g][i]);
      }
  }

  Group<Storage, vector> groups_[Tiling::groups];
  // In no register unless they are loaded.
  std::conditional_t<can_round<Storage>, Group<int8_t, vector>, Nothing> residuals_[Tiling::groups];
};

}  // namespace zoext::cuda
