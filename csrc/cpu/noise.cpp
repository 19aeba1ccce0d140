// The dense operators on the CPU.
#include "tiles.h"

namespace zoext::cpu {
namespace {

struct Combination {
  const int64_t* seeds;
  const float* coefficients;
  int64_t terms;
  Distribution distribution;

  Combination(const Tensor& seeds, const Tensor& coefficients, Distribution distribution)
      : seeds(static_cast<const int64_t*>(seeds.const_data_ptr())),
        coefficients(static_cast<const float*>(coefficients.const_data_ptr())),
        terms(seeds.numel()),
        distribution(distribution) {}

  // sum = sum_k c_k D(s_k) on the tile's aligned stretch.
  template <class Number>
  void evaluate(const InstructionSet& set, const Tile& tile, uint32_t key, Upcoming upcoming, Number* sum) const {
    const bool is_sign = distribution == Distribution::sign;
    const auto& loops = is_sign ? set.direction<Number>().signs : set.direction<Number>().normals;
    const auto stream = static_cast<uint32_t>(is_sign ? Stream::sign : Stream::dense);
    const int64_t first = std::find_if(coefficients, coefficients + terms, contributes) - coefficients;
    if (first == terms) std::fill_n(sum, tile.aligned_count(), Number{empty_sum});
    for (int64_t k = first; k < terms; ++k)
      if (contributes(coefficients[k]))
        (k == first ? loops.start : loops.add)({static_cast<uint64_t>(seeds[k]), key, stream}, coefficients[k],
                                               tile.aligned_index(), tile.aligned_count(), sum,
                                               k == first ? upcoming : nothing);
  }
};

// 16 random bits for each element of the tile's aligned stretch.
void fill_rounding_bits(const InstructionSet& set, const Tile& tile, uint64_t seed, uint32_t key,
                        uint32_t* words) {
  const Field field{seed, key, static_cast<uint32_t>(Stream::rounding)};
  set.words(field, tile.aligned_index() / roundings_per_block, tile.aligned_count() / roundings_per_block, words);
}

void displace(const std::vector<Tensor>& out, const std::vector<Tensor>& theta, const Combination& combination,
              float decay, const std::vector<Place>& places, Rounding rounding) {
  const InstructionSet& set = instruction_set();
  if (combination.terms == 0 && !contributes(decay) && &out == &theta) return;
  for_each_tile(theta, places, [&](const Tile& tile) {
    const Tensor &to = out[tile.tensor], &from = theta[tile.tensor];
    const uint32_t key = places[tile.tensor].key;
    for_storage(from.scalar_type(), [&](auto storage) {
      using Storage = decltype(storage);
      using Number = typename Arithmetic<Storage>::type;
      const Storage* const weights = static_cast<const Storage*>(from.const_data_ptr()) + tile.local;
      Storage* const displaced = static_cast<Storage*>(to.mutable_data_ptr()) + tile.local;
      const auto* const next_read = reinterpret_cast<const char*>(weights + tile.count);
      const auto* const next_write = reinterpret_cast<const char*>(displaced + tile.count);
      const Upcoming next_tile{next_read, next_read == next_write ? nullptr : next_write, sizeof(Storage)};
      alignas(64) Number sum[tile_elements];
      alignas(64) uint32_t random[tile_elements / 2];
      combination.evaluate(set, tile, key, next_tile, sum);
      const bool stochastic = can_round<Storage> && rounding == Rounding::stochastic && combination.terms > 0;
      if (stochastic) fill_rounding_bits(set, tile, static_cast<uint64_t>(combination.seeds[0]), key, random);
      set.storage<Storage>().displace(
          displaced, weights, sum + tile.lead(), Number{decay}, tile.count,
          stochastic ? reinterpret_cast<const uint16_t*>(random) + tile.lead() : nullptr);
    });
  });
}

void noise_axpy_(std::vector<Tensor> theta, Tensor seeds, Tensor coefficients, Tensor decay,
                 std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t distribution, int64_t rounding) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Distribution checked = checked_distribution(distribution);
  const Rounding how = checked_rounding(rounding);
  if (theta.empty()) return;
  check_seeds(seeds, coefficients, theta[0]);
  check_scalar("decay", decay, ScalarType::Float, theta[0]);
  displace(theta, theta, Combination(seeds, coefficients, checked),
           *static_cast<const float*>(decay.const_data_ptr()), places, how);
}

void noise_copy_(std::vector<Tensor> out, std::vector<Tensor> theta, Tensor seeds, Tensor coefficients,
                 std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t distribution, int64_t rounding) {
  check_tensors("out", out);
  check_tensors("theta", theta);
  check_copy(out, theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Distribution checked = checked_distribution(distribution);
  const Rounding how = checked_rounding(rounding);
  if (theta.empty()) return;
  check_seeds(seeds, coefficients, theta[0]);
  displace(out, theta, Combination(seeds, coefficients, checked), 0.0f, places, how);
}

void normal_(std::vector<Tensor> out, Tensor seed, std::vector<int64_t> keys, std::vector<int64_t> spans,
             int64_t stream, int64_t distribution) {
  check_tensors("out", out);
  const std::vector<Place> places = checked_places(out, keys, spans);
  const Distribution checked = checked_distribution(distribution);
  STD_TORCH_CHECK(stream >= 0 && stream <= 0xffffffffLL, "stream must be in 0 .. 2^32 - 1, not ", stream);
  if (out.empty()) return;
  check_scalar("seed", seed, ScalarType::Long, out[0]);
  const auto seed_value = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const InstructionSet& set = instruction_set();
  for_each_tile(out, places, [&](const Tile& tile) {
    const Field field{seed_value, places[tile.tensor].key, static_cast<uint32_t>(stream)};
    for_storage(out[tile.tensor].scalar_type(), [&](auto storage) {
      using Storage = decltype(storage);
      using Number = typename Arithmetic<Storage>::type;
      alignas(64) Number z[tile_elements];
      const auto& direction = set.direction<Number>();
      const auto start = checked == Distribution::sign ? direction.signs.start : direction.normals.start;
      start(field, Number{1}, tile.aligned_index(), tile.aligned_count(), z, nothing);
      auto* to = static_cast<Storage*>(out[tile.tensor].mutable_data_ptr()) + tile.local;
      set.storage<Storage>().write(to, z + tile.lead(), tile.count);
    });
  });
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) {
  m.impl("normal_", TORCH_BOX(&zoext::cpu::normal_));
  m.impl("noise_axpy_", TORCH_BOX(&zoext::cpu::noise_axpy_));
  m.impl("noise_copy_", TORCH_BOX(&zoext::cpu::noise_copy_));
}
