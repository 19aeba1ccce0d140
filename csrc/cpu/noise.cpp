// Combinations of dense directions on the CPU, and the directions themselves.
#include "direction.h"
#include "terms.h"
#include "weight_tiles.h"

namespace zoext::cpu {
namespace {

void displace(const std::vector<Tensor>& out, const std::vector<Tensor>& theta,
              const std::vector<Tensor>& residuals, const std::vector<Place>& places,
              const std::vector<Combination>& steps, Distribution distribution) {
  const InstructionSet& set = instruction_set();
  const DenseDirection direction(set, distribution);
  for_each_weight_tile(set, out, theta, residuals, places, tile_elements, [&](auto& weights) {
    for (const Combination& step : steps) {
      direction.combine(step.terms.data(), static_cast<int64_t>(step.terms.size()), weights.tile(), weights.key(),
                        weights.take_upcoming(), weights.change());
      weights.move(step.ending);
    }
  });
}

void noise_axpy_(std::vector<Tensor> theta, std::vector<Tensor> residuals, Tensor seeds, Tensor coefficients,
                 Tensor decay, std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t distribution,
                 int64_t rounding) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Distribution checked = checked_distribution(distribution);
  const Rounding how = checked_rounding(rounding, theta, residuals);
  if (theta.empty()) return;
  const int64_t steps = checked_steps(seeds, coefficients, decay, theta[0]);
  const std::vector<Combination> moving = moving_combinations(seeds, coefficients, decay, steps, how);
  if (!moving.empty()) displace(theta, theta, residuals, places, moving, checked);
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
  check_terms(seeds, coefficients, theta[0], 1);
  displace(out, theta, {}, places, {combination(seeds, coefficients, how)}, checked);
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
  for_each_tile(out, places, tile_elements, [&](const Tile& tile) {
    const Field field{seed_value, places[tile.tensor].key, static_cast<uint32_t>(stream)};
    for_storage(out[tile.tensor].scalar_type(), [&](auto storage) {
      using Storage = decltype(storage);
      using Number = typename Arithmetic<Storage>::type;
      alignas(64) Number z[tile_elements];
      const auto& direction = set.arithmetic<Number>();
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
