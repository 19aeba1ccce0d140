// What all operators but normal_ go over: the tiles of their weights.
#pragma once

#include <vector>

#include "../arguments.h"
#include "tiles.h"
#include "weight_tile.h"

namespace zoext::cpu {

// f(weights) with a WeightTile of at most `longest` elements for every stretch of every tensor, in parallel.
// `residuals` has none, or one for each tensor.
template <class F>
void for_each_weight_tile(const InstructionSet& set, const std::vector<Tensor>& out,
                          const std::vector<Tensor>& theta, const std::vector<Tensor>& residuals,
                          const std::vector<Place>& places, int64_t longest, F f) {
  for_each_tile(theta, places, longest, [&](const Tile& tile) {
    const Tensor &to = out[tile.tensor], &from = theta[tile.tensor];
    for_storage(from.scalar_type(), [&](auto storage) {
      using Storage = decltype(storage);
      int8_t* more = nullptr;
      if (can_round<Storage> && !residuals.empty())
        more = static_cast<int8_t*>(residuals[tile.tensor].mutable_data_ptr()) + tile.local;
      WeightTile<Storage> weights(set, tile, places[tile.tensor].key,
                                  static_cast<Storage*>(to.mutable_data_ptr()) + tile.local,
                                  static_cast<const Storage*>(from.const_data_ptr()) + tile.local, more);
      f(weights);
    });
  });
}

}  // namespace zoext::cpu
