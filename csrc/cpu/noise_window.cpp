// Moves of windows of dense estimates on the CPU.
#include "terms.h"
#include "weight_tiles.h"
#include "window.h"

namespace zoext::cpu {
namespace {

void noise_window_(std::vector<Tensor> theta, std::vector<Tensor> residuals, Tensor seeds, Tensor coefficients,
                   Tensor first_weights, Tensor second_weights, Tensor lr, Tensor eps, Tensor decay,
                   std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t distribution, int64_t rounding,
                   int64_t rule) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Distribution checked = checked_distribution(distribution);
  const Rounding how = checked_rounding(rounding, theta, residuals);
  const int rule_number = checked_rule(rule);
  if (theta.empty()) return;
  const int64_t steps = checked_windows(seeds, coefficients, first_weights, second_weights, lr, decay, theta[0]);
  check_scalar("eps", eps, ScalarType::Float, theta[0]);
  const Windows windows(seeds, coefficients, first_weights, second_weights, lr, decay, steps, how);
  if (windows.moving().empty()) return;
  const float eps_value = *floats_in(eps);
  const InstructionSet& set = instruction_set();
  const DenseDirection direction(set, checked);
  const bool is_one = windows.moving().size() == 1;
  for_each_weight_tile(
      set, theta, theta, residuals, places, is_one ? tile_elements : ring_elements, [&](auto& weights) {
        using Number = typename std::decay_t<decltype(weights)>::Number;
        const RuleLoops<Number>& loops = set.arithmetic<Number>().rules[rule_number];
        if (is_one) {
          const Window& window = windows.moving()[0];
          write_move(loops, direction, window, eps_value, weights.tile(), weights.key(), weights.take_upcoming(),
                     weights.change());
          weights.move(window.ending);
          return;
        }
        EstimateRing<Number> ring(loops, direction, weights.tile(), weights.key(), windows.horizon());
        for (const Window& window : windows.moving()) {
          ring.write_move(window, eps_value, weights.take_upcoming(), weights.change());
          weights.move(window.ending);
        }
      });
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) { m.impl("noise_window_", TORCH_BOX(&zoext::cpu::noise_window_)); }
