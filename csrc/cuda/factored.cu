// theta + a combination of factored directions on CUDA.
#include "displace.cuh"
#include "factored.cuh"

namespace zoext::cuda {
namespace {

void displace_all(const std::vector<Tensor>& out, const std::vector<Tensor>& theta,
                  const std::vector<Tensor>& left, const std::vector<Tensor>& right,
                  const Combination& combination, const float* decay, const std::vector<Place>& places,
                  Rounding rounding) {
  const torch::stable::accelerator::DeviceGuard guard(theta[0].get_device_index());
  const cudaStream_t stream = current_stream(theta[0]);
  const auto slot = [&](size_t t) { return slot_of(out[t], theta[t], places[t], left[t], right[t]); };
  for_each_storage(out, slot, [&](auto storage, const std::vector<FactoredSlot>& slots) {
    launch_displace<Factored<decltype(storage)>>(slots, combination, decay, rounding, stream);
  });
}

void factored_axpy_(std::vector<Tensor> theta, std::vector<Tensor> left, std::vector<Tensor> right, Tensor seeds,
                    Tensor coefficients, Tensor decay, std::vector<int64_t> keys, std::vector<int64_t> spans,
                    int64_t rounding) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Rounding how = checked_rounding(rounding);
  if (theta.empty()) return;
  check_seeds(seeds, coefficients, theta[0]);
  check_factors(theta, left, right, seeds.numel());
  check_scalar("decay", decay, ScalarType::Float, theta[0]);
  displace_all(theta, theta, left, right, combination_of(seeds, coefficients), floats_in(decay), places, how);
}

void factored_copy_(std::vector<Tensor> out, std::vector<Tensor> theta, std::vector<Tensor> left,
                    std::vector<Tensor> right, Tensor seeds, Tensor coefficients, std::vector<int64_t> keys,
                    std::vector<int64_t> spans, int64_t rounding) {
  check_tensors("out", out);
  check_tensors("theta", theta);
  check_copy(out, theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Rounding how = checked_rounding(rounding);
  if (theta.empty()) return;
  check_seeds(seeds, coefficients, theta[0]);
  check_factors(theta, left, right, seeds.numel());
  displace_all(out, theta, left, right, combination_of(seeds, coefficients), nullptr, places, how);
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) {
  m.impl("factored_axpy_", TORCH_BOX(&zoext::cuda::factored_axpy_));
  m.impl("factored_copy_", TORCH_BOX(&zoext::cuda::factored_copy_));
}
