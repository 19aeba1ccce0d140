// The moves that a rule makes of windows of dense estimates, on a tile.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "direction.h"
#include "weight_tile.h"

namespace zoext::cpu {

// A step of a window: its rows that contribute, oldest first, and how they move theta. There are none where
// nothing but the decay moves it.
struct Window {
  std::vector<Step> steps;
  float minus_lr;
  Ending ending;

  int64_t count() const { return static_cast<int64_t>(steps.size()); }
};

template <class Number>
Number projected_gradient(const Step& step) {
  Number sum{0};
  for (const Term* term = step.terms; term != step.terms + step.count; ++term)
    sum = sum + Number{term->coefficient};
  return sum;
}

template <class Number>
Scale<Number> scale_of(SecondMoment second_moment, const Window& window, float eps) {
  Scale<Number> scale{Number{window.minus_lr}, Number{eps}, Number{0}};
  if (second_moment == SecondMoment::projections)
    for (const Step& step : window.steps)
      scale.shared_v =
          add_second_moment(Number{step.second_weight}, projected_gradient<Number>(step), scale.shared_v);
  return scale;
}

// The move of one window on the tile's aligned stretch: m lies where the change will.
template <class Number>
void write_move(const RuleLoops<Number>& rule, const DenseDirection& direction, const Window& window, float eps,
                const Tile& tile, uint32_t key, Upcoming upcoming, Number* change) {
  const int64_t count = tile.aligned_count();
  std::fill_n(change, count, Number{empty_sum});
  if (window.steps.empty()) return;
  alignas(64) Number v[tile_elements];
  if (rule.second_moment == SecondMoment::elements) std::fill_n(v, count, Number{0});
  for (const Step& step : window.steps) {
    if (!enters_moments(rule.second_moment, step)) continue;
    direction.add_to_moments(rule, step, tile, key, upcoming, change, v);
    upcoming = nothing;
  }
  rule.move(scale_of<Number>(rule.second_moment, window, eps), change, v, count, change);
}

// Of a tile: the estimates of a window of ten are then 20 KiB, which stay in the first-level cache.
constexpr int64_t ring_elements = 512;

// The estimates of the newest rows. Windows share all rows but one with the next window, and drawing a row
// takes far longer than reading it.
template <class Number>
class EstimateRing {
 public:
  EstimateRing(const RuleLoops<Number>& rule, const DenseDirection& direction, const Tile& tile, uint32_t key,
               int64_t horizon)
      : rule_(rule),
        direction_(direction),
        tile_(tile),
        key_(key),
        numbers_(static_cast<size_t>(horizon), -1),
        lines_(new Line[static_cast<size_t>(horizon * lines_per_row())]) {
    estimates_.reserve(static_cast<size_t>(horizon));
  }

  // What the function `write_move` writes, for windows whose rows never go back.
  void write_move(const Window& window, float eps, Upcoming upcoming, Number* change) {
    const int64_t count = tile_.aligned_count();
    if (window.steps.empty()) {
      std::fill_n(change, count, Number{empty_sum});
      return;
    }
    estimates_.clear();
    for (const Step& step : window.steps) {
      if (!enters_moments(rule_.second_moment, step)) continue;
      estimates_.push_back({estimate(step, upcoming), Number{step.first_weight}, Number{step.second_weight}});
      upcoming = nothing;
    }
    rule_.move_estimates(estimates_.data(), static_cast<int64_t>(estimates_.size()),
                         scale_of<Number>(rule_.second_moment, window, eps), count, change);
  }

 private:
  struct alignas(64) Line {
    Number numbers[64 / sizeof(Number)];
  };

  int64_t lines_per_row() const { return tile_.aligned_count() * static_cast<int64_t>(sizeof(Number)) / 64; }

  const Number* estimate(const Step& step, Upcoming upcoming) {
    const size_t place = static_cast<size_t>(step.number) % numbers_.size();
    Number* const g = lines_[place * static_cast<size_t>(lines_per_row())].numbers;
    if (numbers_[place] != step.number) direction_.combine(step.terms, step.count, tile_, key_, upcoming, g);
    numbers_[place] = step.number;
    return g;
  }

  const RuleLoops<Number>& rule_;
  const DenseDirection& direction_;
  const Tile& tile_;
  const uint32_t key_;
  std::vector<int64_t> numbers_;  // of the row that lies at each place
  std::vector<Estimate<Number>> estimates_;
  std::unique_ptr<Line[]> lines_;
};

}  // namespace zoext::cpu
