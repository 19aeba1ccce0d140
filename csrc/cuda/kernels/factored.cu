// theta + a combination of factored directions on CUDA.
#include "factored.h"
#include "steps.cuh"

namespace zoext::cuda {
namespace {

void axpy(const ops::Moved& moved, const ops::Steps& steps, const ops::FactorPairs& pairs) {
  for_each_factored(moved, pairs, [&](auto direction, const std::vector<InPlace<FactoredSlot>>& slots) {
    launch_steps<decltype(direction)>(slots, steps_of(steps), moved.rounding, current_stream(moved.theta[0]));
  });
}

void copy(const ops::Copied& copied, const ops::Terms& terms, const ops::FactorPairs& pairs) {
  const torch::stable::accelerator::DeviceGuard guard(copied.theta[0].get_device_index());
  const auto slot = [&](size_t t) {
    return slot_of(copied.out[t], copied.theta[t], copied.places[t], pairs.left[t], pairs.right[t]);
  };
  for_each_storage(copied.out, slot, [&](auto storage, const std::vector<FactoredSlot>& slots) {
    launch_displace<Factored<decltype(storage)>>(slots, combination_of(terms), nullptr, copied.rounding,
                                                 current_stream(copied.theta[0]));
  });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) {
  m.impl("factored_axpy_", TORCH_BOX(&zoext::ops::factored_axpy_<&zoext::cuda::axpy>));
  m.impl("factored_copy_", TORCH_BOX(&zoext::ops::factored_copy_<&zoext::cuda::copy>));
}
