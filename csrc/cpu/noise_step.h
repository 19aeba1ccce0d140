// The Adam step of a window of dense estimates, on a tile.
#pragma once

#include <algorithm>

#include "direction.h"

namespace zoext::cpu {

// The step that a window makes on the tile's aligned stretch: m lies where the change will.
template <class Number>
void write_step(const InstructionSet& set, const DenseDirection& direction, const Step* steps, int64_t steps_count,
                float minus_lr, float eps, const Tile& tile, uint32_t key, Upcoming upcoming, Number* change) {
  const int64_t count = tile.aligned_count();
  std::fill_n(change, count, Number{empty_sum});
  if (steps_count == 0) return;
  alignas(64) Number v[tile_elements];
  std::fill_n(v, count, Number{0});
  for (const Step* step = steps; step != steps + steps_count; ++step) {
    direction.add_moments(*step, tile, key, upcoming, change, v);
    upcoming = nothing;
  }
  set.arithmetic<Number>().window.step(Number{minus_lr}, Number{eps}, change, v, count, change);
}

}  // namespace zoext::cpu
