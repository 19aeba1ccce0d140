// theta + a combination of dense directions, and the noise itself, on CUDA.
#include "dense.cuh"
#include "steps.cuh"

namespace zoext::cuda {
namespace {

// out = round(z(seed)), drawn from stream `stream`.
template <class Storage, class Noise>
__global__ void __launch_bounds__(threads_per_chunk)
    write(const __grid_constant__ Table<Slot, Room::many> table, const int64_t* seed, uint32_t stream) {
  using Tiling = typename Noise::template Tiling<Storage>;
  using Number = typename Arithmetic<Storage>::type;
  const uint64_t seed_value = seed_at(seed, 0);
  for_each_share<Storage, Tiling>(table, [&](const Slot& slot, const auto& share) {
    Sum<Number, Tiling> z{Number{empty_sum}};
    Noise::template add<Number>({seed_value, slot.key, stream}, Number{1}, share.index, z);
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) {
      Group<Storage, Tiling::vector> group;
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i) group.element[i] = round_to_nearest<Storage>(z.of[g][i]);
      group.store(share.out(slot), share.group(g));
    }
  });
}

// f(Dense, slots) for every storage type in a list.
template <class MakeSlot, class F>
void for_each_direction(const std::vector<Tensor>& tensors, Distribution distribution, MakeSlot make_slot, F f) {
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  for_each_storage(tensors, make_slot, [&](auto storage, const auto& slots) {
    for_noise(distribution, [&](auto noise) { f(Dense<decltype(noise), decltype(storage)>{}, slots); });
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
  const Steps steps = checked_steps_of(seeds, coefficients, decay, theta[0]);
  const auto slot = [&](size_t t) { return in_place(slot_of(theta[t], theta[t], places[t]), residuals, t); };
  for_each_direction(theta, checked, slot, [&](auto direction, const std::vector<InPlace<Slot>>& slots) {
    launch_steps<decltype(direction)>(slots, steps, how, current_stream(theta[0]));
  });
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
  const Combination combination = combination_of(seeds, coefficients);
  const auto slot = [&](size_t t) { return slot_of(out[t], theta[t], places[t]); };
  for_each_direction(out, checked, slot, [&](auto direction, const std::vector<Slot>& slots) {
    launch_displace<decltype(direction)>(slots, combination, nullptr, how, current_stream(theta[0]));
  });
}

void normal_(std::vector<Tensor> out, Tensor seed, std::vector<int64_t> keys, std::vector<int64_t> spans,
             int64_t stream, int64_t distribution) {
  check_tensors("out", out);
  const std::vector<Place> places = checked_places(out, keys, spans);
  const Distribution checked = checked_distribution(distribution);
  STD_TORCH_CHECK(stream >= 0 && stream <= 0xffffffffLL, "stream must be in 0 .. 2^32 - 1, not ", stream);
  if (out.empty()) return;
  check_scalar("seed", seed, ScalarType::Long, out[0]);
  const torch::stable::accelerator::DeviceGuard guard(out[0].get_device_index());
  const cudaStream_t current = current_stream(out[0]);
  const auto slot = [&](size_t t) { return slot_of(out[t], out[t], places[t]); };
  for_each_storage(out, slot, [&](auto storage, const std::vector<Slot>& slots) {
    using Storage = decltype(storage);
    for_noise(checked, [&](auto noise) {
      using Noise = decltype(noise);
      launch<typename Noise::template Tiling<Storage>, Slot, Room::many>(
          &write<Storage, Noise>, slots, current, seeds_in(seed), static_cast<uint32_t>(stream));
    });
  });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) {
  m.impl("normal_", TORCH_BOX(&zoext::cuda::normal_));
  m.impl("noise_axpy_", TORCH_BOX(&zoext::cuda::noise_axpy_));
  m.impl("noise_copy_", TORCH_BOX(&zoext::cuda::noise_copy_));
}
