// Tensors with dense directions as launches take them.
#pragma once

#include "../../ops/dense.h"
#include "../device/dense.cuh"
#include "launch.h"

namespace zoext::cuda {

// f(Dense{}, slots) for every storage type among tensors that are moved where they lie.
template <class F>
void for_each_dense(const ops::Moved& moved, Distribution distribution, F f) {
  const torch::stable::accelerator::DeviceGuard guard(moved.theta[0].get_device_index());
  const auto slot = [&](size_t t) {
    return in_place(slot_of(moved.theta[t], moved.theta[t], moved.places[t]), moved.residuals, t);
  };
  for_each_storage(moved.theta, slot, [&](auto storage, const std::vector<InPlace<Slot>>& slots) {
    for_noise(distribution, [&](auto noise) { f(Dense<decltype(noise), decltype(storage)>{}, slots); });
  });
}

}  // namespace zoext::cuda
