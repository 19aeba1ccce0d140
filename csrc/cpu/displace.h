// What all operators but normal_ end in: the change of every tile, joined to theta and rounded.
#pragma once

#include <optional>
#include <vector>

#include "../arguments.h"
#include "displace_tile.h"
#include "tiles.h"

namespace zoext::cpu {

// `displace_tile` for every tile of every tensor, in parallel.
template <class WriteChange>
void displace(const InstructionSet& set, const std::vector<Tensor>& out, const std::vector<Tensor>& theta,
              const std::vector<Place>& places, float decay, std::optional<uint64_t> rounding_seed,
              WriteChange write_change) {
  for_each_tile(theta, places, [&](const Tile& tile) {
    const Tensor &to = out[tile.tensor], &from = theta[tile.tensor];
    for_storage(from.scalar_type(), [&](auto storage) {
      using Storage = decltype(storage);
      displace_tile(set, tile, places[tile.tensor].key, static_cast<Storage*>(to.mutable_data_ptr()) + tile.local,
                    static_cast<const Storage*>(from.const_data_ptr()) + tile.local, decay, rounding_seed,
                    write_change);
    });
  });
}

}  // namespace zoext::cpu
