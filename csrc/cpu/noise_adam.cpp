// The Adam step of a window of dense estimates on the CPU.
#include "displace.h"
#include "noise_step.h"
#include "terms.h"

namespace zoext::cpu {
namespace {

void noise_adam_(std::vector<Tensor> theta, Tensor seeds, Tensor coefficients, Tensor first_weights,
                 Tensor second_weights, Tensor lr, Tensor eps, Tensor decay, std::vector<int64_t> keys,
                 std::vector<int64_t> spans, int64_t distribution, int64_t rounding) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Distribution checked = checked_distribution(distribution);
  const Rounding how = checked_rounding(rounding);
  if (theta.empty()) return;
  check_window(seeds, coefficients, first_weights, second_weights, theta[0]);
  check_scalar("lr", lr, ScalarType::Float, theta[0]);
  check_scalar("eps", eps, ScalarType::Float, theta[0]);
  check_scalar("decay", decay, ScalarType::Float, theta[0]);
  const Window window(seeds, coefficients, first_weights, second_weights, lr, eps);
  if (window.steps().empty() && !contributes(*floats_in(decay))) return;
  const InstructionSet& set = instruction_set();
  const DenseDirection direction(set, checked);
  displace(set, theta, theta, places, *floats_in(decay), newest_rounding_seed(how, seeds),
           [&](const Tile& tile, Upcoming upcoming, auto* change) {
             const std::vector<Step>& steps = window.steps();
             write_step(set, direction, steps.data(), static_cast<int64_t>(steps.size()), window.minus_lr(),
                        window.eps(), tile, places[tile.tensor].key, upcoming, change);
           });
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) { m.impl("noise_adam_", TORCH_BOX(&zoext::cpu::noise_adam_)); }
