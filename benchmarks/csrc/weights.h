// The weights that a pass goes over, in the second-level cache or in memory.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"

namespace zoext::benchmarks {

enum class Where { cache, memory };

// What a pass goes over: a quarter of the second-level cache, whole rows of `columns` elements of any dtype.
constexpr int64_t columns = cpu::tile_elements;
int64_t piece_bytes();

// What pieces in memory are taken from: four times the largest cache, which then keeps little of a piece
// until its turn comes again.
int64_t memory_bytes();

// Pieces of `Storage`, all filled with numbers of the size of weights: none zero, none subnormal.
template <class Storage>
class Weights {
 public:
  static int64_t count() { return piece_bytes() / static_cast<int64_t>(sizeof(Storage)); }

  explicit Weights(Where where);

  // In the cache the same piece every time, in memory one after the other.
  Storage* next();

 private:
  const Where where_;
};

}  // namespace zoext::benchmarks
