// Matrices and their factors as launches take them.
#pragma once

#include "../../ops/factored.h"
#include "../device/factored.cuh"
#include "launch.h"

namespace zoext::cuda {

inline FactoredSlot slot_of(const Tensor& out, const Tensor& theta, const Place& place, const Tensor& left,
                            const Tensor& right) {
  const int64_t rank = left.size(1), rows = left.size(2), columns = right.size(2);
  return {slot_of(out, theta, place),
          floats_in(left),
          floats_in(right),
          rank,
          rows,
          Divisor(columns),
          left.size(0) == 1 ? 0 : rank * rows,
          right.size(0) == 1 ? 0 : rank * columns};
}

// f(Factored{}, slots) for every storage type among matrices that are moved where they lie.
template <class F>
void for_each_factored(const ops::Moved& moved, const ops::FactorPairs& pairs, F f) {
  const torch::stable::accelerator::DeviceGuard guard(moved.theta[0].get_device_index());
  const auto slot = [&](size_t t) {
    const FactoredSlot matrix =
        slot_of(moved.theta[t], moved.theta[t], moved.places[t], pairs.left[t], pairs.right[t]);
    return in_place(matrix, moved.residuals, t);
  };
  for_each_storage(moved.theta, slot, [&](auto storage, const std::vector<InPlace<FactoredSlot>>& slots) {
    f(Factored<decltype(storage)>{}, slots);
  });
}

}  // namespace zoext::cuda
