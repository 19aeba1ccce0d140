// theta + sum_k c_k D_k: the kernel of every axpy_ and copy_.
#pragma once

#include "launch.h"
#include "share.cuh"

namespace zoext::cuda {

// out = round(theta + (sum_k c_k D_k - decay theta)); no decay if the pointer is null.
template <class Direction, Rounding rounding>
__global__ void __launch_bounds__(threads_per_chunk)
    displace(const __grid_constant__ Table<typename Direction::TensorSlot> table, Combination combination,
             const float* decay) {
  using Tiling = typename Direction::Tiling;
  using Storage = typename Direction::Storage;
  using Number = typename Arithmetic<Storage>::type;
  const Number decay_value = decay ? __ldg(decay) : 0.0f;
  for_each_share<Tiling>(table, [&](const auto& slot, const Share<Tiling>& share) {
    // Read first: weights travel from memory while the noise is computed.
    Weights<Storage, Tiling> weights(slot, share);
    Sum<Number, Tiling> sum{Number{empty_sum}};
    combination.add(Direction(slot, share), sum);
    weights.template move<rounding>(slot, share, sum, decay_value, combination.seeds);
  });
}

inline Combination combination_of(const Tensor& seeds, const Tensor& coefficients) {
  return {seeds_in(seeds), floats_in(coefficients), seeds.numel()};
}

template <class Direction>
void launch_displace(const std::vector<typename Direction::TensorSlot>& slots, const Combination& combination,
                     const float* decay, Rounding rounding, cudaStream_t stream) {
  auto* kernel = &displace<Direction, Rounding::nearest>;
  if constexpr (can_round<typename Direction::Storage>)
    if (rounding == Rounding::stochastic && combination.terms > 0)
      kernel = &displace<Direction, Rounding::stochastic>;
  launch<typename Direction::Tiling>(kernel, slots, stream, combination, decay);
}

}  // namespace zoext::cuda
