// Combinations and Adam steps of directions given by their factors, on the CPU.
#include "displace.h"
#include "terms.h"

namespace zoext::cpu {
namespace {

Factors factors_of(const Tensor& left, const Tensor& right) {
  const int64_t rank = left.size(1), rows = left.size(2), columns = right.size(2);
  return {floats_in(left),
          floats_in(right),
          rows,
          columns,
          rank,
          left.size(0) == 1 ? 0 : rank * rows,
          right.size(0) == 1 ? 0 : rank * columns};
}

// Of every matrix of a call.
std::vector<Factors> factors_of(const std::vector<Tensor>& left, const std::vector<Tensor>& right) {
  std::vector<Factors> all;
  for (size_t t = 0; t < left.size(); ++t) all.push_back(factors_of(left[t], right[t]));
  return all;
}

void displace(const std::vector<Tensor>& out, const std::vector<Tensor>& theta, const std::vector<Place>& places,
              const std::vector<Factors>& factors, const std::vector<Term>& terms, float decay,
              std::optional<uint64_t> rounding_seed) {
  const InstructionSet& set = instruction_set();
  displace(set, out, theta, places, decay, rounding_seed, [&](const Tile& tile, Upcoming upcoming, auto* change) {
    using Number = std::remove_pointer_t<decltype(change)>;
    set.arithmetic<Number>().factored.combine(factors[tile.tensor], terms.data(),
                                              static_cast<int64_t>(terms.size()), tile.local, tile.count,
                                              change + tile.lead(), upcoming);
  });
}

void factored_axpy_(std::vector<Tensor> theta, std::vector<Tensor> left, std::vector<Tensor> right, Tensor seeds,
                    Tensor coefficients, Tensor decay, std::vector<int64_t> keys, std::vector<int64_t> spans,
                    int64_t rounding) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Rounding how = checked_rounding(rounding);
  if (theta.empty()) return;
  check_seeds(seeds, coefficients, theta[0]);
  check_factors(theta, left, right, seeds.numel());
  check_scalar("decay", decay, ScalarType::Float, theta[0]);
  const std::vector<Term> terms = contributing(seeds, coefficients);
  if (terms.empty() && !contributes(*floats_in(decay))) return;
  displace(theta, theta, places, factors_of(left, right), terms, *floats_in(decay), rounding_seed(how, seeds, 0));
}

void factored_copy_(std::vector<Tensor> out, std::vector<Tensor> theta, std::vector<Tensor> left,
                    std::vector<Tensor> right, Tensor seeds, Tensor coefficients, std::vector<int64_t> keys,
                    std::vector<int64_t> spans, int64_t rounding) {
  check_tensors("out", out);
  check_tensors("theta", theta);
  check_copy(out, theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Rounding how = checked_rounding(rounding);
  if (theta.empty()) return;
  check_seeds(seeds, coefficients, theta[0]);
  check_factors(theta, left, right, seeds.numel());
  displace(out, theta, places, factors_of(left, right), contributing(seeds, coefficients), 0.0f,
           rounding_seed(how, seeds, 0));
}

void factored_adam_(std::vector<Tensor> theta, std::vector<Tensor> left, std::vector<Tensor> right, Tensor seeds,
                    Tensor coefficients, Tensor first_weights, Tensor second_weights, Tensor lr, Tensor eps,
                    Tensor decay, std::vector<int64_t> keys, std::vector<int64_t> spans, int64_t rounding) {
  check_tensors("theta", theta);
  const std::vector<Place> places = checked_places(theta, keys, spans);
  const Rounding how = checked_rounding(rounding);
  if (theta.empty()) return;
  check_window(seeds, coefficients, first_weights, second_weights, theta[0]);
  check_factors(theta, left, right, seeds.numel());
  check_scalar("lr", lr, ScalarType::Float, theta[0]);
  check_scalar("eps", eps, ScalarType::Float, theta[0]);
  check_scalar("decay", decay, ScalarType::Float, theta[0]);
  const Window window(seeds, coefficients, first_weights, second_weights, lr, eps);
  if (window.steps().empty() && !contributes(*floats_in(decay))) return;
  const std::vector<Factors> factors = factors_of(left, right);
  const InstructionSet& set = instruction_set();
  displace(set, theta, theta, places, *floats_in(decay), newest_rounding_seed(how, seeds),
           [&](const Tile& tile, Upcoming upcoming, auto* change) {
             using Number = std::remove_pointer_t<decltype(change)>;
             if (window.steps().empty())
               std::fill_n(change + tile.lead(), tile.count, Number{empty_sum});
             else
               set.arithmetic<Number>().factored.step(
                   factors[tile.tensor], window.steps().data(), static_cast<int64_t>(window.steps().size()),
                   window.minus_lr(), window.eps(), tile.local, tile.count, change + tile.lead(), upcoming);
           });
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) {
  m.impl("factored_axpy_", TORCH_BOX(&zoext::cpu::factored_axpy_));
  m.impl("factored_copy_", TORCH_BOX(&zoext::cpu::factored_copy_));
  m.impl("factored_adam_", TORCH_BOX(&zoext::cpu::factored_adam_));
}
