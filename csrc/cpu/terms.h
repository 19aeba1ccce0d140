// The terms of an operator that contribute, as the loops take them.
#pragma once

#include <optional>
#include <vector>

#include "../arguments.h"
#include "instruction_set.h"

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

inline std::vector<Term> contributing(const Tensor& seeds, const Tensor& coefficients) {
  return contributing(seeds, coefficients, 0, seeds.numel());
}

// The steps of a window that contribute, oldest first, and how they move theta.
class Window {
 public:
  Window(const Tensor& seeds, const Tensor& coefficients, const Tensor& first_weights,
         const Tensor& second_weights, const Tensor& lr, const Tensor& eps)
      : minus_lr_(-*floats_in(lr)), eps_(*floats_in(eps)) {
    if (!contributes(minus_lr_)) return;
    const int64_t terms = seeds.size(1);
    for (int64_t h = 0; h < seeds.size(0); ++h) {
      terms_.push_back(contributing(seeds, coefficients, h * terms, (h + 1) * terms));
      if (terms_.back().empty()) continue;
      steps_.push_back({floats_in(first_weights)[h], floats_in(second_weights)[h], terms_.back().data(),
                        static_cast<int64_t>(terms_.back().size())});
    }
  }

  const std::vector<Step>& steps() const { return steps_; }
  float minus_lr() const { return minus_lr_; }
  float eps() const { return eps_; }

 private:
  float minus_lr_, eps_;
  std::vector<std::vector<Term>> terms_;
  std::vector<Step> steps_;
};

// The seed of the bits that round, or nothing where results are rounded to nearest.
inline std::optional<uint64_t> rounding_seed(Rounding rounding, const Tensor& seeds, int64_t number) {
  if (rounding == Rounding::nearest || seeds.numel() == 0) return std::nullopt;
  return static_cast<uint64_t>(seeds_in(seeds)[number]);
}

// The newest step's first seed.
inline std::optional<uint64_t> newest_rounding_seed(Rounding rounding, const Tensor& seeds) {
  return rounding_seed(rounding, seeds, seeds.numel() - seeds.size(1));
}

}  // namespace zoext::cpu
