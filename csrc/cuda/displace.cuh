// theta + sum_k c_k D_k: the kernel of every axpy_ and copy_.
#pragma once

#include <type_traits>

#include "launch.h"
#include "share.cuh"

namespace zoext::cuda {

// out = round(theta + (sum_k c_k D_k - decay theta)); no decay if the pointer is null.
template <class Direction, Rounding rounding, Room room>
__global__ void __launch_bounds__(threads_per_chunk, resident_blocks<Direction>(Direction::displace_blocks))
    displace(const __grid_constant__ Table<typename Direction::TensorSlot, room> table, Combination combination,
             const float* decay) {
  using Tiling = typename Direction::Tiling;
  using Storage = typename Direction::Storage;
  using Number = typename Arithmetic<Storage>::type;
  const Number decay_value = decay ? __ldg(decay) : 0.0f;
  const int leading = combination.contributing(0);
  if (leading == combination.terms) {
    for_each_share<Storage, Tiling>(table, [&](const auto& slot, const auto& share) {
      Sum<Number, Tiling> nothing{Number{empty_sum}};
      Weights<Storage, Tiling>(slot, share)
          .template move<rounding>(slot, share, nothing, decay_value, combination.seeds);
    });
    return;
  }
  // Apart from the loop over the others: its sum starts from nothing, and its seed is read once.
  const Term first = combination.term(leading);
  for_each_share<Storage, Tiling>(table, [&](const auto& slot, const auto& share) {
    // Read first: weights travel from memory while the noise is computed.
    const Weights<Storage, Tiling> weights(slot, share);
    const auto direction = Direction::on(slot, share);
    Sum<Number, Tiling> sum{Number{empty_sum}};
    int k = leading;
    if constexpr (std::is_same_v<decltype(share), const WholeShare<Storage, Tiling>&>) {
      direction.add(first, sum);
      ++k;
    }
    combination.add_from(k, direction, sum);
    weights.template move<rounding>(slot, share, sum, decay_value, combination.seeds);
  });
}

inline Combination combination_of(const Tensor& seeds, const Tensor& coefficients) {
  return {seeds_in(seeds), floats_in(coefficients), static_cast<int>(seeds.numel())};
}

template <class Direction, Room room>
void launch_displace_with(const std::vector<typename Direction::TensorSlot>& slots, const Combination& combination,
                          const float* decay, Rounding rounding, cudaStream_t stream) {
  auto* kernel = &displace<Direction, Rounding::nearest, room>;
  if constexpr (can_round<typename Direction::Storage>)
    if (rounding == Rounding::stochastic && combination.terms > 0)
      kernel = &displace<Direction, Rounding::stochastic, room>;
  launch<typename Direction::Tiling, typename Direction::TensorSlot, room>(kernel, slots, stream, combination,
                                                                           decay);
}

// Streamed probes displace the tensors of one module at a time.
template <class Direction>
void launch_displace(const std::vector<typename Direction::TensorSlot>& slots, const Combination& combination,
                     const float* decay, Rounding rounding, cudaStream_t stream) {
  const bool are_few = slots.size() <= Table<typename Direction::TensorSlot, Room::few>::capacity;
  auto* launch_them =
      are_few ? &launch_displace_with<Direction, Room::few> : &launch_displace_with<Direction, Room::many>;
  launch_them(slots, combination, decay, rounding, stream);
}

}  // namespace zoext::cuda
