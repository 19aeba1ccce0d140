// The dense operators on CUDA.
#include "direction.cuh"
#include "group.cuh"
#include "launch.h"

namespace zoext::cuda {
namespace {

__device__ uint64_t seed_at(const int64_t* seeds, int64_t k) {
  return static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(seeds) + k));
}

// Seeds and coefficients stay on the device: no launch waits for the host to know them.
struct Combination {
  const int64_t* seeds;
  const float* coefficients;
  int64_t terms;

  Combination(const Tensor& seeds, const Tensor& coefficients)
      : seeds(static_cast<const int64_t*>(seeds.const_data_ptr())),
        coefficients(static_cast<const float*>(coefficients.const_data_ptr())),
        terms(seeds.numel()) {}

  // sum += sum_k c_k D(s_k)
  template <class Direction, class Number, class Tiling>
  __device__ void add(uint32_t key, uint64_t index, Sum<Number, Tiling>& sum) const {
    for (int64_t k = 0; k < terms; ++k) {
      const float coefficient = __ldg(coefficients + k);
      if (!contributes(coefficient)) continue;
      const Field field{seed_at(seeds, k), key, static_cast<uint32_t>(Direction::stream)};
      Direction::template add<Number>(field, coefficient, index, sum);
    }
  }
};

// f(slot, share) for every share of the calling thread.
template <class Tiling, class F>
__device__ void for_each_share(const Table& table, F f) {
  const Slot& slot = table.slot_of(blockIdx.x);
  const int64_t first =
      static_cast<int64_t>(blockIdx.x - slot.first_chunk) * Tiling::shares_per_chunk + threadIdx.x;
  auto share = share_of<Tiling>(slot, first);
#pragma unroll 1
  for (int i = 0; i < Tiling::shares_per_thread; ++i) {
    if (i > 0) share = slot.is_one_run() ? share.next() : share_of<Tiling>(slot, first + i * threads_per_chunk);
    if (!share.is_empty()) f(slot, share);
  }
}

// out = round(theta + (sum_k c_k D(s_k) - decay theta)); no decay if the pointer is null.
template <class Storage, class Direction, Rounding rounding>
__global__ void __launch_bounds__(threads_per_chunk)
    displace(const __grid_constant__ Table table, Combination combination, const float* decay) {
  using Tiling = typename Direction::template Tiling<Storage>;
  using Number = typename Arithmetic<Storage>::type;
  const Number decay_value = decay ? __ldg(decay) : 0.0f;
  for_each_share<Tiling>(table, [&](const Slot& slot, const Share<Tiling>& share) {
    // Read first: weights travel from memory while the noise is computed.
    Group<Storage, Tiling::vector> groups[Tiling::groups];
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) groups[g].load(slot.theta, share.group(g));
    Sum<Number, Tiling> sum;
    combination.add<Direction>(slot.key, share.index, sum);
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) {
      Words<uint32_t> random{};
      if constexpr (rounding == Rounding::stochastic) {
        const Field field{seed_at(combination.seeds, 0), slot.key, static_cast<uint32_t>(Stream::rounding)};
        random = words_of(field, (share.index + g * Tiling::step) / roundings_per_block);
      }
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i) {
        Storage& element = groups[g].element[i];
        const Number value = widen(element);
        const Number displaced = value + add_decay<Number>(decay_value, value, sum.of[g][i]);
        if constexpr (rounding == Rounding::stochastic)
          element = round_stochastically<Storage>(displaced, rounding_bits(random, i));
        else
          element = round_to_nearest<Storage>(displaced);
      }
      groups[g].store(slot.out, share.group(g));
    }
  });
}

// out = round(D(seed)), drawn from stream `stream`.
template <class Storage, class Direction>
__global__ void __launch_bounds__(threads_per_chunk)
    write(const __grid_constant__ Table table, const int64_t* seed, uint32_t stream) {
  using Tiling = typename Direction::template Tiling<Storage>;
  using Number = typename Arithmetic<Storage>::type;
  const uint64_t seed_value = seed_at(seed, 0);
  for_each_share<Tiling>(table, [&](const Slot& slot, const Share<Tiling>& share) {
    Sum<Number, Tiling> z;
    Direction::template add<Number>({seed_value, slot.key, stream}, Number{1}, share.index, z);
#pragma unroll
    for (int g = 0; g < Tiling::groups; ++g) {
      Group<Storage, Tiling::vector> group;
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i) group.element[i] = round_to_nearest<Storage>(z.of[g][i]);
      group.store(slot.out, share.group(g));
    }
  });
}

template <class F>
void for_direction(Distribution distribution, F f) {
  distribution == Distribution::sign ? f(Signs{}) : f(Normals{});
}

void displace_all(const std::vector<Tensor>& out, const std::vector<Tensor>& theta, const Combination& combination,
                  const float* decay, const std::vector<Place>& places, Distribution distribution,
                  Rounding rounding) {
  const torch::stable::accelerator::DeviceGuard guard(theta[0].get_device_index());
  const cudaStream_t stream = current_stream(theta[0]);
  for_each_storage(out, theta, places, [&](auto storage, const std::vector<Slot>& slots) {
    using Storage = decltype(storage);
    for_direction(distribution, [&](auto direction) {
      using Direction = decltype(direction);
      using Tiling = typename Direction::template Tiling<Storage>;
      auto* kernel = &displace<Storage, Direction, Rounding::nearest>;
      if constexpr (can_round<Storage>)
        if (rounding == Rounding::stochastic && combination.terms > 0)
          kernel = &displace<Storage, Direction, Rounding::stochastic>;
      launch<Tiling>(kernel, slots, stream, combination, decay);
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
  displace_all(theta, theta, Combination(seeds, coefficients), static_cast<const float*>(decay.const_data_ptr()),
               places, checked, how);
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
  displace_all(out, theta, Combination(seeds, coefficients), nullptr, places, checked, how);
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
  for_each_storage(out, out, places, [&](auto storage, const std::vector<Slot>& slots) {
    using Storage = decltype(storage);
    for_direction(checked, [&](auto direction) {
      using Direction = decltype(direction);
      launch<typename Direction::template Tiling<Storage>>(&write<Storage, Direction>, slots, current,
                                                           static_cast<const int64_t*>(seed.const_data_ptr()),
                                                           static_cast<uint32_t>(stream));
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
