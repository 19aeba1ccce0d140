// A device that torch lets one register (PrivateUse1), for tests: its memory is the host's, its operators are the
// CPU's. It counts what a real device would be slow at, and like some of them it refuses float64.
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>

namespace {

using at::Tensor;

constexpr auto device_type = c10::DeviceType::PrivateUse1;

struct Counts {
  int64_t largest_allocation = 0;  // bytes
  int64_t reads_by_host = 0;
  bool has_float64 = false;
};
Counts counts;
thread_local int depth_of_fallbacks = 0;  // the copies of a fallback are none of the program's

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    counts.largest_allocation = std::max(counts.largest_allocation, static_cast<int64_t>(bytes));
    void* const data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, c10::Device(device_type, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;

void check_type(c10::ScalarType type) {
  TORCH_CHECK(counts.has_float64 || type != c10::ScalarType::Double, "this device has no float64");
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  const auto type = dtype.value_or(c10::ScalarType::Float);
  check_type(type);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
}

Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const auto type = dtype.value_or(c10::ScalarType::Float);
  check_type(type);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type, format);
}

// The same memory, as the CPU's.
Tensor on_cpu(const Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  if (to.is_cpu() && depth_of_fallbacks == 0) ++counts.reads_by_host;
  on_cpu(to).copy_(on_cpu(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  to.resize_(self.sizes());
  on_cpu(to).copy_(on_cpu(self));
  return to;
}

c10::Scalar local_scalar_dense(const Tensor& self) {
  if (depth_of_fallbacks == 0) ++counts.reads_by_host;
  return on_cpu(self).item();
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto* const impl = self.unsafeGetTensorImpl();
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const auto bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * self.element_size();
  if (!impl->storage() || impl->storage().nbytes() < bytes) {
    impl->set_storage_keep_dtype(c10::Storage(c10::Storage::use_byte_size_t(), bytes, allocator.allocate(bytes),
                                              &allocator, /*resizable=*/true));
  }
  impl->set_sizes_contiguous(sizes);
  return self;
}

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  ++depth_of_fallbacks;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    --depth_of_fallbacks;
    throw;
  }
  --depth_of_fallbacks;
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(PrivateUse1, NoOpDeviceGuardImpl<DeviceType::PrivateUse1>);
}
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("view.dtype", &at::native::view_dtype);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("resize_", &resize_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }

TORCH_LIBRARY(aliasing_device, m) {
  m.def("begin_counting(bool has_float64) -> ()", [](bool has_float64) { counts = Counts{0, 0, has_float64}; });
  m.def("largest_allocation() -> int", [] { return counts.largest_allocation; });
  m.def("reads_by_host() -> int", [] { return counts.reads_by_host; });
}
