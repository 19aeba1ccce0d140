// Steps of Adam with the moments of a window, which live in registers only: the kernels of every adam_.
#pragma once

#include "../core/moments.h"
#include "steps.cuh"

namespace zoext::cuda {

template <class Number, class Tiling>
struct Moments {
  Sum<Number, Tiling> first{Number{empty_sum}}, second{Number{0}};

  __device__ void add(Number first_weight, Number second_weight, const Sum<Number, Tiling>& g) {
#pragma unroll
    for (int j = 0; j < Tiling::groups; ++j)
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i)
        add_moments(first_weight, second_weight, g.of[j][i], first.of[j][i], second.of[j][i]);
  }

  // first = -lr first / sqrt(second + eps)
  __device__ void make_step(Number minus_lr, Number eps) {
#pragma unroll
    for (int j = 0; j < Tiling::groups; ++j)
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i)
        first.of[j][i] = moments_step(minus_lr, eps, first.of[j][i], second.of[j][i]);
  }
};

// The gradient estimates of a few steps: seeds and coefficients [steps, terms], weights [steps].
struct Window {
  const int64_t* seeds;
  const float* coefficients;
  const float* first_weights;
  const float* second_weights;
  int steps, terms;
  int first_number = 0;

  ZOEXT_HD bool is_empty() const { return steps == 0 || terms == 0; }

  // The seeds of the newest step.
  ZOEXT_HD const int64_t* newest() const { return seeds + (steps - 1) * terms; }

  // Adds every step to the moments; whether one contributed.
  template <class Direction, class Number, class Tiling>
  __device__ bool add(const Direction& direction, Moments<Number, Tiling>& moments) const {
    bool any = false;
    for (int h = 0; h < steps; ++h) {
      const Combination step{seeds + h * terms, coefficients + h * terms, terms, first_number + h * terms};
      const int leading = step.contributing(0);
      if (leading == terms) continue;
      Sum<Number, Tiling> g{Number{empty_sum}};
      step.add_from(leading, direction, g);
      moments.add(__ldg(first_weights + h), __ldg(second_weights + h), g);
      any = true;
    }
    return any;
  }
};

// Numbers on the device, for each step but eps.
struct StepSizes {
  const float *lr, *eps, *decay;
};

// out = round(theta + (-lr m / sqrt(v + eps) - decay theta)) with the moments m and v of the window.
template <class Direction, Rounding rounding>
__global__ void __launch_bounds__(threads_per_chunk, resident_blocks<Direction>(Direction::adam_blocks))
    adam(const __grid_constant__ Table<typename Direction::TensorSlot, Room::many> table, Window window,
         StepSizes size) {
  using Tiling = typename Direction::Tiling;
  using Storage = typename Direction::Storage;
  using Number = typename Arithmetic<Storage>::type;
  const float lr = __ldg(size.lr);
  const Number minus_lr = -lr, eps = __ldg(size.eps), decay = __ldg(size.decay);
  for_each_share<Storage, Tiling>(table, [&](const auto& slot, const auto& share) {
    Moments<Number, Tiling> moments;
    const bool moves = contributes(lr) && window.add(Direction::on(slot, share), moments);
    if (moves) moments.make_step(minus_lr, eps);
    // Read last: the moments need the registers, and a window takes longer than memory.
    Weights<Storage, Tiling> weights(slot, share);
    const uint64_t seed = rounding == Rounding::stochastic ? seed_at(window.newest(), 0) : 0;
    weights.template move<rounding>(moments.first, decay, rounding_words_of<rounding, Tiling>(slot, share, seed));
    weights.store(slot, share);
  });
}

// Windows of as many steps each, which begin a row after one another: weights [count, steps].
struct Windows {
  Window first;
  int count;

  ZOEXT_HD Window at(int s) const {
    const int rows = s * first.terms, weights = s * first.steps;
    return {first.seeds + rows,
            first.coefficients + rows,
            first.first_weights + weights,
            first.second_weights + weights,
            first.steps,
            first.terms,
            rows};
  }
};

// The same for each window, one after the other.
template <class Direction>
__global__ void __launch_bounds__(threads_per_chunk, resident_blocks<Direction>(Direction::adam_steps_blocks))
    adam_steps(const __grid_constant__ Table<InPlace<typename Direction::TensorSlot>, Room::many> table,
               Windows windows, StepSizes sizes, Rounding rounding) {
  using Tiling = typename Direction::Tiling;
  using Storage = typename Direction::Storage;
  using Number = typename Arithmetic<Storage>::type;
  const Number eps = __ldg(sizes.eps);
  for_weights<Storage, Tiling>(table, rounding, [&](auto& weights, const auto& slot, const auto& share) {
    const auto direction = Direction::on(slot, share);
#pragma unroll 1
    for (int s = 0; s < windows.count; ++s) {
      const Window window = windows.at(s);
      const float lr = __ldg(sizes.lr + s);
      Moments<Number, Tiling> moments;
      const bool moves = contributes(lr) && window.add(direction, moments);
      if (moves) moments.make_step(-static_cast<Number>(lr), eps);
      for_rounding<Storage>(rounding, [&](auto how) {
        const uint64_t seed = how == Rounding::stochastic ? seed_at(window.newest(), 0) : 0;
        const auto random = rounding_words_of<how, Tiling>(slot, share, seed);
        weights.template move<how>(moments.first, __ldg(sizes.decay + s), random);
      });
    }
  });
}

inline Windows windows_of(const Tensor& seeds, const Tensor& coefficients, const Tensor& first_weights,
                          const Tensor& second_weights, int64_t count) {
  const int steps = static_cast<int>(seeds.size(0) - count + 1), terms = static_cast<int>(seeds.size(1));
  return {{seeds_in(seeds), floats_in(coefficients), floats_in(first_weights), floats_in(second_weights), steps,
           terms},
          static_cast<int>(count)};
}

// Steps with residuals have one kernel, however many there are: their rounding is little beside a window.
template <class Direction>
void launch_adam(const std::vector<InPlace<typename Direction::TensorSlot>>& slots, const Windows& windows,
                 const StepSizes& sizes, Rounding rounding, cudaStream_t stream) {
  using Tiling = typename Direction::Tiling;
  using TensorSlot = typename Direction::TensorSlot;
  constexpr bool is_rounded = can_round<typename Direction::Storage>;
  if (windows.count == 0) return;
  if (rounding == Rounding::stochastic && windows.first.is_empty())
    rounding = Rounding::nearest;  // without a seed
  if (windows.count != 1 || (is_rounded && rounding == Rounding::residual))
    return launch<Tiling, InPlace<TensorSlot>, Room::many>(&adam_steps<Direction>, slots, stream, windows, sizes,
                                                           rounding);
  auto* kernel = &adam<Direction, Rounding::nearest>;
  if constexpr (is_rounded)
    if (rounding == Rounding::stochastic) kernel = &adam<Direction, Rounding::stochastic>;
  launch<Tiling, TensorSlot, Room::many>(kernel, slots, stream, windows.first, sizes);
}

}  // namespace zoext::cuda
