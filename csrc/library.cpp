// Every operator's schema, and nothing else.
//
// All tensors of a call are on one device. `theta` and `out` are lists of contiguous tensors; for the
// tensor number t, `keys[t]` is the key of its parameter and `spans[3 t .. 3 t + 2]` is (base, run,
// stride), its place in the unsharded parameter. `seeds` is int64 [K], `coefficients` float32 [K].
// Seeds and coefficients are tensors and the rest SymInt, so that a compiled step is not compiled
// again when they change and no step waits for the host.
//
// distribution: 0 standard normals, 1 signs. rounding: 0 to nearest, 1 stochastic.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(zoext, m) {
  // out = z(seed), one number an element, drawn from stream `stream`.
  m.def(
      "normal_(Tensor(a!)[] out, Tensor seed, SymInt[] keys, SymInt[] spans, SymInt stream, "
      "SymInt distribution) -> ()");
  // theta = theta + (sum_k coefficients[k] z(seeds[k]) - decay theta); decay is float32 [].
  m.def(
      "noise_axpy_(Tensor(a!)[] theta, Tensor seeds, Tensor coefficients, Tensor decay, SymInt[] keys, "
      "SymInt[] spans, SymInt distribution, SymInt rounding) -> ()");
  // out = theta + sum_k coefficients[k] z(seeds[k]).
  m.def(
      "noise_copy_(Tensor(a!)[] out, Tensor[] theta, Tensor seeds, Tensor coefficients, SymInt[] keys, "
      "SymInt[] spans, SymInt distribution, SymInt rounding) -> ()");
}
