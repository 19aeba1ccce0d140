// The terms of an operator that contribute, and its steps that move something, as the loops take them.
#pragma once

#include <vector>

#include "../../ops/arguments.h"
#include "../loops/window.h"

namespace zoext::cpu {

inline const int64_t* seeds_in(const Tensor& seeds) { return static_cast<const int64_t*>(seeds.const_data_ptr()); }
inline const float* floats_in(const Tensor& floats) { return static_cast<const float*>(floats.const_data_ptr()); }

// Terms of the given numbers, as far as they contribute.
inline std::vector<Term> contributing(const Tensor& seeds, const Tensor& coefficients, int64_t from, int64_t to) {
  std::vector<Term> terms;
  for (int64_t k = from; k < to; ++k)
    if (contributes(floats_in(coefficients)[k]))
      terms.push_back({k, static_cast<uint64_t>(seeds_in(seeds)[k]), floats_in(coefficients)[k]});
  return terms;
}

// The seed of the bits that round, which is that of term `number`, or nothing where there are no terms.
inline std::optional<uint64_t> rounding_seed(Rounding rounding, const Tensor& seeds, int64_t number) {
  if (rounding != Rounding::stochastic || seeds.numel() == 0) return std::nullopt;
  return static_cast<uint64_t>(seeds_in(seeds)[number]);
}

// A step of a combination of terms.
struct Combination {
  std::vector<Term> terms;
  Ending ending;
};

// The one of a copy.
inline Combination combination(const ops::Terms& terms, Rounding rounding) {
  return {contributing(terms.seeds, terms.coefficients, 0, terms.seeds.numel()),
          {0.0f, rounding_seed(rounding, terms.seeds, 0)}};
}

// The steps that move something, in their order.
inline std::vector<Combination> moving_combinations(const ops::Steps& steps, Rounding rounding) {
  std::vector<Combination> moving;
  for (int64_t s = 0; s < steps.count; ++s) {
    const int64_t first = s * steps.terms();
    Combination step{contributing(steps.seeds, steps.coefficients, first, first + steps.terms()),
                     {floats_in(steps.decay)[s], rounding_seed(rounding, steps.seeds, first)}};
    if (!step.terms.empty() || contributes(step.ending.decay)) moving.push_back(std::move(step));
  }
  return moving;
}

// The windows that move something, in their order.
class MovingWindows {
 public:
  MovingWindows(const ops::Windows& windows, Rounding rounding) : horizon_(windows.horizon()) {
    const int64_t terms = windows.terms();
    for (int64_t row = 0; row < windows.seeds.size(0); ++row)
      terms_.push_back(contributing(windows.seeds, windows.coefficients, row * terms, (row + 1) * terms));
    for (int64_t s = 0; s < windows.count; ++s) {
      Window window{{}, -floats_in(windows.lr)[s], {floats_in(windows.decay)[s], std::nullopt}};
      if (horizon_ > 0)
        window.ending.rounding_seed = rounding_seed(rounding, windows.seeds, (s + horizon_ - 1) * terms);
      if (contributes(window.minus_lr))
        window.steps = contributing_steps(s, floats_in(windows.first_weights) + s * horizon_,
                                          floats_in(windows.second_weights) + s * horizon_);
      if (!window.steps.empty() || contributes(window.ending.decay)) all_.push_back(std::move(window));
    }
  }

  int64_t horizon() const { return horizon_; }
  const std::vector<Window>& all() const { return all_; }

 private:
  std::vector<Step> contributing_steps(int64_t first_row, const float* first_weights,
                                       const float* second_weights) const {
    std::vector<Step> steps;
    for (int64_t h = 0; h < horizon_; ++h) {
      const std::vector<Term>& terms = terms_[static_cast<size_t>(first_row + h)];
      if (!terms.empty())
        steps.push_back({first_row + h, first_weights[h], second_weights[h], terms.data(),
                         static_cast<int64_t>(terms.size())});
    }
    return steps;
  }

  const int64_t horizon_;
  std::vector<std::vector<Term>> terms_;  // of each row
  std::vector<Window> all_;
};

}  // namespace zoext::cpu
