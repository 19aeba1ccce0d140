// The operators of dense directions: their schemas, and the checks between the dispatcher and a kernel. A backend
// registers an operator with its kernel as the template argument, a function of checked arguments.
//
// distribution: 0 standard normals, 1 signs. rounding: 0 to nearest, 1 stochastic, 2 with residuals (not of
// copies).
#pragma once

#include "arguments.h"

namespace zoext::ops {

// out = z(seed), one number an element, drawn from stream `stream`.
struct Noise {
  std::vector<Tensor> out;
  std::vector<Place> places;
  Tensor seed;
  uint32_t stream;
  Distribution distribution;
};

inline constexpr const char* normal_schema =
    "normal_(Tensor(a!)[] out, Tensor seed, SymInt[] keys, SymInt[] spans, SymInt stream, SymInt distribution) "
    "-> ()";

template <void (*kernel)(const Noise&)>
void normal_(std::vector<Tensor> out, Tensor seed, std::vector<int64_t> keys, std::vector<int64_t> spans,
             int64_t stream, int64_t distribution) {
  check_tensors("out", out);
  std::vector<Place> places = checked_places(out, keys, spans);
  const Distribution noise = checked_distribution(distribution);
  STD_TORCH_CHECK(stream >= 0 && stream <= 0xffffffffLL, "stream must be in 0 .. 2^32 - 1, not ", stream);
  if (out.empty()) return;
  check_scalar("seed", seed, ScalarType::Long, out[0]);
  kernel({std::move(out), std::move(places), std::move(seed), static_cast<uint32_t>(stream), noise});
}

// theta = theta + (sum_k coefficients[k] z(seeds[k]) - decay theta)
inline constexpr const char* noise_axpy_schema =
    "noise_axpy_(Tensor(a!)[] theta, Tensor(b!)[] residuals, Tensor seeds, Tensor coefficients, Tensor decay, "
    "SymInt[] keys, SymInt[] spans, SymInt distribution, SymInt rounding) -> ()";

template <void (*kernel)(const Moved&, const Steps&, Distribution)>
void noise_axpy_(std::vector<Tensor> theta, std::vector<Tensor> residuals, Tensor seeds, Tensor coefficients,
                 Tensor decay, std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t distribution,
                 int64_t rounding) {
  const Moved moved(std::move(theta), std::move(residuals), keys, spans, rounding);
  const Distribution noise = checked_distribution(distribution);
  if (!moved.is_empty()) kernel(moved, {seeds, coefficients, decay, moved.theta[0]}, noise);
}

// out = theta + sum_k coefficients[k] z(seeds[k])
inline constexpr const char* noise_copy_schema =
    "noise_copy_(Tensor(a!)[] out, Tensor[] theta, Tensor seeds, Tensor coefficients, SymInt[] keys, "
    "SymInt[] spans, SymInt distribution, SymInt rounding) -> ()";

template <void (*kernel)(const Copied&, const Terms&, Distribution)>
void noise_copy_(std::vector<Tensor> out, std::vector<Tensor> theta, Tensor seeds, Tensor coefficients,
                 std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t distribution, int64_t rounding) {
  const Copied copied(std::move(out), std::move(theta), keys, spans, rounding);
  const Distribution noise = checked_distribution(distribution);
  if (!copied.is_empty()) kernel(copied, {seeds, coefficients, copied.theta[0]}, noise);
}

// out[c] = theta + sum_k coefficients[c, k] z(seeds[k]), from one generation of each direction
inline constexpr const char* noise_copies_schema =
    "noise_copies_(Tensor(a!)[] out, Tensor[] theta, Tensor seeds, Tensor coefficients, SymInt[] keys, "
    "SymInt[] spans, SymInt distribution, SymInt rounding) -> ()";

template <void (*kernel)(const Copies&, const TermsOfCopies&, Distribution)>
void noise_copies_(std::vector<Tensor> out, std::vector<Tensor> theta, Tensor seeds, Tensor coefficients,
                   std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t distribution, int64_t rounding) {
  const int64_t count = theta.empty() ? 0 : TermsOfCopies(seeds, coefficients, theta[0]).copies();
  const Copies copies(std::move(out), std::move(theta), keys, spans, rounding, count);
  const Distribution noise = checked_distribution(distribution);
  if (!copies.is_empty()) kernel(copies, {seeds, coefficients, copies.theta[0]}, noise);
}

// theta = theta + (move - decay theta) with g_h = sum_k coefficients[h, k] z(seeds[h, k]),
// m = sum_h first_weights[h] g_h and the move of a rule in core/rules.h:
//   0 adam: -lr m / sqrt(v + eps), v = sum_h second_weights[h] g_h^2
//   1 sign: -lr sign(m)
//   2 scalar_adam: -lr m / (sqrt(v) + eps), v = sum_h second_weights[h] (sum_k coefficients[h, k])^2
inline constexpr const char* noise_window_schema =
    "noise_window_(Tensor(a!)[] theta, Tensor(b!)[] residuals, Tensor seeds, Tensor coefficients, "
    "Tensor first_weights, Tensor second_weights, Tensor lr, Tensor eps, Tensor decay, SymInt[] keys, "
    "SymInt[] spans, SymInt distribution, SymInt rounding, SymInt rule) -> ()";

template <void (*kernel)(const Moved&, const Windows&, Distribution)>
void noise_window_(std::vector<Tensor> theta, std::vector<Tensor> residuals, Tensor seeds, Tensor coefficients,
                   Tensor first_weights, Tensor second_weights, Tensor lr, Tensor eps, Tensor decay,
                   std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t distribution, int64_t rounding,
                   int64_t rule) {
  const Moved moved(std::move(theta), std::move(residuals), keys, spans, rounding);
  const Distribution noise = checked_distribution(distribution);
  const int number = checked_rule(rule);
  if (moved.is_empty()) return;
  kernel(moved, {seeds, coefficients, first_weights, second_weights, lr, eps, decay, number, moved.theta[0]},
         noise);
}

}  // namespace zoext::ops
