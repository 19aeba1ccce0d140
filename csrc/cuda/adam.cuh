// A step of Adam with the moments of a window, which live in registers only: the kernel of every adam_.
#pragma once

#include "../core/moments.h"
#include "launch.h"
#include "share.cuh"

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

  ZOEXT_HD bool is_empty() const { return steps == 0 || terms == 0; }

  // The seeds of the newest step.
  ZOEXT_HD const int64_t* newest() const { return seeds + (steps - 1) * terms; }

  // Adds every step to the moments; whether one contributed.
  template <class Direction, class Number, class Tiling>
  __device__ bool add(const Direction& direction, Moments<Number, Tiling>& moments) const {
    bool any = false;
    for (int h = 0; h < steps; ++h) {
      const Combination step{seeds + h * terms, coefficients + h * terms, terms, h * terms};
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

// Numbers on the device.
struct StepSize {
  const float *lr, *eps, *decay;
};

// out = round(theta + (-lr m / sqrt(v + eps) - decay theta)) with the moments m and v of the window.
template <class Direction, Rounding rounding>
__global__ void __launch_bounds__(threads_per_chunk, resident_blocks<Direction>(Direction::adam_blocks))
    adam(const __grid_constant__ Table<typename Direction::TensorSlot, Room::many> table, Window window,
         StepSize size) {
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
    weights.template move<rounding>(slot, share, moments.first, decay, window.newest());
  });
}

inline Window checked_window(const Tensor& seeds, const Tensor& coefficients, const Tensor& first_weights,
                             const Tensor& second_weights, const Tensor& like) {
  check_window(seeds, coefficients, first_weights, second_weights, like);
  return {seeds_in(seeds),           floats_in(coefficients),         floats_in(first_weights),
          floats_in(second_weights), static_cast<int>(seeds.size(0)), static_cast<int>(seeds.size(1))};
}

inline StepSize checked_step_size(const Tensor& lr, const Tensor& eps, const Tensor& decay, const Tensor& like) {
  check_scalar("lr", lr, ScalarType::Float, like);
  check_scalar("eps", eps, ScalarType::Float, like);
  check_scalar("decay", decay, ScalarType::Float, like);
  return {floats_in(lr), floats_in(eps), floats_in(decay)};
}

template <class Direction>
void launch_adam(const std::vector<typename Direction::TensorSlot>& slots, const Window& window,
                 const StepSize& size, Rounding rounding, cudaStream_t stream) {
  auto* kernel = &adam<Direction, Rounding::nearest>;
  if constexpr (can_round<typename Direction::Storage>)
    if (rounding == Rounding::stochastic && !window.is_empty()) kernel = &adam<Direction, Rounding::stochastic>;
  launch<typename Direction::Tiling, typename Direction::TensorSlot, Room::many>(kernel, slots, stream, window,
                                                                                 size);
}

}  // namespace zoext::cuda
