// Moves of windows of factored estimates on CUDA.
#include "factored.h"
#include "window.cuh"

namespace zoext::cuda {
namespace {

void move_factored_windows(const ops::Moved& moved, const ops::Windows& windows, const ops::FactorPairs& pairs) {
  for_each_factored(moved, pairs, [&](auto direction, const std::vector<InPlace<FactoredSlot>>& slots) {
    launch_windows<decltype(direction)>(slots, windows, moved.rounding, current_stream(moved.theta[0]));
  });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) {
  m.impl("factored_window_", TORCH_BOX(&zoext::ops::factored_window_<&zoext::cuda::move_factored_windows>));
}
