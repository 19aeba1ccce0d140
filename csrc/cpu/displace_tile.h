// What all operators but normal_ do with a tile: its change, joined to theta and rounded.
#pragma once

#include <optional>

#include "tile.h"

namespace zoext::cpu {

// 16 random bits for each element of the tile's aligned stretch.
inline void fill_rounding_bits(const InstructionSet& set, const Tile& tile, uint64_t seed, uint32_t key,
                               uint32_t* words) {
  const Field field{seed, key, static_cast<uint32_t>(Stream::rounding)};
  set.words(field, tile.aligned_index() / roundings_per_block, tile.aligned_count() / roundings_per_block, words);
}

// out = round(theta + (change - decay theta)) for the elements of a tile, with the bits of
// `rounding_seed` if there is one. `write_change(tile, upcoming, change)` writes the tile's change from
// change[tile.lead()] on; it may write to anything before and to `widest_pack` numbers behind.
template <class Storage, class WriteChange>
void displace_tile(const InstructionSet& set, const Tile& tile, uint32_t key, Storage* out, const Storage* theta,
                   float decay, std::optional<uint64_t> rounding_seed, WriteChange write_change) {
  using Number = typename Arithmetic<Storage>::type;
  const auto* const next_read = reinterpret_cast<const char*>(theta + tile.count);
  const auto* const next_write = reinterpret_cast<const char*>(out + tile.count);
  const Upcoming next_tile{next_read, next_read == next_write ? nullptr : next_write, sizeof(Storage)};
  alignas(64) Number change[tile_elements + widest_pack];
  alignas(64) uint32_t random[tile_elements / 2];
  write_change(tile, next_tile, change);
  const bool stochastic = can_round<Storage> && rounding_seed;
  if (stochastic) fill_rounding_bits(set, tile, *rounding_seed, key, random);
  set.storage<Storage>().displace(out, theta, change + tile.lead(), Number{decay}, tile.count,
                                  stochastic ? reinterpret_cast<const uint16_t*>(random) + tile.lead() : nullptr);
}

}  // namespace zoext::cpu
