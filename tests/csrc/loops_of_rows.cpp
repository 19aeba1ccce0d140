// What the power iteration does with rows of activations.
#include <cstdint>
#include <vector>

#include "core/power_iteration.h"
#include "loops.h"

namespace zoext {
namespace {

using cpu::InstructionSet;

// The dot product of core/power_iteration.h, as it is described there.
float plain_dot(const float* a, const float* b, int64_t length) {
  float lane[dot_lanes] = {};
  for (int64_t i = 0; i < length; ++i) lane[i % dot_lanes] = fused_multiply_add(a[i], b[i], lane[i % dot_lanes]);
  for (int half = dot_lanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

void rows_are_the_cores(const InstructionSet& set, int64_t length, int count) {
  // Of their exact size, so that the sanitizer sees a read beyond the end.
  std::vector<std::vector<float>> rows(cpu::most_rows, std::vector<float>(length));
  std::vector<float> vector(length), weights(cpu::most_rows);
  const float* pointers[cpu::most_rows];
  for (int t = 0; t < cpu::most_rows; ++t) {
    pointers[t] = rows[t].data();
    weights[t] = core_normal({3, 7, 7}, t);
    for (int64_t i = 0; i < length; ++i) rows[t][i] = core_normal({3, static_cast<uint32_t>(t), 7}, i);
  }
  for (int64_t i = 0; i < length; ++i) vector[i] = core_normal({4, 0, 7}, i);

  float products[cpu::most_rows] = {77, 77, 77, 77};
  set.rows.dot(pointers, count, vector.data(), length, products);
  for (int t = 0; t < cpu::most_rows; ++t) {
    const float expected = t < count ? plain_dot(pointers[t], vector.data(), length) : 77;
    CHECK(same(products[t], expected), "%s: product %d of %d, length %d, is %a, not %a", set.name, t, count,
          int(length), products[t], expected);
  }
  for (bool first : {true, false}) {
    std::vector<float> sum = vector;
    (first ? set.rows.start : set.rows.add)(pointers, count, weights.data(), length, sum.data());
    for (int64_t i = 0; i < length; ++i) {
      float expected = first ? 0 : vector[i];
      for (int t = 0; t < count; ++t) expected = fused_multiply_add(weights[t], rows[t][i], expected);
      CHECK(same(sum[i], expected), "%s: element %d of %d rows, length %d", set.name, int(i), count, int(length));
    }
  }
}

}  // namespace

void products_of_rows_are_the_cores(const InstructionSet& set) {
  for (int64_t length : {1, 3, 4, 8, 15, 16, 31, 32, 33, 40, 63, 64, 100, 131, 1000})
    for (int count = 1; count <= cpu::most_rows; ++count) rows_are_the_cores(set, length, count);
}

}  // namespace zoext
