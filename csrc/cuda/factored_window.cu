// Moves of windows of factored estimates on CUDA.
#include "factored.cuh"
#include "window.cuh"

namespace zoext::cuda {
namespace {

void factored_window_(std::vector<Tensor> theta, std::vector<Tensor> residuals, std::vector<Tensor> left,
                      std::vector<Tensor> right, Tensor seeds, Tensor coefficients, Tensor first_weights,
                      Tensor second_weights, Tensor lr, Tensor eps, Tensor decay, std::vector<int64_t> keys,
                      std::vector<int64_t> spans, int64_t rounding, int64_t rule) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Rounding how = checked_rounding(rounding, theta, residuals);
  const int rule_number = checked_rule(rule);
  if (theta.empty()) return;
  const int64_t count = checked_windows(seeds, coefficients, first_weights, second_weights, lr, decay, theta[0]);
  check_scalar("eps", eps, ScalarType::Float, theta[0]);
  const Windows windows = windows_of(seeds, coefficients, first_weights, second_weights, count);
  const StepSizes sizes{floats_in(lr), floats_in(eps), floats_in(decay)};
  check_factors(theta, left, right, seeds.numel());
  const torch::stable::accelerator::DeviceGuard guard(theta[0].get_device_index());
  const cudaStream_t stream = current_stream(theta[0]);
  const auto slot = [&](size_t t) {
    return in_place(slot_of(theta[t], theta[t], places[t], left[t], right[t]), residuals, t);
  };
  for_each_storage(theta, slot, [&](auto storage, const std::vector<InPlace<FactoredSlot>>& slots) {
    launch_windows<Factored<decltype(storage)>>(slots, windows, sizes, how, rule_number, stream);
  });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) {
  m.impl("factored_window_", TORCH_BOX(&zoext::cuda::factored_window_));
}
