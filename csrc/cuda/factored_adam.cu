// Adam along factored directions on CUDA.
#include "adam.cuh"
#include "factored.cuh"

namespace zoext::cuda {
namespace {

void factored_adam_(std::vector<Tensor> theta, std::vector<Tensor> left, std::vector<Tensor> right, Tensor seeds,
                    Tensor coefficients, Tensor first_weights, Tensor second_weights, Tensor lr, Tensor eps,
                    Tensor decay, std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t rounding) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Rounding how = checked_rounding(rounding);
  if (theta.empty()) return;
  const Window window = checked_window(seeds, coefficients, first_weights, second_weights, theta[0]);
  check_factors(theta, left, right, seeds.numel());
  const StepSize size = checked_step_size(lr, eps, decay, theta[0]);
  const torch::stable::accelerator::DeviceGuard guard(theta[0].get_device_index());
  const cudaStream_t stream = current_stream(theta[0]);
  const auto slot = [&](size_t t) { return slot_of(theta[t], theta[t], places[t], left[t], right[t]); };
  for_each_storage(theta, slot, [&](auto storage, const std::vector<FactoredSlot>& slots) {
    launch_adam<Factored<decltype(storage)>>(slots, window, size, how, stream);
  });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) { m.impl("factored_adam_", TORCH_BOX(&zoext::cuda::factored_adam_)); }
