// theta + a combination of factored directions on CUDA.
#include "factored.cuh"
#include "steps.cuh"

namespace zoext::cuda {
namespace {

void factored_axpy_(std::vector<Tensor> theta, std::vector<Tensor> residuals, std::vector<Tensor> left,
                    std::vector<Tensor> right, Tensor seeds, Tensor coefficients, Tensor decay,
                    std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t rounding) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Rounding how = checked_rounding(rounding, theta, residuals);
  if (theta.empty()) return;
  const Steps steps = checked_steps_of(seeds, coefficients, decay, theta[0]);
  check_factors(theta, left, right, seeds.numel());
  const torch::stable::accelerator::DeviceGuard guard(theta[0].get_device_index());
  const auto slot = [&](size_t t) {
    return in_place(slot_of(theta[t], theta[t], places[t], left[t], right[t]), residuals, t);
  };
  for_each_storage(theta, slot, [&](auto storage, const std::vector<InPlace<FactoredSlot>>& slots) {
    launch_steps<Factored<decltype(storage)>>(slots, steps, how, current_stream(theta[0]));
  });
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
  check_terms(seeds, coefficients, theta[0], 1);
  check_factors(theta, left, right, seeds.numel());
  const Combination combination = combination_of(seeds, coefficients);
  const torch::stable::accelerator::DeviceGuard guard(theta[0].get_device_index());
  const auto slot = [&](size_t t) { return slot_of(out[t], theta[t], places[t], left[t], right[t]); };
  for_each_storage(out, slot, [&](auto storage, const std::vector<FactoredSlot>& slots) {
    launch_displace<Factored<decltype(storage)>>(slots, combination, nullptr, how, current_stream(theta[0]));
  });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) {
  m.impl("factored_axpy_", TORCH_BOX(&zoext::cuda::factored_axpy_));
  m.impl("factored_copy_", TORCH_BOX(&zoext::cuda::factored_copy_));
}
