// Every operator's schema, and nothing else.
//
// All tensors of a call are on one device. `theta` and `out` are lists of contiguous tensors; for the
// tensor number t, `keys[t]` is the key of its parameter and `spans[3 t .. 3 t + 2]` is (base, run,
// stride), its place in the unsharded parameter. `seeds` is int64 [K], `coefficients` float32 [K].
// Seeds and coefficients are tensors and the rest SymInt, so that a compiled step is not compiled
// again when they change and no step waits for the host.
//
// distribution: 0 standard normals, 1 signs. rounding: 0 to nearest, 1 stochastic, 2 with residuals: then
// `residuals[t]` is int8 and as large as theta[t], or empty where that is float32 or float64; else there are
// none, and copies have none.
//
// `noise_axpy_` and `factored_axpy_` take one step, seeds [K] and coefficients [K] and decay [], or S of them
// one after the other, each rounded: seeds [S, K], coefficients [S, K], decay [S]. Term k of step s is number
// s K + k of the factors. Bits of stochastic rounding come from the first seed of a step.
//
// Factored directions are those of a matrix: `theta[t]` is one of m x n, `left[t]` is float32 [T, r, m],
// `right[t]` float32 [T, r, n], where T is the number of terms, or 1 where all terms share a factor.
// Entry (i, j) of term k is sum_q left[t][k, q, i] right[t][k, q, j].
//
// A window of H steps has K terms a step: `seeds` int64 [H, K], `coefficients` float32 [H, K],
// `first_weights` and `second_weights` float32 [H]; `lr`, `eps` and `decay` are float32 []. With
// g_h = sum_k coefficients[h, k] D(seeds[h, k]) and m = sum_h first_weights[h] g_h,
// theta = theta + (move - decay theta), where `rule` says what the move is (core/rules.h):
//   0 adam: -lr m / sqrt(v + eps), v = sum_h second_weights[h] g_h^2
//   1 sign: -lr sign(m)
//   2 scalar_adam: -lr m / (sqrt(v) + eps), v = sum_h second_weights[h] (sum_k coefficients[h, k])^2
// The term of row h and column k is number h K + k of the factors. Or S steps one after the other, each with the
// window that ends a row later: seeds and coefficients [S + H - 1, K], weights [S, H], lr and decay [S].
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(zoext, m) {
  // out = z(seed), one number an element, drawn from stream `stream`.
  m.def(
      "normal_(Tensor(a!)[] out, Tensor seed, SymInt[] keys, SymInt[] spans, SymInt stream, "
      "SymInt distribution) -> ()");
  // theta = theta + (sum_k coefficients[k] z(seeds[k]) - decay theta); decay is float32 [].
  m.def(
      "noise_axpy_(Tensor(a!)[] theta, Tensor(b!)[] residuals, Tensor seeds, Tensor coefficients, Tensor decay, "
      "SymInt[] keys, "
      "SymInt[] spans, SymInt distribution, SymInt rounding) -> ()");
  // out = theta + sum_k coefficients[k] z(seeds[k]).
  m.def(
      "noise_copy_(Tensor(a!)[] out, Tensor[] theta, Tensor seeds, Tensor coefficients, SymInt[] keys, "
      "SymInt[] spans, SymInt distribution, SymInt rounding) -> ()");
  // theta = theta + (the move of a window of dense estimates - decay theta).
  m.def(
      "noise_window_(Tensor(a!)[] theta, Tensor(b!)[] residuals, Tensor seeds, Tensor coefficients, "
      "Tensor first_weights, Tensor second_weights, Tensor lr, Tensor eps, Tensor decay, SymInt[] keys, "
      "SymInt[] spans, SymInt distribution, SymInt rounding, SymInt rule) -> ()");
  // theta = theta + (sum_k coefficients[k] left_k^T right_k - decay theta); decay is float32 [].
  m.def(
      "factored_axpy_(Tensor(a!)[] theta, Tensor(b!)[] residuals, Tensor[] left, Tensor[] right, Tensor seeds, "
      "Tensor coefficients, Tensor decay, SymInt[] keys, SymInt[] spans, SymInt rounding) -> ()");
  // out = theta + sum_k coefficients[k] left_k^T right_k.
  m.def(
      "factored_copy_(Tensor(a!)[] out, Tensor[] theta, Tensor[] left, Tensor[] right, Tensor seeds, "
      "Tensor coefficients, SymInt[] keys, SymInt[] spans, SymInt rounding) -> ()");
  // theta = theta + (the move of a window of factored estimates - decay theta).
  m.def(
      "factored_window_(Tensor(a!)[] theta, Tensor(b!)[] residuals, Tensor[] left, Tensor[] right, Tensor seeds, "
      "Tensor coefficients, Tensor first_weights, Tensor second_weights, Tensor lr, Tensor eps, Tensor decay, "
      "SymInt[] keys, SymInt[] spans, SymInt rounding, SymInt rule) -> ()");
  // An orthonormal basis (float32 [rank, d], one vector a row) of the leading right singular subspace of
  // the rows of `input` ([..., d]) that `mask` (bool [...]) counts, and its singular values (float32
  // [rank]). Vectors beyond the rank of the input are zero. Where the input is not finite the basis is
  // zero and the values are NaN.
  m.def(
      "power_iteration(Tensor input, Tensor? mask, Tensor seed, SymInt rank, SymInt iterations) -> (Tensor, "
      "Tensor)");
}
