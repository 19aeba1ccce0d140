// Dense directions on the CPU: the noise itself, combinations of it, and moves of windows.
#include "../../ops/dense.h"
#include "../loops/window.h"
#include "terms.h"
#include "tiles.h"

namespace zoext::cpu {
namespace {

void displace(const std::vector<Tensor>& out, const std::vector<Tensor>& theta,
              const std::vector<Tensor>& residuals, const std::vector<Place>& places,
              const std::vector<Combination>& steps, Distribution distribution) {
  const InstructionSet& set = instruction_set();
  const DenseDirection direction(set, distribution);
  for_each_weight_tile(set, out, theta, residuals, places, tile_elements, [&](auto& weights) {
    for (const Combination& step : steps) {
      direction.combine(step.terms.data(), static_cast<int64_t>(step.terms.size()), weights.tile(), weights.key(),
                        weights.take_upcoming(), weights.change());
      weights.move(step.ending);
    }
  });
}

void axpy(const ops::Moved& moved, const ops::Steps& steps, Distribution distribution) {
  const std::vector<Combination> moving = moving_combinations(steps, moved.rounding);
  if (!moving.empty()) displace(moved.theta, moved.theta, moved.residuals, moved.places, moving, distribution);
}

void copy(const ops::Copied& copied, const ops::Terms& terms, Distribution distribution) {
  displace(copied.out, copied.theta, {}, copied.places, {combination(terms, copied.rounding)}, distribution);
}

void move_windows(const ops::Moved& moved, const ops::Windows& windows, Distribution distribution) {
  const MovingWindows moving(windows, moved.rounding);
  if (moving.all().empty()) return;
  const float eps = *floats_in(windows.eps);
  const InstructionSet& set = instruction_set();
  const DenseDirection direction(set, distribution);
  const bool is_one = moving.all().size() == 1;
  for_each_weight_tile(set, moved.theta, moved.theta, moved.residuals, moved.places,
                       is_one ? tile_elements : ring_elements, [&](auto& weights) {
                         using Number = typename std::decay_t<decltype(weights)>::Number;
                         const RuleLoops<Number>& rule = set.arithmetic<Number>().rules[windows.rule];
                         if (is_one) {
                           const Window& window = moving.all()[0];
                           write_move(rule, direction, window, eps, weights.tile(), weights.key(),
                                      weights.take_upcoming(), weights.change());
                           weights.move(window.ending);
                           return;
                         }
                         EstimateRing<Number> ring(rule, direction, weights.tile(), weights.key(),
                                                   moving.horizon());
                         for (const Window& window : moving.all()) {
                           ring.write_move(window, eps, weights.take_upcoming(), weights.change());
                           weights.move(window.ending);
                         }
                       });
}

void write(const ops::Noise& noise) {
  const uint64_t seed = static_cast<uint64_t>(*seeds_in(noise.seed));
  const InstructionSet& set = instruction_set();
  for_each_tile(noise.out, noise.places, tile_elements, [&](const Tile& tile) {
    const Field field{seed, noise.places[tile.tensor].key, noise.stream};
    for_storage(noise.out[tile.tensor].scalar_type(), [&](auto storage) {
      using Storage = decltype(storage);
      using Number = typename Arithmetic<Storage>::type;
      alignas(64) Number z[tile_elements];
      const auto& direction = set.arithmetic<Number>();
      const auto start =
          noise.distribution == Distribution::sign ? direction.signs.start : direction.normals.start;
      start(field, Number{1}, tile.aligned_index(), tile.aligned_count(), z, nothing);
      auto* to = static_cast<Storage*>(noise.out[tile.tensor].mutable_data_ptr()) + tile.local;
      set.storage<Storage>().write(to, z + tile.lead(), tile.count);
    });
  });
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) {
  using namespace zoext;
  m.impl("normal_", TORCH_BOX(&ops::normal_<&cpu::write>));
  m.impl("noise_axpy_", TORCH_BOX(&ops::noise_axpy_<&cpu::axpy>));
  m.impl("noise_copy_", TORCH_BOX(&ops::noise_copy_<&cpu::copy>));
  m.impl("noise_window_", TORCH_BOX(&ops::noise_window_<&cpu::move_windows>));
}
