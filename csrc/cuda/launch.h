// Launches a kernel on a list of tensors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include "../arguments.h"
#include "chunks.h"

namespace zoext::cuda {

inline cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// f(Storage{}, slots) for every storage type in the list. `theta` is what is read, `out` what is
// written; they may be the same.
template <class F>
void for_each_storage(const std::vector<Tensor>& out, const std::vector<Tensor>& theta,
                      const std::vector<Place>& places, F f) {
  for (ScalarType type : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    std::vector<Slot> slots;
    for (size_t t = 0; t < out.size(); ++t)
      if (out[t].scalar_type() == type && out[t].numel() > 0)
        slots.push_back(
            {out[t].mutable_data_ptr(), theta[t].const_data_ptr(), out[t].numel(), places[t].span, places[t].key});
    if (!slots.empty()) for_storage(type, [&](auto storage) { f(storage, slots); });
  }
}

// One launch, or one for every `Table::capacity` tensors.
template <class Tiling, class... Parameters>
void launch(void (*kernel)(Table, Parameters...), const std::vector<Slot>& slots, cudaStream_t stream,
            Parameters... parameters) {
  for (size_t first = 0; first < slots.size(); first += Table::capacity) {
    Table table;
    for (size_t s = first; s < slots.size() && table.count < Table::capacity; ++s) table.add<Tiling>(slots[s]);
    kernel<<<table.chunks, threads_per_chunk, 0, stream>>>(table, parameters...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace zoext::cuda
