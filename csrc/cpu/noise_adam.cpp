// Adam steps of windows of dense estimates on the CPU.
#include "estimate_ring.h"
#include "noise_step.h"
#include "terms.h"
#include "weight_tiles.h"

namespace zoext::cpu {
namespace {

void take_step(const InstructionSet& set, const std::vector<Tensor>& theta, const std::vector<Tensor>& residuals,
               const std::vector<Place>& places, const DenseDirection& direction, const Window& window,
               float eps) {
  for_each_weight_tile(set, theta, theta, residuals, places, tile_elements, [&](auto& weights) {
    write_step(set, direction, window.steps.data(), static_cast<int64_t>(window.steps.size()), window.minus_lr,
               eps, weights.tile(), weights.key(), weights.take_upcoming(), weights.change());
    weights.move(window.ending);
  });
}

void take_steps(const InstructionSet& set, const std::vector<Tensor>& theta, const std::vector<Tensor>& residuals,
                const std::vector<Place>& places, const DenseDirection& direction, const Windows& windows,
                float eps) {
  for_each_weight_tile(set, theta, theta, residuals, places, ring_elements, [&](auto& weights) {
    using Number = typename std::decay_t<decltype(weights)>::Number;
    EstimateRing<Number> ring(set, direction, weights.tile(), weights.key(), windows.horizon());
    for (const Window& window : windows.moving()) {
      ring.write_step(window.steps.data(), static_cast<int64_t>(window.steps.size()), window.minus_lr, eps,
                      weights.take_upcoming(), weights.change());
      weights.move(window.ending);
    }
  });
}

void noise_adam_(std::vector<Tensor> theta, std::vector<Tensor> residuals, Tensor seeds, Tensor coefficients,
                 Tensor first_weights, Tensor second_weights, Tensor lr, Tensor eps, Tensor decay,
                 std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t distribution, int64_t rounding) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Distribution checked = checked_distribution(distribution);
  const Rounding how = checked_rounding(rounding, theta, residuals);
  if (theta.empty()) return;
  const int64_t steps = checked_windows(seeds, coefficients, first_weights, second_weights, lr, decay, theta[0]);
  check_scalar("eps", eps, ScalarType::Float, theta[0]);
  const Windows windows(seeds, coefficients, first_weights, second_weights, lr, decay, steps, how);
  const InstructionSet& set = instruction_set();
  const DenseDirection direction(set, checked);
  if (windows.moving().size() == 1)
    take_step(set, theta, residuals, places, direction, windows.moving()[0], *floats_in(eps));
  else if (!windows.moving().empty())
    take_steps(set, theta, residuals, places, direction, windows, *floats_in(eps));
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) { m.impl("noise_adam_", TORCH_BOX(&zoext::cpu::noise_adam_)); }
