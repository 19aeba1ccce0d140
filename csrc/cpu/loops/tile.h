// A stretch of a tensor that is worked on at a time.
#pragma once

#include <algorithm>
#include <cstddef>

#include "../../core/span.h"
#include "instruction_set.h"

namespace zoext::cpu {

// `count` elements of tensor `tensor` from local position `local` on; their indices are consecutive
// from `index` on.
struct Tile {
  size_t tensor;
  int64_t local;
  uint64_t index;
  int64_t count;

  // The aligned stretch of indices that covers the tile.
  uint64_t aligned_index() const { return index / tile_alignment * tile_alignment; }
  int64_t lead() const { return static_cast<int64_t>(index - aligned_index()); }
  int64_t aligned_count() const { return (lead() + count + tile_alignment - 1) / tile_alignment * tile_alignment; }
};

// Tiles of local elements [begin, end): they end where a run ends and where an aligned tile of `longest`
// elements is full, a multiple of `tile_alignment`.
template <class F>
void for_each_tile(size_t tensor, const Span& span, int64_t begin, int64_t end, int64_t longest, F f) {
  while (begin < end) {
    Tile tile{tensor, begin, span.index(begin), 0};
    const int64_t left_in_run = span.run - begin % span.run;
    tile.count = std::min({end - begin, left_in_run, longest - tile.lead()});
    f(tile);
    begin += tile.count;
  }
}

}  // namespace zoext::cpu
