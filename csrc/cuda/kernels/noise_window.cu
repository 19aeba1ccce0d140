// Moves of windows of dense estimates on CUDA.
#include "dense.h"
#include "window.cuh"

namespace zoext::cuda {
namespace {

void move_noise_windows(const ops::Moved& moved, const ops::Windows& windows, Distribution distribution) {
  for_each_dense(moved, distribution, [&](auto direction, const std::vector<InPlace<Slot>>& slots) {
    launch_windows<decltype(direction)>(slots, windows, moved.rounding, current_stream(moved.theta[0]));
  });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) {
  m.impl("noise_window_", TORCH_BOX(&zoext::ops::noise_window_<&zoext::cuda::move_noise_windows>));
}
