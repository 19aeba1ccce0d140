// The weights that a pass goes over, in the second-level cache or in memory.
#pragma once

#include <cstdint>

#include "cpu/loops/instruction_set.h"

namespace zoext::benchmarks {

enum class Where { cache, memory };

// What a pass goes over: a quarter of the second-level cache, whole rows of `columns` elements of any dtype.
constexpr int64_t columns = cpu::tile_elements;
int64_t piece_bytes();

// What pieces in memory are taken from: four times the largest cache, which then keeps little of a piece
// until its turn comes again.
int64_t memory_bytes();

// A stretch of weights, and of residuals or null.
template <class Storage>
struct Piece {
  Storage* theta;
  int8_t* residuals;
};

// Pieces of `Storage`, all filled with normals of the size of weights, 0.02: none zero, a few of them subnormal
// in float16.
template <class Storage>
class Weights {
 public:
  static int64_t count() { return piece_bytes() / static_cast<int64_t>(sizeof(Storage)); }
  static int64_t bytes_per_element(Rounding rounding) { return sizeof(Storage) + keeps_residuals(rounding); }

  Weights(Where where, Rounding rounding);

  // In the cache the same piece every time, in memory one after the other.
  Piece<Storage> next();

 private:
  static bool keeps_residuals(Rounding rounding) { return can_round<Storage> && rounding == Rounding::residual; }

  const Where where_;
  const bool has_residuals_;
};

}  // namespace zoext::benchmarks
