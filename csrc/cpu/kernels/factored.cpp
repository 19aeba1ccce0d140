// Combinations and windows of directions given by their factors, on the CPU.
#include "../../ops/factored.h"

#include "terms.h"
#include "tiles.h"

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
std::vector<Factors> factors_of(const ops::FactorPairs& pairs) {
  std::vector<Factors> all;
  for (size_t t = 0; t < pairs.left.size(); ++t) all.push_back(factors_of(pairs.left[t], pairs.right[t]));
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

void axpy(const ops::Moved& moved, const ops::Steps& steps, const ops::FactorPairs& pairs) {
  const std::vector<Combination> moving = moving_combinations(steps, moved.rounding);
  if (!moving.empty())
    displace(moved.theta, moved.theta, moved.residuals, moved.places, factors_of(pairs), moving);
}

void copy(const ops::Copied& copied, const ops::Terms& terms, const ops::FactorPairs& pairs) {
  displace(copied.out, copied.theta, {}, copied.places, factors_of(pairs), {combination(terms, copied.rounding)});
}

void move_windows(const ops::Moved& moved, const ops::Windows& windows, const ops::FactorPairs& pairs) {
  const MovingWindows moving(windows, moved.rounding);
  if (moving.all().empty()) return;
  const std::vector<Factors> factors = factors_of(pairs);
  const float eps = *floats_in(windows.eps);
  const InstructionSet& set = instruction_set();
  for_each_weight_tile(set, moved.theta, moved.theta, moved.residuals, moved.places, tile_elements,
                       [&](auto& weights) {
                         using Number = typename std::decay_t<decltype(weights)>::Number;
                         const Tile& tile = weights.tile();
                         Number* const change = weights.change() + tile.lead();
                         const RuleLoops<Number>& rule = set.arithmetic<Number>().rules[windows.rule];
                         for (const Window& window : moving.all()) {
                           if (window.steps.empty())
                             std::fill_n(change, tile.count, Number{empty_sum});
                           else
                             rule.move_factored(factors[tile.tensor], window.steps.data(), window.count(),
                                                scale_of<Number>(rule.second_moment, window, eps), tile.local,
                                                tile.count, change, weights.take_upcoming());
                           weights.move(window.ending);
                         }
                       });
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) {
  using namespace zoext;
  m.impl("factored_axpy_", TORCH_BOX(&ops::factored_axpy_<&cpu::axpy>));
  m.impl("factored_copy_", TORCH_BOX(&ops::factored_copy_<&cpu::copy>));
  m.impl("factored_window_", TORCH_BOX(&ops::factored_window_<&cpu::move_windows>));
}
