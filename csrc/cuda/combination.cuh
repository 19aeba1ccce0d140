// A combination of directions, sum_k c_k D_k, on the share of a thread.
#pragma once

#include "../core/combine.h"
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

// What tells a direction from another one: its seed, or its number where it is given by factors.
struct Term {
  uint64_t seed;
  int64_t number;
};

struct Combination {
  const int64_t* seeds;
  const float* coefficients;
  int64_t terms;
  int64_t first_number = 0;

  // sum += sum_k c_k D_k; whether a term contributed.
  template <class Direction, class Number, class Tiling>
  __device__ bool add(const Direction& direction, Sum<Number, Tiling>& sum) const {
    bool any = false;
    for (int64_t k = 0; k < terms; ++k) {
      const float coefficient = __ldg(coefficients + k);
      if (!contributes(coefficient)) continue;
      direction.template add<Number>({seed_at(seeds, k), first_number + k}, coefficient, sum);
      any = true;
    }
    return any;
  }
};

}  // namespace zoext::cuda
