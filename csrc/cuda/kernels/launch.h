// Launches a kernel on a list of tensors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../../ops/arguments.h"
#include "../device/chunks.h"

namespace zoext::cuda {

inline cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline const float* floats_in(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

inline const int64_t* seeds_in(const Tensor& tensor) {
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

// One tensor of a list: `theta` is what is read, `out` what is written; they may be the same.
inline Slot slot_of(const Tensor& out, const Tensor& theta, const Place& place) {
  return {out.mutable_data_ptr(), theta.const_data_ptr(), out.numel(), place.span, place.key};
}

// One tensor of a list that is moved where it lies, and the bytes beside it, or null.
template <class TensorSlot>
InPlace<TensorSlot> in_place(const TensorSlot& slot, const std::vector<Tensor>& residuals, size_t t) {
  return {slot, residuals.empty() ? nullptr : static_cast<int8_t*>(residuals[t].mutable_data_ptr())};
}

// f(Storage{}, slots) for every storage type in the list, with make_slot(t) for each tensor of it that
// is not empty.
template <class MakeSlot, class F>
void for_each_storage(const std::vector<Tensor>& tensors, MakeSlot make_slot, F f) {
  for (ScalarType type : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    std::vector<decltype(make_slot(size_t{0}))> slots;
    for (size_t t = 0; t < tensors.size(); ++t)
      if (tensors[t].scalar_type() == type && tensors[t].numel() > 0) slots.push_back(make_slot(t));
    if (!slots.empty()) for_storage(type, [&](auto storage) { f(storage, slots); });
  }
}

// A kernel with room for `room` tensors a launch.
template <class TensorSlot, Room room, class... Parameters>
using Kernel = void (*)(Table<TensorSlot, room>, Parameters...);

// One launch, or one for every `capacity` tensors of a table.
template <class Tiling, class TensorSlot, Room room, class AnySlot, class... Parameters>
void launch(Kernel<TensorSlot, room, Parameters...> kernel, const std::vector<AnySlot>& slots, cudaStream_t stream,
            Parameters... parameters) {
  using List = Table<TensorSlot, room>;
  static_assert(sizeof(List) + (sizeof(Parameters) + ... + 0) <= 32764, "too many parameters");
  for (size_t first = 0; first < slots.size(); first += List::capacity) {
    List table;
    for (size_t s = first; s < slots.size() && table.count < table.capacity; ++s)
      table.template add<Tiling>(slots[s]);
    kernel<<<table.chunks, threads_per_chunk, 0, stream>>>(table, parameters...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace zoext::cuda
