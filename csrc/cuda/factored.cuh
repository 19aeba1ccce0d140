// Factored directions: those of a matrix, from its small factors.
#pragma once

#include "chunks.h"
#include "combination.cuh"
#include "launch.h"

namespace zoext::cuda {

// A share is one access: a second one would save no read of a factor, and cost registers.
template <class Storage>
using FactoredTiling = Tiling<vector_elements<Storage>, 1, 8, 4>;

// A matrix and its factors, [terms, rank, rows] and [terms, rank, columns].
struct FactoredSlot : Slot {
  const float* left;
  const float* right;
  int64_t rank, rows, columns;
  // From the factor of a term to that of the next; zero where all terms share one.
  int64_t left_stride, right_stride;
};

inline FactoredSlot slot_of(const Tensor& out, const Tensor& theta, const Place& place, const Tensor& left,
                            const Tensor& right) {
  const int64_t rank = left.size(1), rows = left.size(2), columns = right.size(2);
  return {slot_of(out, theta, place),
          floats_in(left),
          floats_in(right),
          rank,
          rows,
          columns,
          left.size(0) == 1 ? 0 : rank * rows,
          right.size(0) == 1 ? 0 : rank * columns};
}

// The direction of a term on one share of a matrix, a stretch of its elements row by row.
template <class StorageType>
class Factored {
 public:
  using Storage = StorageType;
  using Tiling = FactoredTiling<Storage>;
  using TensorSlot = FactoredSlot;

  __device__ Factored(const FactoredSlot& slot, const Share<Tiling>& share) : slot_(slot), share_(share) {
    const Part part = share.group(0);
    const int64_t first = part.local + part.first;
    row_ = first / slot.columns;
    column_ = first - row_ * slot.columns;
    const bool is_in_one_row =
        part.first == 0 && part.last == Tiling::vector && column_ + Tiling::vector <= slot.columns;
    const bool is_aligned =
        slot.columns % 4 == 0 && reinterpret_cast<uintptr_t>(slot.right + column_) % sizeof(float4) == 0;
    is_fast_ = is_in_one_row && is_aligned;
  }

  // sum += coefficient * sum_q left_q right_q
  template <class Number>
  __device__ void add(const Term& term, Number coefficient, Sum<Number, Tiling>& sum) const {
    const float* left = slot_.left + term.number * slot_.left_stride;
    const float* right = slot_.right + term.number * slot_.right_stride;
    Sum<Number, Tiling> product{Number{empty_sum}};
    if (is_fast_)
      multiply_in_row(left + row_, right + column_, product.of[0]);
    else
      multiply_anywhere(left, right, product.of[0]);
#pragma unroll
    for (int i = 0; i < Tiling::vector; ++i) sum.of[0][i] = add_term(coefficient, product.of[0][i], sum.of[0][i]);
  }

 private:
  // product += sum_q left_q right_q, from the factors of the first element on.
  template <class Number>
  __device__ void multiply_in_row(const float* left, const float* right, Number (&product)[Tiling::vector]) const {
    for (int64_t q = 0; q < slot_.rank; ++q, left += slot_.rows, right += slot_.columns) {
      const Number l = __ldg(left);
#pragma unroll
      for (int i = 0; i < Tiling::vector; i += 4) {
        const float4 r = __ldg(reinterpret_cast<const float4*>(right + i));
        product[i] = add_term<Number>(l, r.x, product[i]);
        product[i + 1] = add_term<Number>(l, r.y, product[i + 1]);
        product[i + 2] = add_term<Number>(l, r.z, product[i + 2]);
        product[i + 3] = add_term<Number>(l, r.w, product[i + 3]);
      }
    }
  }

  // The same from the factors of the matrix's first element on, one element after the other.
  template <class Number>
  __device__ void multiply_anywhere(const float* left, const float* right,
                                    Number (&product)[Tiling::vector]) const {
    const Part part = share_.group(0);
    for (int64_t q = 0; q < slot_.rank; ++q, left += slot_.rows, right += slot_.columns) {
      int64_t row = row_, column = column_;
#pragma unroll
      for (int i = 0; i < Tiling::vector; ++i) {
        if (i < part.first || i >= part.last) continue;
        product[i] = add_term<Number>(__ldg(left + row), __ldg(right + column), product[i]);
        if (++column == slot_.columns) column = 0, ++row;
      }
    }
  }

  const FactoredSlot& slot_;
  const Share<Tiling>& share_;
  int64_t row_, column_;  // of the share's first element that is there
  bool is_fast_;          // the share is whole, in one row, and its right factors can be read 16 bytes at a time
};

}  // namespace zoext::cuda
