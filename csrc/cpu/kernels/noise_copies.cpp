// Several copies of weights, displaced along the same dense directions, on the CPU: each direction is drawn once.
#include <memory>
#include <optional>

#include "../../ops/dense.h"
#include "../loops/direction.h"
#include "terms.h"
#include "tiles.h"

namespace zoext::cpu {
namespace {

constexpr int64_t few_copies = 4;  // whose sums of a longest tile stay in the first-level cache

// A term that contributes to at least one copy: that to copy c has the coefficient c * stride.
struct SharedTerm {
  Term term;
  const float* coefficients;
};

// One call of the operator.
class NoiseCopies {
 public:
  NoiseCopies(const ops::Copies& copies, const ops::TermsOfCopies& terms, Distribution distribution)
      : set_(instruction_set()),
        direction_(set_, distribution),
        copies_(copies.count),
        stride_(terms.terms()),
        rounding_seed_(rounding_seed(copies.rounding, terms.seeds, 0)) {
    const float* const coefficients = floats_in(terms.coefficients);
    for (int64_t k = 0; k < stride_; ++k) {
      bool is_used = false;
      for (int64_t c = 0; c < copies_; ++c) is_used = is_used || contributes(coefficients[c * stride_ + k]);
      if (is_used)
        terms_.push_back({{k, static_cast<uint64_t>(seeds_in(terms.seeds)[k]), 1.0f}, coefficients + k});
    }
  }

  // Sums of more copies are short enough for the second-level cache.
  int64_t longest_tile() const { return copies_ <= few_copies ? tile_elements : tile_alignment; }

  // Copies of a tile: they begin at `out`, `count` elements apart.
  template <class Storage>
  void write(const Tile& tile, uint32_t key, const Storage* theta, Storage* out, int64_t count) const {
    using Number = typename Arithmetic<Storage>::type;
    alignas(64) Number sums_of_few[few_copies * tile_elements];
    std::unique_ptr<Number[]> sums_of_many;
    Number* sums = sums_of_few;
    if (copies_ * tile.aligned_count() > few_copies * tile_elements) {
      sums_of_many.reset(new Number[static_cast<size_t>(copies_ * tile.aligned_count())]);
      sums = sums_of_many.get();
    }
    add_up(tile, key, theta + tile.count, out + tile.count, count, sums);

    alignas(64) uint16_t random[tile_elements];
    const bool is_stochastic = can_round<Storage> && rounding_seed_;
    if (is_stochastic) {
      const Field field{*rounding_seed_, key, static_cast<uint32_t>(Stream::rounding)};
      set_.rounding_bits(field, tile.aligned_index(), tile.aligned_count(), random);
    }
    const auto& loops = set_.storage<Storage>();
    for (int64_t c = 0; c < copies_; ++c, out += count) {
      const Number* const sum = sums + c * tile.aligned_count() + tile.lead();
      if constexpr (can_round<Storage>)
        if (is_stochastic) {
          loops.displace_stochastically(out, theta, sum, 0.0f, tile.count, random + tile.lead());
          continue;
        }
      loops.displace(out, theta, sum, Number{0}, tile.count);
    }
  }

 private:
  // The sums of all copies on the tile's aligned stretch. What the next tile reads and writes is prefetched.
  template <class Storage, class Number>
  void add_up(const Tile& tile, uint32_t key, const Storage* next_theta, Storage* next_out, int64_t count,
              Number* sums) const {
    constexpr int64_t bytes = sizeof(Storage);
    const auto next_copy = [&](int64_t c) {
      return Upcoming{nullptr, reinterpret_cast<const char*>(next_out + c * count), bytes, nullptr};
    };
    const DrawnLoops<Number>& loops = set_.arithmetic<Number>().drawn;
    const int64_t length = tile.aligned_count();
    alignas(64) Number z[tile_elements];
    Upcoming upcoming{reinterpret_cast<const char*>(next_theta), nullptr, bytes, nullptr};
    for (const SharedTerm& shared : terms_) {
      direction_.draw(shared.term, tile, key, upcoming, z);
      for (int64_t c = 0; c < copies_; ++c) {
        const float coefficient = shared.coefficients[c * stride_];
        Number* const sum = sums + c * length;
        if (&shared != &terms_.front()) {
          if (contributes(coefficient)) loops.add(z, coefficient, length, sum, nothing);
        } else if (contributes(coefficient)) {
          loops.start(z, coefficient, length, sum, next_copy(c));
        } else {
          std::fill_n(sum, length, Number{empty_sum});
        }
      }
      upcoming = nothing;
    }
    if (terms_.empty()) std::fill_n(sums, copies_ * length, Number{empty_sum});
  }

  const InstructionSet& set_;
  const DenseDirection direction_;
  const int64_t copies_, stride_;
  const std::optional<uint64_t> rounding_seed_;
  std::vector<SharedTerm> terms_;
};

void copy(const ops::Copies& copies, const ops::TermsOfCopies& terms, Distribution distribution) {
  if (copies.count == 0) return;
  const NoiseCopies writer(copies, terms, distribution);
  for_each_tile(copies.theta, copies.places, writer.longest_tile(), [&](const Tile& tile) {
    const Tensor& theta = copies.theta[tile.tensor];
    for_storage(theta.scalar_type(), [&](auto storage) {
      using Storage = decltype(storage);
      writer.write(tile, copies.places[tile.tensor].key,
                   static_cast<const Storage*>(theta.const_data_ptr()) + tile.local,
                   static_cast<Storage*>(copies.out[tile.tensor].mutable_data_ptr()) + tile.local, theta.numel());
    });
  });
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) {
  m.impl("noise_copies_", TORCH_BOX(&zoext::ops::noise_copies_<&zoext::cpu::copy>));
}
