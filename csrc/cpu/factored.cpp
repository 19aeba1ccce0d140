// Combinations and windows of directions given by their factors, on the CPU.
#include "terms.h"
#include "weight_tiles.h"

namespace zoext::cpu {
namespace {

Factors factors_of(const Tensor& left, const Tensor& right) {
  const int64_t rank = left.size(1), rows = left.size(2), columns = right.size(2);
  return {floats_in(left),
          floats_in(right),
          rows,
          columns,
          rank,
          left.size(0) == 1 ? 0 : rank * rows,
          right.size(0) == 1 ? 0 : rank * columns};
}

// Of every matrix of a call.
std::vector<Factors> factors_of(const std::vector<Tensor>& left, const std::vector<Tensor>& right) {
  std::vector<Factors> all;
  for (size_t t = 0; t < left.size(); ++t) all.push_back(factors_of(left[t], right[t]));
  return all;
}

void displace(const std::vector<Tensor>& out, const std::vector<Tensor>& theta,
              const std::vector<Tensor>& residuals, const std::vector<Place>& places,
              const std::vector<Factors>& factors, const std::vector<Combination>& steps) {
  const InstructionSet& set = instruction_set();
  for_each_weight_tile(set, out, theta, residuals, places, tile_elements, [&](auto& weights) {
    using Number = typename std::decay_t<decltype(weights)>::Number;
    const Tile& tile = weights.tile();
    for (const Combination& step : steps) {
      set.arithmetic<Number>().factored.combine(factors[tile.tensor], step.terms.data(),
                                                static_cast<int64_t>(step.terms.size()), tile.local, tile.count,
                                                weights.change() + tile.lead(), weights.take_upcoming());
      weights.move(step.ending);
    }
  });
}

void factored_axpy_(std::vector<Tensor> theta, std::vector<Tensor> residuals, std::vector<Tensor> left,
                    std::vector<Tensor> right, Tensor seeds, Tensor coefficients, Tensor decay,
                    std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t rounding) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Rounding how = checked_rounding(rounding, theta, residuals);
  if (theta.empty()) return;
  const int64_t steps = checked_steps(seeds, coefficients, decay, theta[0]);
  check_factors(theta, left, right, seeds.numel());
  const std::vector<Combination> moving = moving_combinations(seeds, coefficients, decay, steps, how);
  if (!moving.empty()) displace(theta, theta, residuals, places, factors_of(left, right), moving);
}

void factored_copy_(std::vector<Tensor> out, std::vector<Tensor> theta, std::vector<Tensor> left,
                    std::vector<Tensor> right, Tensor seeds, Tensor coefficients, std::vector<int64_t> keys,
                    std::vector<int64_t> spans, int64_t rounding) {
  check_tensors("out", out);
  check_tensors("theta", theta);
  check_copy(out, theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Rounding how = checked_rounding(rounding);
  if (theta.empty()) return;
  check_terms(seeds, coefficients, theta[0], 1);
  check_factors(theta, left, right, seeds.numel());
  displace(out, theta, {}, places, factors_of(left, right), {combination(seeds, coefficients, how)});
}

void factored_window_(std::vector<Tensor> theta, std::vector<Tensor> residuals, std::vector<Tensor> left,
                      std::vector<Tensor> right, Tensor seeds, Tensor coefficients, Tensor first_weights,
                      Tensor second_weights, Tensor lr, Tensor eps, Tensor decay, std::vector<int64_t> keys,
                      std::vector<int64_t> spans, int64_t rounding, int64_t rule) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Rounding how = checked_rounding(rounding, theta, residuals);
  const int rule_number = checked_rule(rule);
  if (theta.empty()) return;
  const int64_t steps = checked_windows(seeds, coefficients, first_weights, second_weights, lr, decay, theta[0]);
  check_factors(theta, left, right, seeds.numel());
  check_scalar("eps", eps, ScalarType::Float, theta[0]);
  const Windows windows(seeds, coefficients, first_weights, second_weights, lr, decay, steps, how);
  if (windows.moving().empty()) return;
  const std::vector<Factors> factors = factors_of(left, right);
  const float eps_value = *floats_in(eps);
  const InstructionSet& set = instruction_set();
  for_each_weight_tile(set, theta, theta, residuals, places, tile_elements, [&](auto& weights) {
    using Number = typename std::decay_t<decltype(weights)>::Number;
    const Tile& tile = weights.tile();
    Number* const change = weights.change() + tile.lead();
    const RuleLoops<Number>& loops = set.arithmetic<Number>().rules[rule_number];
    for (const Window& window : windows.moving()) {
      if (window.steps.empty())
        std::fill_n(change, tile.count, Number{empty_sum});
      else
        loops.move_factored(factors[tile.tensor], window.steps.data(), window.count(),
                            scale_of<Number>(loops.second_moment, window, eps_value), tile.local, tile.count,
                            change, weights.take_upcoming());
      weights.move(window.ending);
    }
  });
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) {
  m.impl("factored_axpy_", TORCH_BOX(&zoext::cpu::factored_axpy_));
  m.impl("factored_copy_", TORCH_BOX(&zoext::cpu::factored_copy_));
  m.impl("factored_window_", TORCH_BOX(&zoext::cpu::factored_window_));
}
