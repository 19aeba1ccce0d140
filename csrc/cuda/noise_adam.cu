// Adam along dense directions on CUDA.
#include "adam.cuh"
#include "dense.cuh"

namespace zoext::cuda {
namespace {

void noise_adam_(std::vector<Tensor> theta, Tensor seeds, Tensor coefficients, Tensor first_weights,
                 Tensor second_weights, Tensor lr, Tensor eps, Tensor decay, std::vector<int64_t> keys,
                 std::vector<int64_t> spans, int64_t distribution, int64_t rounding) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Distribution checked = checked_distribution(distribution);
  const Rounding how = checked_rounding(rounding);
  if (theta.empty()) return;
  const Window window = checked_window(seeds, coefficients, first_weights, second_weights, theta[0]);
  const StepSize size = checked_step_size(lr, eps, decay, theta[0]);
  const torch::stable::accelerator::DeviceGuard guard(theta[0].get_device_index());
  const cudaStream_t stream = current_stream(theta[0]);
  const auto slot = [&](size_t t) { return slot_of(theta[t], theta[t], places[t]); };
  for_each_storage(theta, slot, [&](auto storage, const std::vector<Slot>& slots) {
    for_noise(checked, [&](auto noise) {
      launch_adam<Dense<decltype(noise), decltype(storage)>>(slots, window, size, how, stream);
    });
  });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) { m.impl("noise_adam_", TORCH_BOX(&zoext::cuda::noise_adam_)); }
