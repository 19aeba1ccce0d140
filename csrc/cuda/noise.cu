// theta + a combination of dense directions, and the noise itself, on CUDA.
#include "dense.cuh"
#include "displace.cuh"

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

void displace_all(const std::vector<Tensor>& out, const std::vector<Tensor>& theta, const Combination& combination,
                  const float* decay, const std::vector<Place>& places, Distribution distribution,
                  Rounding rounding) {
  const torch::stable::accelerator::DeviceGuard guard(theta[0].get_device_index());
  const cudaStream_t stream = current_stream(theta[0]);
  const auto slot = [&](size_t t) { return slot_of(out[t], theta[t], places[t]); };
  for_each_storage(out, slot, [&](auto storage, const std::vector<Slot>& slots) {
    for_noise(distribution, [&](auto noise) {
      launch_displace<Dense<decltype(noise), decltype(storage)>>(slots, combination, decay, rounding, stream);
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
  displace_all(theta, theta, combination_of(seeds, coefficients), floats_in(decay), places, checked, how);
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
  displace_all(out, theta, combination_of(seeds, coefficients), nullptr, places, checked, how);
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
