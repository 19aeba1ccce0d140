// The operators of directions of matrices given by their factors: as those of ops/dense.h, with D_k = left_k^T
// right_k in the place of z(seeds[k]). Seeds only give the bits of stochastic rounding.
#pragma once

#include "arguments.h"

namespace zoext::ops {

// theta = theta + (sum_k coefficients[k] D_k - decay theta)
inline constexpr const char* factored_axpy_schema =
    "factored_axpy_(Tensor(a!)[] theta, Tensor(b!)[] residuals, Tensor[] left, Tensor[] right, Tensor seeds, "
    "Tensor coefficients, Tensor decay, SymInt[] keys, SymInt[] spans, SymInt rounding) -> ()";

template <void (*kernel)(const Moved&, const Steps&, const FactorPairs&)>
void factored_axpy_(std::vector<Tensor> theta, std::vector<Tensor> residuals, std::vector<Tensor> left,
                    std::vector<Tensor> right, Tensor seeds, Tensor coefficients, Tensor decay,
                    std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t rounding) {
  const Moved moved(std::move(theta), std::move(residuals), keys, spans, rounding);
  if (moved.is_empty()) return;
  const Steps steps(seeds, coefficients, decay, moved.theta[0]);
  kernel(moved, steps, {std::move(left), std::move(right), moved.theta, seeds.numel()});
}

// out = theta + sum_k coefficients[k] D_k
inline constexpr const char* factored_copy_schema =
    "factored_copy_(Tensor(a!)[] out, Tensor[] theta, Tensor[] left, Tensor[] right, Tensor seeds, "
    "Tensor coefficients, SymInt[] keys, SymInt[] spans, SymInt rounding) -> ()";

template <void (*kernel)(const Copied&, const Terms&, const FactorPairs&)>
void factored_copy_(std::vector<Tensor> out, std::vector<Tensor> theta, std::vector<Tensor> left,
                    std::vector<Tensor> right, Tensor seeds, Tensor coefficients, std::vector<int64_t> keys,
                    std::vector<int64_t> spans, int64_t rounding) {
  const Copied copied(std::move(out), std::move(theta), keys, spans, rounding);
  if (copied.is_empty()) return;
  const Terms terms(seeds, coefficients, copied.theta[0]);
  kernel(copied, terms, {std::move(left), std::move(right), copied.theta, seeds.numel()});
}

// theta = theta + (the move of a window - decay theta)
inline constexpr const char* factored_window_schema =
    "factored_window_(Tensor(a!)[] theta, Tensor(b!)[] residuals, Tensor[] left, Tensor[] right, Tensor seeds, "
    "Tensor coefficients, Tensor first_weights, Tensor second_weights, Tensor lr, Tensor eps, Tensor decay, "
    "SymInt[] keys, SymInt[] spans, SymInt rounding, SymInt rule) -> ()";

template <void (*kernel)(const Moved&, const Windows&, const FactorPairs&)>
void factored_window_(std::vector<Tensor> theta, std::vector<Tensor> residuals, std::vector<Tensor> left,
                      std::vector<Tensor> right, Tensor seeds, Tensor coefficients, Tensor first_weights,
                      Tensor second_weights, Tensor lr, Tensor eps, Tensor decay, std::vector<int64_t> keys,
                      std::vector<int64_t> spans, int64_t rounding, int64_t rule) {
  const Moved moved(std::move(theta), std::move(residuals), keys, spans, rounding);
  const int number = checked_rule(rule);
  if (moved.is_empty()) return;
  const Windows windows(seeds, coefficients, first_weights, second_weights, lr, eps, decay, number,
                        moved.theta[0]);
  kernel(moved, windows, {std::move(left), std::move(right), moved.theta, seeds.numel()});
}

}  // namespace zoext::ops
