// theta + a combination of dense directions, and the noise itself, on CUDA.
#include "dense.h"
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

void axpy(const ops::Moved& moved, const ops::Steps& steps, Distribution distribution) {
  for_each_dense(moved, distribution, [&](auto direction, const std::vector<InPlace<Slot>>& slots) {
    launch_steps<decltype(direction)>(slots, steps_of(steps), moved.rounding, current_stream(moved.theta[0]));
  });
}

void copy(const ops::Copied& copied, const ops::Terms& terms, Distribution distribution) {
  const torch::stable::accelerator::DeviceGuard guard(copied.theta[0].get_device_index());
  const auto slot = [&](size_t t) { return slot_of(copied.out[t], copied.theta[t], copied.places[t]); };
  for_each_storage(copied.out, slot, [&](auto storage, const std::vector<Slot>& slots) {
    for_noise(distribution, [&](auto noise) {
      launch_displace<Dense<decltype(noise), decltype(storage)>>(slots, combination_of(terms), nullptr,
                                                                 copied.rounding, current_stream(copied.theta[0]));
    });
  });
}

void write_noise(const ops::Noise& noise) {
  const torch::stable::accelerator::DeviceGuard guard(noise.out[0].get_device_index());
  const auto slot = [&](size_t t) { return slot_of(noise.out[t], noise.out[t], noise.places[t]); };
  for_each_storage(noise.out, slot, [&](auto storage, const std::vector<Slot>& slots) {
    using Storage = decltype(storage);
    for_noise(noise.distribution, [&](auto kind) {
      using Kind = decltype(kind);
      launch<typename Kind::template Tiling<Storage>, Slot, Room::many>(
          &write<Storage, Kind>, slots, current_stream(noise.out[0]), seeds_in(noise.seed), noise.stream);
    });
  });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) {
  m.impl("normal_", TORCH_BOX(&zoext::ops::normal_<&zoext::cuda::write_noise>));
  m.impl("noise_axpy_", TORCH_BOX(&zoext::ops::noise_axpy_<&zoext::cuda::axpy>));
  m.impl("noise_copy_", TORCH_BOX(&zoext::ops::noise_copy_<&zoext::cuda::copy>));
}
