// theta + sum_k c_k D_k: the kernels of every axpy_ and copy_.
#pragma once

#include <type_traits>

#include "../device/share.cuh"
#include "../device/weights.cuh"
#include "launch.h"

namespace zoext::cuda {

// Only tensors that are moved where they lie have residuals.
template <class Direction, Rounding rounding>
using SlotFor = std::conditional_t<rounding == Rounding::residual, InPlace<typename Direction::TensorSlot>,
                                   typename Direction::TensorSlot>;

// out = round(theta + (sum_k c_k D_k - decay theta)); no decay if the pointer is null.
template <class Direction, Rounding rounding, Room room>
__global__ void __launch_bounds__(threads_per_chunk, resident_blocks<Direction>(Direction::displace_blocks))
    displace(const __grid_constant__ Table<SlotFor<Direction, rounding>, room> table, Combination combination,
             const float* decay) {
  using Tiling = typename Direction::Tiling;
  using Storage = typename Direction::Storage;
  using Number = typename Arithmetic<Storage>::type;
  const Number decay_value = decay ? __ldg(decay) : 0.0f;
  const auto load = [](const auto& slot, const auto& share) {
    Weights<Storage, Tiling> weights(slot, share);
    if constexpr (rounding == Rounding::residual) weights.load_residuals(slot, share);
    return weights;
  };
  const auto store = [](const Weights<Storage, Tiling>& weights, const auto& slot, const auto& share) {
    weights.store(slot, share);
    if constexpr (rounding == Rounding::residual) weights.store_residuals(slot, share);
  };
  // Rounding bits have the first seed: where its term contributes, both share the keys of their rounds.
  constexpr bool has_words = rounding == Rounding::stochastic;
  const int leading = combination.contributing(0);
  if (has_words ? leading > 0 : leading == combination.terms) {
    for_each_share<Storage, Tiling>(table, [&](const auto& slot, const auto& share) {
      Weights<Storage, Tiling> weights = load(slot, share);
      Sum<Number, Tiling> sum{Number{empty_sum}};
      if constexpr (has_words) combination.add_from(leading, Direction::on(slot, share), sum);
      const uint64_t seed = has_words ? seed_at(combination.seeds, 0) : 0;
      weights.template move<rounding>(sum, decay_value, rounding_words_of<rounding, Tiling>(slot, share, seed));
      store(weights, slot, share);
    });
    return;
  }
  // Apart from the loop over the others: its sum starts from nothing, and its seed is read once.
  const Term first = combination.term(leading);
  for_each_share<Storage, Tiling>(table, [&](const auto& slot, const auto& share) {
    // Read first: weights travel from memory while the noise is computed.
    Weights<Storage, Tiling> weights = load(slot, share);
    const auto direction = Direction::on(slot, share);
    Sum<Number, Tiling> sum{Number{empty_sum}};
    const auto add_all = [&] {
      int k = leading;
      if constexpr (!std::is_same_v<decltype(share), const Share<Tiling>&>) {
        direction.add(first, sum);
        ++k;
      }
      combination.add_from(k, direction, sum);
    };
    if constexpr (Direction::has_rounds) {
      auto random = rounding_words_of<rounding, Tiling>(slot, share, first.seed);
      random.make_here();  // beside its rounds, whose keys it shares
      add_all();
      weights.template move<rounding>(sum, decay_value, random);
    } else {
      add_all();
      weights.template move<rounding>(sum, decay_value,
                                      rounding_words_of<rounding, Tiling>(slot, share, first.seed));
    }
    store(weights, slot, share);
  });
}

inline Combination combination_of(const ops::Terms& terms) {
  return {seeds_in(terms.seeds), floats_in(terms.coefficients), static_cast<int>(terms.seeds.numel())};
}

template <class Direction, Rounding rounding, Room room, class AnySlot>
void launch_rounding(const std::vector<AnySlot>& slots, const Combination& combination, const float* decay,
                     cudaStream_t stream) {
  launch<typename Direction::Tiling, SlotFor<Direction, rounding>, room>(&displace<Direction, rounding, room>,
                                                                         slots, stream, combination, decay);
}

// Streamed probes displace the tensors of one module at a time.
template <class Direction, class AnySlot>
void launch_displace(const std::vector<AnySlot>& slots, const Combination& combination, const float* decay,
                     Rounding rounding, cudaStream_t stream) {
  const bool are_few = slots.size() <= Table<typename Direction::TensorSlot, Room::few>::capacity;
  auto* launch_them = are_few ? &launch_rounding<Direction, Rounding::nearest, Room::few, AnySlot>
                              : &launch_rounding<Direction, Rounding::nearest, Room::many, AnySlot>;
  if constexpr (can_round<typename Direction::Storage>)
    if (rounding == Rounding::stochastic && combination.terms > 0)
      launch_them = are_few ? &launch_rounding<Direction, Rounding::stochastic, Room::few, AnySlot>
                            : &launch_rounding<Direction, Rounding::stochastic, Room::many, AnySlot>;
  launch_them(slots, combination, decay, stream);
}

}  // namespace zoext::cuda
