// Factored directions: those of a matrix, from its small factors.
#pragma once

#include "../../core/divisor.h"
#include "chunks.h"
#include "combination.cuh"

namespace zoext::cuda {

// A share is one access: a second one would save no read of a factor, and cost registers.
template <class Storage>
using FactoredTiling = Tiling<vector_elements<Storage>, 1, 8, 4>;

// A matrix and its factors, [terms, rank, rows] and [terms, rank, columns].
struct FactoredSlot : Slot {
  const float* left;
  const float* right;
  int64_t rank, rows;
  Divisor columns;
  // From the factor of a term to that of the next; zero where all terms share one.
  int64_t left_stride, right_stride;

  // Whether whole shares lie in one row each.
  template <class Tiling>
  ZOEXT_HD bool is_regular() const {
    return columns.value() % Tiling::vector == 0 && span.base % Tiling::vector == 0 &&
           reinterpret_cast<uintptr_t>(right) % sizeof(float4) == 0;
  }
};

// The factors of the direction of a term.
struct Factors {
  const float* left;
  const float* right;

  __device__ Factors(const FactoredSlot& slot, const Term& term)
      : left(slot.left + term.number * slot.left_stride), right(slot.right + term.number * slot.right_stride) {}
};

// Directions on a share that lies in one row of a matrix, with right factors for 16-byte accesses.
template <class Tiling>
class FactoredInRow {
 public:
  __device__ FactoredInRow(const FactoredSlot& slot, int64_t local)
      : slot_(slot), row_(slot.columns.quotient(local)), column_(local - row_ * slot.columns.value()) {}

  // sum += coefficient * sum_q left_q right_q
  template <class Number>
  __device__ void add(const Term& term, Sum<Number, Tiling>& sum) const {
    const Factors factors(slot_, term);
    const float *left = factors.left + row_, *right = factors.right + column_;
    Sum<Number, Tiling> product{Number{empty_sum}};
#pragma unroll 1
    for (int64_t q = 0; q < slot_.rank; ++q, left += slot_.rows, right += slot_.columns.value()) {
      const Number l = __ldg(left);
#pragma unroll
      for (int i = 0; i < Tiling::vector; i += 4) {
        const float4 r = __ldg(reinterpret_cast<const float4*>(right + i));
        Number* const p = product.of[0] + i;
        p[0] = add_term<Number>(l, r.x, p[0]);
        p[1] = add_term<Number>(l, r.y, p[1]);
        p[2] = add_term<Number>(l, r.z, p[2]);
        p[3] = add_term<Number>(l, r.w, p[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < Tiling::vector; ++i)
      sum.of[0][i] = add_term<Number>(term.coefficient, product.of[0][i], sum.of[0][i]);
  }

 private:
  const FactoredSlot& slot_;
  const int64_t row_, column_;
};

// Directions on any share, one element after the other.
template <class Tiling>
class FactoredAnywhere {
 public:
  __device__ FactoredAnywhere(const FactoredSlot& slot, const Part& part) : slot_(slot), part_(part) {}

  // sum += coefficient * sum_q left_q right_q
  template <class Number>
  __device__ void add(const Term& term, Sum<Number, Tiling>& sum) const {
    const Factors factors(slot_, term);
    // Not unrolled: the places of all elements at once would take many registers.
#pragma unroll 1
    for (int i = part_.first; i < part_.last; ++i) {
      const Number z = product<Number>(factors, part_.local + i);
#pragma unroll
      for (int j = 0; j < Tiling::vector; ++j)
        if (j == i) sum.of[0][j] = add_term<Number>(term.coefficient, z, sum.of[0][j]);
    }
  }

 private:
  template <class Number>
  __device__ Number product(const Factors& factors, int64_t local) const {
    const int64_t columns = slot_.columns.value(), row = slot_.columns.quotient(local);
    const float *left = factors.left + row, *right = factors.right + (local - row * columns);
    Number sum{empty_sum};
#pragma unroll 1
    for (int64_t q = 0; q < slot_.rank; ++q, left += slot_.rows, right += columns)
      sum = add_term<Number>(__ldg(left), __ldg(right), sum);
    return sum;
  }

  const FactoredSlot& slot_;
  const Part part_;
};

template <class StorageType>
struct Factored {
  using Storage = StorageType;
  using Tiling = FactoredTiling<Storage>;
  using TensorSlot = FactoredSlot;
  static constexpr bool has_rounds = false;
  static constexpr int displace_blocks = 3, steps_blocks = 2, window_blocks = 2, windows_blocks = 2;

  static __device__ FactoredAnywhere<Tiling> on(const FactoredSlot& slot, const Share<Tiling>& share) {
    return {slot, share.group(0)};
  }
  template <class AnyWholeShare>
  static __device__ FactoredInRow<Tiling> on(const FactoredSlot& slot, const AnyWholeShare& share) {
    return {slot, share.theta(slot) - static_cast<const Storage*>(slot.theta)};
  }
};

}  // namespace zoext::cuda
