// The arguments of operators once they are checked. Operators check all of them before they change anything.
//
// All tensors of a call are on one device. A tensor of a list has an entry in `keys`, the key of its parameter,
// and three in `spans`: (base, run, stride), its place in the unsharded parameter. Seeds and coefficients are
// tensors and the rest SymInt, so that a compiled step is not compiled again when they change, and no step waits
// for the host.
#pragma once

#include "checks.h"

namespace zoext::ops {

// Weights that an operator reads, and where they lie in the noise field.
struct Weights {
  std::vector<Tensor> theta;
  std::vector<Place> places;
  Rounding rounding;

  bool is_empty() const { return theta.empty(); }
};

// Weights that are updated in place. `residuals` has none, or one for each tensor: int8, as large as theta where
// its storage rounds, else empty.
struct Moved : Weights {
  std::vector<Tensor> residuals;

  Moved(std::vector<Tensor> theta_, std::vector<Tensor> residuals_, const std::vector<int64_t>& keys,
        const std::vector<int64_t>& spans, int64_t rounding_)
      : Weights{std::move(theta_), {}, {}}, residuals(std::move(residuals_)) {
    check_tensors("theta", theta);
    places = checked_places(theta, keys, spans);
    rounding = checked_rounding(rounding_, theta, residuals);
  }
};

// Weights that are only read, and the tensors that are written. Copies have no residuals.
struct Copied : Weights {
  std::vector<Tensor> out;

  Copied(std::vector<Tensor> out_, std::vector<Tensor> theta_, const std::vector<int64_t>& keys,
         const std::vector<int64_t>& spans, int64_t rounding_)
      : Weights{std::move(theta_), {}, {}}, out(std::move(out_)) {
    check_tensors("out", out);
    check_tensors("theta", theta);
    check_copy(out, theta);
    places = checked_places(theta, keys, spans);
    rounding = checked_rounding(rounding_);
  }
};

// Weights that are only read, and `count` copies of each that are written: a tensor of out is [count,
// *theta.shape].
struct Copies : Weights {
  std::vector<Tensor> out;
  int64_t count;

  Copies(std::vector<Tensor> out_, std::vector<Tensor> theta_, const std::vector<int64_t>& keys,
         const std::vector<int64_t>& spans, int64_t rounding_, int64_t count_)
      : Weights{std::move(theta_), {}, {}}, out(std::move(out_)), count(count_) {
    check_tensors("out", out);
    check_tensors("theta", theta);
    check_copies(out, theta, count);
    places = checked_places(theta, keys, spans);
    rounding = checked_rounding(rounding_);
  }
};

// One combination: seeds int64 [K] and coefficients float32 [K].
struct Terms {
  Tensor seeds, coefficients;

  Terms(Tensor seeds_, Tensor coefficients_, const Tensor& like)
      : seeds(std::move(seeds_)), coefficients(std::move(coefficients_)) {
    check_terms(seeds, coefficients, like, 1);
  }
};

// Several combinations of the same directions: seeds int64 [K] and coefficients float32 [count, K].
struct TermsOfCopies {
  Tensor seeds, coefficients;

  TermsOfCopies(Tensor seeds_, Tensor coefficients_, const Tensor& like)
      : seeds(std::move(seeds_)), coefficients(std::move(coefficients_)) {
    check_seeds(seeds, like);
    check_coefficients_of_copies(coefficients, seeds.size(0), like);
  }

  int64_t copies() const { return coefficients.size(0); }
  int64_t terms() const { return seeds.size(0); }
};

// `count` combinations one after the other, each rounded: seeds and coefficients [S, K] and decay [S], or [K] and
// [] for one. Term k of step s is number s K + k of the factors. Bits of stochastic rounding come from the first
// seed of a step.
struct Steps {
  Tensor seeds, coefficients, decay;
  int64_t count;

  Steps(Tensor seeds_, Tensor coefficients_, Tensor decay_, const Tensor& like)
      : seeds(std::move(seeds_)), coefficients(std::move(coefficients_)), decay(std::move(decay_)) {
    const bool is_one = seeds.dim() != 2;
    check_terms(seeds, coefficients, like, is_one ? 1 : 2);
    count = is_one ? 1 : seeds.size(0);
    check_per_step("decay", decay, count, like);
  }

  int64_t terms() const { return count > 0 ? seeds.numel() / count : 0; }
};

// A window of H steps of K terms each, oldest first: seeds int64 [H, K], coefficients float32 [H, K], the weights
// float32 [H], lr, eps and decay float32 []. Term k of row h is number h K + k of the factors. Or `count` windows,
// each of which ends a row later: seeds and coefficients [S + H - 1, K], weights [S, H], lr and decay [S].
struct Windows {
  Tensor seeds, coefficients, first_weights, second_weights, lr, eps, decay;
  int64_t count;
  int rule;

  Windows(Tensor seeds_, Tensor coefficients_, Tensor first_weights_, Tensor second_weights_, Tensor lr_,
          Tensor eps_, Tensor decay_, int rule_, const Tensor& like)
      : seeds(std::move(seeds_)),
        coefficients(std::move(coefficients_)),
        first_weights(std::move(first_weights_)),
        second_weights(std::move(second_weights_)),
        lr(std::move(lr_)),
        eps(std::move(eps_)),
        decay(std::move(decay_)),
        rule(rule_) {
    check_terms(seeds, coefficients, like, 2);
    count = first_weights.dim() != 2 ? 1 : first_weights.size(0);
    check_window_weights(first_weights, second_weights, seeds.size(0), like);
    check_per_step("lr", lr, count, like);
    check_per_step("decay", decay, count, like);
    check_scalar("eps", eps, ScalarType::Float, like);
  }

  int64_t horizon() const { return seeds.size(0) - count + 1; }
  int64_t terms() const { return seeds.size(1); }
};

// The factors of m x n matrices: left float32 [T, r, m] and right float32 [T, r, n] for T terms, or [1, ...] where
// all terms share a factor. Entry (i, j) of term k is sum_q left[k, q, i] right[k, q, j].
struct FactorPairs {
  std::vector<Tensor> left, right;

  FactorPairs(std::vector<Tensor> left_, std::vector<Tensor> right_, const std::vector<Tensor>& theta,
              int64_t terms)
      : left(std::move(left_)), right(std::move(right_)) {
    check_factors(theta, left, right, terms);
  }
};

}  // namespace zoext::ops
