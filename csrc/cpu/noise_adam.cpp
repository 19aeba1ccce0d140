// The Adam step of a window of dense estimates on the CPU.
#include "direction.h"
#include "displace.h"
#include "terms.h"

namespace zoext::cpu {
namespace {

// The step that a window makes on the tile's aligned stretch: m lies where the change will.
template <class Number>
void write_step(const InstructionSet& set, const DenseDirection& direction, const Window& window, const Tile& tile,
                uint32_t key, Upcoming upcoming, Number* change) {
  const int64_t count = tile.aligned_count();
  std::fill_n(change, count, Number{empty_sum});
  if (window.steps().empty()) return;
  alignas(64) Number v[tile_elements];
  std::fill_n(v, count, Number{0});
  for (const Step& step : window.steps()) {
    direction.add_moments(step, tile, key, upcoming, change, v);
    upcoming = nothing;
  }
  set.arithmetic<Number>().window.step(window.minus_lr(), window.eps(), change, v, count, change);
}

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
             write_step(set, direction, window, tile, places[tile.tensor].key, upcoming, change);
           });
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) { m.impl("noise_adam_", TORCH_BOX(&zoext::cpu::noise_adam_)); }
