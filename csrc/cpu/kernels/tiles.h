// Cuts a list of tensors into tiles and gives them to ATen's threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../../ops/arguments.h"
#include "../loops/weight_tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace zoext::cpu {

// IEEE 754 arithmetic with subnormals, whatever the program has set: flushing them to zero would make the bits
// depend on the instruction set, and would make an empty sum change a subnormal weight.
class IeeeArithmetic {
 public:
#if defined(__x86_64__)
  IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~flush_to_zero); }
  ~IeeeArithmetic() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned flush_to_zero = 0x8040;  // FTZ and DAZ
  const unsigned saved_;
#elif defined(__aarch64__)
  IeeeArithmetic() : saved_(__builtin_aarch64_get_fpcr()) { __builtin_aarch64_set_fpcr(saved_ & ~flush_to_zero); }
  ~IeeeArithmetic() { __builtin_aarch64_set_fpcr(saved_); }

 private:
  static constexpr unsigned flush_to_zero = 1u << 24 | 1u << 19;  // FZ and FZ16
  const unsigned saved_;
#endif
};

// f(tile) for every tile of at most `longest` elements of every tensor, in parallel. Chunks of work do not depend
// on the number of threads, and results do not depend on which thread takes which chunk.
template <class F>
void for_each_tile(const std::vector<Tensor>& tensors, const std::vector<Place>& places, int64_t longest, F f) {
  constexpr int64_t chunk = 16 * tile_elements, chunks_per_thread = 2;
  std::vector<int64_t> first_chunk{0};
  for (const Tensor& tensor : tensors)
    first_chunk.push_back(first_chunk.back() + (tensor.numel() + chunk - 1) / chunk);
  torch::stable::parallel_for(0, first_chunk.back(), chunks_per_thread, [&](int64_t begin, int64_t end) {
    const IeeeArithmetic ieee;
    size_t tensor = std::upper_bound(first_chunk.begin(), first_chunk.end(), begin) - first_chunk.begin() - 1;
    for (int64_t c = begin; c < end; ++c) {
      while (c >= first_chunk[tensor + 1]) ++tensor;
      const int64_t start = (c - first_chunk[tensor]) * chunk;
      for_each_tile(tensor, places[tensor].span, start, std::min(start + chunk, tensors[tensor].numel()), longest,
                    f);
    }
  });
}

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
