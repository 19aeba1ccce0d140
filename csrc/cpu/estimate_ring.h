// Adam steps of windows of dense estimates that follow each other, on a tile.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "direction.h"

namespace zoext::cpu {

// Of a tile: the estimates of a window of ten are then 20 KiB, which stay in the first-level cache.
constexpr int64_t ring_elements = 512;

// The estimates of the newest rows. Windows share all rows but one with the next window, and drawing a row
// takes far longer than reading it.
template <class Number>
class EstimateRing {
 public:
  EstimateRing(const InstructionSet& set, const DenseDirection& direction, const Tile& tile, uint32_t key,
               int64_t horizon)
      : set_(set),
        direction_(direction),
        tile_(tile),
        key_(key),
        numbers_(static_cast<size_t>(horizon), -1),
        lines_(new Line[static_cast<size_t>(horizon * lines_per_row())]) {
    estimates_.reserve(static_cast<size_t>(horizon));
  }

  // What `write_step` writes, for windows whose rows never go back.
  void write_step(const Step* steps, int64_t steps_count, float minus_lr, float eps, Upcoming upcoming,
                  Number* change) {
    const int64_t count = tile_.aligned_count();
    if (steps_count == 0) {
      std::fill_n(change, count, Number{empty_sum});
      return;
    }
    estimates_.clear();
    for (const Step* step = steps; step != steps + steps_count; ++step) {
      estimates_.push_back({estimate(*step, upcoming), Number{step->first_weight}, Number{step->second_weight}});
      upcoming = nothing;
    }
    set_.arithmetic<Number>().window.step_of(estimates_.data(), steps_count, Number{minus_lr}, Number{eps}, count,
                                             change);
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

  const InstructionSet& set_;
  const DenseDirection& direction_;
  const Tile& tile_;
  const uint32_t key_;
  std::vector<int64_t> numbers_;  // of the row that lies at each place
  std::vector<Estimate<Number>> estimates_;
  std::unique_ptr<Line[]> lines_;
};

}  // namespace zoext::cpu
