// The Teams of core/power_iteration.h and core/symmetric_eigen.h on the CPU: one thread each.
#pragma once

#include <algorithm>

#include "instruction_set.h"

namespace zoext::cpu {

// The threads of core/power_iteration.h: one.
struct OneThread {
  static constexpr int64_t first() { return 0; }
  static constexpr int64_t step() { return 1; }
  static void wait() {}
  template <class F>
  auto once(F f) const {
    return f();
  }
};

struct Rows {
  const float* of[most_rows];
  int64_t token[most_rows];
  int count;
};

// f(rows) for every few rows of a matrix, in order.
template <class F>
void for_each_few(const float* matrix, int64_t rows, int64_t length, F f) {
  for (int64_t t = 0; t < rows; t += most_rows) {
    Rows few{{}, {}, static_cast<int>(std::min<int64_t>(most_rows, rows - t))};
    for (int i = 0; i < few.count; ++i) few.of[i] = matrix + (few.token[i] = t + i) * length;
    f(few);
  }
}

// The operations of `orthonormalise`, by the loops of an instruction set.
struct VectorLoops {
  const InstructionSet& set;

  float largest(const float* vector, int64_t length) const {
    uint32_t largest = 0;
    for (int64_t i = 0; i < length; ++i) largest = larger_magnitude(largest, vector[i]);
    return float_of_bits(largest);
  }
  void multiply(float* vector, float factor, int64_t length) const {
    for (int64_t i = 0; i < length; ++i) vector[i] = zoext::multiply(vector[i], factor);
  }
  float dot(const float* a, const float* b, int64_t length) const {
    float product;
    set.rows.dot(&a, 1, b, length, &product);
    return product;
  }
  void dots(const float* basis, int64_t count, const float* vector, int64_t length, float* products) const {
    for_each_few(basis, count, length, [&](const Rows& rows) {
      set.rows.dot(rows.of, rows.count, vector, length, products + rows.token[0]);
    });
  }
  void subtract(const float* basis, int64_t count, const float* coefficients, float* vector,
                int64_t length) const {
    for_each_few(basis, count, length, [&](const Rows& rows) {
      float weights[most_rows];
      for (int i = 0; i < rows.count; ++i) weights[i] = -coefficients[rows.token[i]];
      set.rows.add(rows.of, rows.count, weights, length, vector);
    });
  }
};

}  // namespace zoext::cpu
