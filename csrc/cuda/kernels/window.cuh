// Moves that a rule makes of the moments of a window, which live in registers only: the kernels of every window_.
#pragma once

#include "../../core/rules.h"
#include "steps.cuh"

namespace zoext::cuda {

template <class Rule, class Number, class Tiling>
struct Moments {
  static constexpr bool of_elements = has_moments_of_elements<Rule>;

  Sum<Number, Tiling> first{Number{empty_sum}};
  std::conditional_t<of_elements, Sum<Number, Tiling>, Number> second{Number{0}};

  __device__ void add(Number first_weight, Number second_weight, const Sum<Number, Tiling>& g) {
#pragma unroll
    for (int j = 0; j < Tiling::groups; ++j)
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i) {
        first.of[j][i] = add_first_moment(first_weight, g.of[j][i], first.of[j][i]);
        if constexpr (of_elements) second.of[j][i] = add_second_moment(second_weight, g.of[j][i], second.of[j][i]);
      }
  }

  // The first moments become the moves.
  __device__ void make_moves(Number minus_lr, Number eps) {
#pragma unroll
    for (int j = 0; j < Tiling::groups; ++j)
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i) {
        if constexpr (of_elements)
          first.of[j][i] = Rule::move(minus_lr, eps, first.of[j][i], second.of[j][i]);
        else
          first.of[j][i] = Rule::move(minus_lr, eps, first.of[j][i], second);
      }
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
  template <class Direction, class Rule, class Number, class Tiling>
  __device__ bool add(const Direction& direction, Moments<Rule, Number, Tiling>& moments) const {
    bool any = false;
    for (int h = 0; h < steps; ++h) {
      const Combination step{seeds + h * terms, coefficients + h * terms, terms, first_number + h * terms};
      const int leading = step.contributing(0);
      if (leading == terms) continue;
      any = true;
      if constexpr (Rule::second_moment == SecondMoment::projections)
        moments.second = add_second_moment<Number>(__ldg(second_weights + h),
                                                   step.projected_gradient<Number>(leading), moments.second);
      // A rule that squares no estimate does not need one whose weight is zero.
      if constexpr (!has_moments_of_elements<Rule>)
        if (!contributes(__ldg(first_weights + h))) continue;
      Sum<Number, Tiling> g{Number{empty_sum}};
      step.add_from(leading, direction, g);
      moments.add(__ldg(first_weights + h), __ldg(second_weights + h), g);
    }
    return any;
  }
};

// Numbers on the device, for each step but eps.
struct StepSizes {
  const float *lr, *eps, *decay;
};

// out = round(theta + (move - decay theta)) with the move that the rule makes of the window.
template <class Rule, class Direction, Rounding rounding>
__global__ void __launch_bounds__(threads_per_chunk, resident_blocks<Direction>(Direction::window_blocks))
    move_window(const __grid_constant__ Table<typename Direction::TensorSlot, Room::many> table, Window window,
                StepSizes size) {
  using Tiling = typename Direction::Tiling;
  using Storage = typename Direction::Storage;
  using Number = typename Arithmetic<Storage>::type;
  const float lr = __ldg(size.lr);
  const Number minus_lr = -lr, eps = __ldg(size.eps), decay = __ldg(size.decay);
  for_each_share<Storage, Tiling>(table, [&](const auto& slot, const auto& share) {
    Moments<Rule, Number, Tiling> moments;
    const bool moves = contributes(lr) && window.add(Direction::on(slot, share), moments);
    if (moves) moments.make_moves(minus_lr, eps);
    // Read last: the moments need the registers, and computing a window takes longer than the read.
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
template <class Rule, class Direction>
__global__ void __launch_bounds__(threads_per_chunk, resident_blocks<Direction>(Direction::windows_blocks))
    move_windows(const __grid_constant__ Table<InPlace<typename Direction::TensorSlot>, Room::many> table,
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
      Moments<Rule, Number, Tiling> moments;
      const bool moves = contributes(lr) && window.add(direction, moments);
      if (moves) moments.make_moves(-static_cast<Number>(lr), eps);
      for_rounding<Storage>(rounding, [&](auto how) {
        const uint64_t seed = how == Rounding::stochastic ? seed_at(window.newest(), 0) : 0;
        const auto random = rounding_words_of<how, Tiling>(slot, share, seed);
        weights.template move<how>(moments.first, __ldg(sizes.decay + s), random);
      });
    }
  });
}

inline Windows windows_of(const ops::Windows& windows) {
  return {
      {seeds_in(windows.seeds), floats_in(windows.coefficients), floats_in(windows.first_weights),
       floats_in(windows.second_weights), static_cast<int>(windows.horizon()), static_cast<int>(windows.terms())},
      static_cast<int>(windows.count)};
}

// Steps with residuals share one kernel, however many there are: rounding costs little compared with a window.
template <class Rule, class Direction>
void launch_windows_of(const std::vector<InPlace<typename Direction::TensorSlot>>& slots, const Windows& windows,
                       const StepSizes& sizes, Rounding rounding, cudaStream_t stream) {
  using Tiling = typename Direction::Tiling;
  using TensorSlot = typename Direction::TensorSlot;
  constexpr bool is_rounded = can_round<typename Direction::Storage>;
  if (windows.count == 0) return;
  if (rounding == Rounding::stochastic && windows.first.is_empty())
    rounding = Rounding::nearest;  // without a seed
  if (windows.count != 1 || (is_rounded && rounding == Rounding::residual))
    return launch<Tiling, InPlace<TensorSlot>, Room::many>(&move_windows<Rule, Direction>, slots, stream, windows,
                                                           sizes, rounding);
  auto* kernel = &move_window<Rule, Direction, Rounding::nearest>;
  if constexpr (is_rounded)
    if (rounding == Rounding::stochastic) kernel = &move_window<Rule, Direction, Rounding::stochastic>;
  launch<Tiling, TensorSlot, Room::many>(kernel, slots, stream, windows.first, sizes);
}

// Dispatches the rule to its kernels.
template <class Direction>
void launch_windows(const std::vector<InPlace<typename Direction::TensorSlot>>& slots, const ops::Windows& windows,
                    Rounding rounding, cudaStream_t stream) {
  const StepSizes sizes{floats_in(windows.lr), floats_in(windows.eps), floats_in(windows.decay)};
  Rules::call(windows.rule, [&](auto rule) {
    launch_windows_of<decltype(rule), Direction>(slots, windows_of(windows), sizes, rounding, stream);
  });
}

}  // namespace zoext::cuda
