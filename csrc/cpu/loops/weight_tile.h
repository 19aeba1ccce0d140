// A tile of weights, to which every step adds its change before it rounds.
#pragma once

#include <optional>

#include "tile.h"

namespace zoext::cpu {

// What a step does beside its change. Without a seed of rounding bits it rounds to nearest, or, where
// there are residuals, to the nearest float of 24 bits.
struct Ending {
  float decay;
  std::optional<uint64_t> rounding_seed;
};

// Steps follow one another while the tile is in the first-level cache.
template <class Storage>
class WeightTile {
 public:
  using Number = typename Arithmetic<Storage>::type;

  // `theta`, `out` and `residuals` begin with the tile; `out` is theta or apart from it, `residuals` is null
  // where there are none.
  WeightTile(const InstructionSet& set, const Tile& tile, uint32_t key, Storage* out, const Storage* theta,
             int8_t* residuals)
      : set_(set), tile_(tile), key_(key), out_(out), theta_(theta), residuals_(residuals) {
    const auto* const next_read = reinterpret_cast<const char*>(theta + tile.count);
    const auto* const next_write = reinterpret_cast<const char*>(out + tile.count);
    const auto* const next_residuals = reinterpret_cast<const char*>(residuals ? residuals + tile.count : nullptr);
    upcoming_ = {next_read, next_read == next_write ? nullptr : next_write, sizeof(Storage), next_residuals};
  }

  const Tile& tile() const { return tile_; }
  uint32_t key() const { return key_; }

  // The next tile, the first time.
  Upcoming take_upcoming() {
    const Upcoming upcoming = upcoming_;
    upcoming_ = nothing;
    return upcoming;
  }

  // Where a step writes its change from element tile().lead() on; it may write to anything before and to
  // `widest_pack` numbers behind.
  Number* change() { return change_; }

  // theta = round(theta + (change - decay theta))
  void move(const Ending& ending) {
    const auto& loops = set_.storage<Storage>();
    const Number* const change = change_ + tile_.lead();
    if constexpr (can_round<Storage>) {
      if (residuals_) return loops.displace_split(out_, residuals_, change, ending.decay, tile_.count);
      if (ending.rounding_seed) {
        alignas(64) uint16_t random[tile_elements];  // of the tile's aligned stretch
        const Field field{*ending.rounding_seed, key_, static_cast<uint32_t>(Stream::rounding)};
        set_.rounding_bits(field, tile_.aligned_index(), tile_.aligned_count(), random);
        loops.displace_stochastically(out_, theta_, change, ending.decay, tile_.count, random + tile_.lead());
        theta_ = out_;
        return;
      }
    }
    loops.displace(out_, theta_, change, Number{ending.decay}, tile_.count);
    theta_ = out_;
  }

 private:
  const InstructionSet& set_;
  const Tile tile_;
  const uint32_t key_;
  Storage* const out_;
  const Storage* theta_;
  int8_t* const residuals_;
  Upcoming upcoming_;
  alignas(64) Number change_[tile_elements + widest_pack];
};

}  // namespace zoext::cpu
