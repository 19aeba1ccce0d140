// Several steps one after the other, with weights read and written once.
#pragma once

#include "displace.cuh"

namespace zoext::cuda {

// f(rounding) with the rounding of a launch as a constant. Loops over steps have one kernel for all roundings.
template <class Storage, class F>
__device__ void for_rounding(Rounding rounding, F f) {
  const int number = static_cast<int>(rounding);  // 64 bits take twice the comparisons
  if constexpr (can_round<Storage>) {
    if (number == static_cast<int>(Rounding::residual))
      return f(std::integral_constant<Rounding, Rounding::residual>{});
    if (number == static_cast<int>(Rounding::stochastic))
      return f(std::integral_constant<Rounding, Rounding::stochastic>{});
  }
  f(std::integral_constant<Rounding, Rounding::nearest>{});
}

// f(weights, slot, share) between reading and writing the weights of each share.
template <class Storage, class Tiling, class List, class F>
__device__ void for_weights(const List& table, Rounding rounding, F f) {
  for_each_share<Storage, Tiling>(table, [&](const auto& slot, const auto& share) {
    Weights<Storage, Tiling> weights(slot, share);
    if constexpr (can_round<Storage>)
      if (rounding == Rounding::residual) weights.load_residuals(slot, share);
    f(weights, slot, share);
    weights.store(slot, share);
    if constexpr (can_round<Storage>)
      if (rounding == Rounding::residual) weights.store_residuals(slot, share);
  });
}

// Seeds and coefficients [steps, terms], decay [steps].
struct Steps {
  const int64_t* seeds;
  const float* coefficients;
  const float* decay;
  int steps, terms;

  ZOEXT_HD Combination at(int s) const { return {seeds + s * terms, coefficients + s * terms, terms, s * terms}; }
};

// theta = round(theta + (sum_k c_k D_k - decay theta)) for each step.
template <class Direction>
__global__ void __launch_bounds__(threads_per_chunk, resident_blocks<Direction>(Direction::steps_blocks))
    displace_steps(const __grid_constant__ Table<InPlace<typename Direction::TensorSlot>, Room::many> table,
                   Steps steps, Rounding rounding) {
  using Tiling = typename Direction::Tiling;
  using Storage = typename Direction::Storage;
  using Number = typename Arithmetic<Storage>::type;
  for_weights<Storage, Tiling>(table, rounding, [&](auto& weights, const auto& slot, const auto& share) {
    const auto direction = Direction::on(slot, share);
#pragma unroll 1
    for (int s = 0; s < steps.steps; ++s) {
      const Combination step = steps.at(s);
      Sum<Number, Tiling> sum{Number{empty_sum}};
      // As in `displace`, the first term has no sum to join.
      const int leading = step.contributing(0);
      if (leading < step.terms) {
        direction.add(step.term(leading), sum);
        step.add_from(leading + 1, direction, sum);
      }
      for_rounding<Storage>(rounding, [&](auto how) {
        const uint64_t seed = how == Rounding::stochastic ? seed_at(step.seeds, 0) : 0;
        const auto random = rounding_words_of<how, Tiling>(slot, share, seed);
        weights.template move<how>(sum, __ldg(steps.decay + s), random);
      });
    }
  });
}

// Moves tensors where they lie.
template <class Direction>
void launch_steps(const std::vector<InPlace<typename Direction::TensorSlot>>& slots, const Steps& steps,
                  Rounding rounding, cudaStream_t stream) {
  using Storage = typename Direction::Storage;
  if (steps.steps == 0) return;
  if (rounding == Rounding::stochastic && steps.terms == 0) rounding = Rounding::nearest;  // without a seed
  if (steps.steps != 1)
    return launch<typename Direction::Tiling, InPlace<typename Direction::TensorSlot>, Room::many>(
        &displace_steps<Direction>, slots, stream, steps, rounding);
  if constexpr (can_round<Storage>)
    if (rounding == Rounding::residual)
      return launch_rounding<Direction, Rounding::residual, Room::many>(slots, steps.at(0), steps.decay, stream);
  launch_displace<Direction>(slots, steps.at(0), steps.decay, rounding, stream);
}

inline Steps steps_of(const ops::Steps& steps) {
  return {seeds_in(steps.seeds), floats_in(steps.coefficients), floats_in(steps.decay),
          static_cast<int>(steps.count), static_cast<int>(steps.terms())};
}

}  // namespace zoext::cuda
