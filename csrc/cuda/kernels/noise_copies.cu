// Several copies of weights, displaced along the same dense directions, on CUDA.
#include "../device/copies.cuh"
#include "dense.h"

namespace zoext::cuda {
namespace {

// The sums of two copies on the share of a thread: those of a central difference, or neighbours of a pool. More
// would take registers that hide the latency of memory.
template <class Number, class Tiling>
struct SumsOfCopies {
  static constexpr int at_once = 2;
  Number of[at_once][Tiling::groups][Tiling::vector];

  __device__ SumsOfCopies() {
#pragma unroll
    for (int c = 0; c < at_once; ++c)
#pragma unroll
      for (int g = 0; g < Tiling::groups; ++g)
#pragma unroll
        for (int i = 0; i < Tiling::vector; ++i) of[c][g][i] = empty_sum;
  }

  __device__ void add(int copy, Number coefficient, const Sum<Number, Tiling>& z) {
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g)
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i)
        of[copy][g][i] = add_term<Number>(coefficient, z.of[g][i], of[copy][g][i]);
  }

  __device__ Sum<Number, Tiling> at(int copy) const {
    Sum<Number, Tiling> sum{Number{empty_sum}};
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g)
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i) sum.of[g][i] = of[copy][g][i];
    return sum;
  }
};

// The blocks that a multiprocessor is to hold at once: shares of 64 bytes of sums take the registers of a third.
template <class Direction>
constexpr int blocks_of_copies() {
  using Number = typename Arithmetic<typename Direction::Storage>::type;
  return Direction::Tiling::vector * Direction::Tiling::groups * sizeof(Number) > 32 ? 2 : 3;
}

// out[c] = round(theta + sum_k c_ck z_k). Weights are read once. A direction is drawn once for the copies that are
// made at once, and where it is the only one, once for all copies.
template <class Noise, class Storage, Rounding rounding>
__global__ void __launch_bounds__(threads_per_chunk, blocks_of_copies<Dense<Noise, Storage>>())
    displace_copies(const __grid_constant__ Table<CopiesSlot, Room::few> table, CopiesOfTerms terms) {
  using Direction = Dense<Noise, Storage>;
  using Tiling = typename Direction::Tiling;
  using Number = typename Arithmetic<Storage>::type;
  using Sums = SumsOfCopies<Number, Tiling>;
  const uint64_t rounding_seed = rounding == Rounding::stochastic ? seed_at(terms.seeds, 0) : 0;
  for_each_share<Storage, Tiling>(table, [&](const CopiesSlot& slot, const auto& share) {
    const Weights<Storage, Tiling> theta(slot, share);
    const auto direction = Direction::on(slot, share);
    const auto random = rounding_words_of<rounding, Tiling>(slot, share, rounding_seed);
    Sum<Number, Tiling> z{Number{empty_sum}};
    int drawn = -1;  // which direction z is
#pragma unroll 1
    for (int first = 0; first < terms.copies; first += Sums::at_once) {
      Sums sums;
#pragma unroll 1
      for (int k = 0; k < terms.terms; ++k) {
        if (!terms.contributes_to(first, first + Sums::at_once, k)) continue;
        if (k != drawn) {
          z = Sum<Number, Tiling>{Number{empty_sum}};
          direction.add(Term{1.0f, seed_at(terms.seeds, k), k}, z);
          drawn = k;
        }
#pragma unroll
        for (int c = 0; c < Sums::at_once; ++c) {
          const float coefficient = terms.coefficient(first + c, k);
          if (contributes(coefficient)) sums.add(c, coefficient, z);
        }
      }
#pragma unroll
      for (int c = 0; c < Sums::at_once; ++c) {
        if (first + c >= terms.copies) break;
        Weights<Storage, Tiling> copy = theta;
        Sum<Number, Tiling> sum = sums.at(c);
        copy.template move<rounding>(sum, Number{0}, random);
        store_copy(copy, slot, share, first + c);
      }
    }
  });
}

template <class Noise, class Storage, Rounding rounding>
void launch_copies(const std::vector<CopiesSlot>& slots, const CopiesOfTerms& terms, cudaStream_t stream) {
  launch<typename Dense<Noise, Storage>::Tiling, CopiesSlot, Room::few>(&displace_copies<Noise, Storage, rounding>,
                                                                        slots, stream, terms);
}

// Batched probes make the copies of one module at a time: a table of few tensors is enough.
void copy(const ops::Copies& copies, const ops::TermsOfCopies& terms, Distribution distribution) {
  if (copies.count == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(copies.theta[0].get_device_index());
  const cudaStream_t stream = current_stream(copies.theta[0]);
  const CopiesOfTerms given{seeds_in(terms.seeds), floats_in(terms.coefficients), static_cast<int>(copies.count),
                            static_cast<int>(terms.terms())};
  const auto slot = [&](size_t t) {
    const Tensor& theta = copies.theta[t];
    const Place& place = copies.places[t];
    return CopiesSlot{
        {copies.out[t].mutable_data_ptr(), theta.const_data_ptr(), theta.numel(), place.span, place.key}};
  };
  for_each_storage(copies.theta, slot, [&](auto storage, const std::vector<CopiesSlot>& slots) {
    using Storage = decltype(storage);
    for_noise(distribution, [&](auto noise) {
      using Noise = decltype(noise);
      if constexpr (can_round<Storage>)
        if (copies.rounding == Rounding::stochastic && given.terms > 0)
          return launch_copies<Noise, Storage, Rounding::stochastic>(slots, given, stream);
      launch_copies<Noise, Storage, Rounding::nearest>(slots, given, stream);
    });
  });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) {
  m.impl("noise_copies_", TORCH_BOX(&zoext::ops::noise_copies_<&zoext::cuda::copy>));
}
