// A combination of directions, sum_k c_k D_k, on the share of a thread.
#pragma once

#include "../../core/combine.h"
#include "words.cuh"

namespace zoext::cuda {

// One number for each element of a share.
template <class Number, class Tiling>
struct Sum {
  Number of[Tiling::groups][Tiling::vector];

  explicit __device__ Sum(Number start) {
#pragma unroll
    for (auto& group : of)
#pragma unroll
      for (Number& number : group) number = start;
  }
};

// A coefficient, and what tells its direction from another one: the seed, or the number where
// directions are given by factors.
struct Term {
  float coefficient;
  uint64_t seed;
  int number;
};

struct Combination {
  const int64_t* seeds;
  const float* coefficients;
  int terms;
  int first_number = 0;

  // The first term from `k` on that contributes, or `terms` where none does.
  __device__ int contributing(int k) const {
    while (k < terms && !contributes(__ldg(coefficients + k))) ++k;
    return k;
  }

  __device__ Term term(int k) const { return {__ldg(coefficients + k), seed_at(seeds, k), first_number + k}; }

  // The sum of the coefficients from `k` on that contribute.
  template <class Number>
  __device__ Number projected_gradient(int k) const {
    Number sum{0};
    for (; k < terms; k = contributing(k + 1)) sum = sum + static_cast<Number>(__ldg(coefficients + k));
    return sum;
  }

  // sum += the terms from `k` on
  template <class Direction, class Number, class Tiling>
  __device__ void add_from(int k, const Direction& direction, Sum<Number, Tiling>& sum) const {
    for (k = contributing(k); k < terms; k = contributing(k + 1)) direction.add(term(k), sum);
  }
};

}  // namespace zoext::cuda
