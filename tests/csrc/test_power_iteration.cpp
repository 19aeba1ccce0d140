// The parts of the power iteration that take no loop over activations. test_core_in_cpp.py builds and runs
// it.
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "core/power_iteration.h"
#include "core/stream.h"

using namespace zoext;

namespace {

struct OneThread {
  static int64_t first() { return 0; }
  static int64_t step() { return 1; }
  static void wait() {}
  template <class F>
  auto once(F f) const {
    return f();
  }
};

// A symmetric matrix whose element (i, j) is `entry(i, j)` for i >= j.
template <class Entry>
void check_eigenvectors(const char* name, int64_t size, Entry entry) {
  std::vector<double> matrix(size * size), memory(Eigenproblem::doubles(size) + 1, 77.0);
  const Eigenproblem problem = Eigenproblem::in(memory.data(), size);
  double norm = 0;
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) {
      const double value = matrix[i * size + j] = i < j ? entry(j, i) : entry(i, j);
      problem.matrix[i * size + j] = value;
      norm += value * value;
    }
  norm = std::sqrt(norm);
  solve(OneThread{}, problem);
  CHECK(memory.back() == 77.0, "%s of %d: writes beyond its memory", name, int(size));
  for (int64_t a = 0; a < size; ++a)
    for (int64_t i = 0; i < size; ++i) {
      double image = 0, product = 0;
      for (int64_t j = 0; j < size; ++j) {
        image += matrix[i * size + j] * problem.vectors[a * size + j];
        product += problem.vectors[a * size + j] * problem.vectors[i * size + j];
      }
      const double residual = image - problem.values[a] * problem.vectors[a * size + i];
      CHECK(std::fabs(residual) <= 1e-13 * norm, "%s of %d: residual %g of vector %d", name, int(size), residual,
            int(a));
      CHECK(std::fabs(product - (a == i)) <= 1e-13, "%s of %d: product %g of vectors %d, %d", name, int(size),
            product, int(a), int(i));
    }
}

void eigenvectors_solve_their_equation() {
  for (int64_t size : {1, 2, 3, 5, 16, 33, 64}) {
    const auto random = [&](int64_t i, int64_t j) {
      return static_cast<double>(Field{1, 0, 0}.words(i * size + j).w[0]) * 0x1p-31 - 1;
    };
    check_eigenvectors("random", size, random);
    check_eigenvectors("zero", size, [](int64_t, int64_t) { return 0.0; });
    check_eigenvectors("identity", size, [](int64_t i, int64_t j) { return i == j ? 1.0 : 0.0; });
    check_eigenvectors("ones", size, [](int64_t, int64_t) { return 1.0; });
    check_eigenvectors("tiny", size, [&](int64_t i, int64_t j) { return 1e-120 * random(i, j); });
    check_eigenvectors("graded", size, [&](int64_t i, int64_t j) {
      return std::pow(10.0, -(double)(i + j) / 4) * (i == j ? 2 : random(i, j));
    });
    check_eigenvectors("with empty rows", size,
                       [&](int64_t i, int64_t j) { return i % 3 && j % 3 ? random(i, j) : 0.0; });
  }
}

void scales_are_powers_of_two_near_one() {
  for (float magnitude : {1.0f, 1.99f, 3e-25f, 7e30f, 0x1p-126f, 0x1.8p126f}) {
    const float scaled = magnitude * scale_to_one(magnitude);
    CHECK(scaled >= 1 && scaled < 2, "%a becomes %a", magnitude, scaled);
  }
  for (float magnitude : {0.0f, 1e-45f, 0x1.fffffep127f, INFINITY, NAN})
    CHECK(std::isfinite(scale_to_one(magnitude)) && scale_to_one(magnitude) > 0, "scale of %a", magnitude);
}

void dependent_vectors_are_dropped() {
  CHECK(inverse_norm(4, 4, 4) == 0.5f, "an independent vector");
  CHECK(inverse_norm(4, 1e-11f, 1e-11f) > 0, "a remainder of 1.6e-6");
  CHECK(inverse_norm(4, 3e-12f, 3e-12f) == 0, "a remainder below 1e-6");
  CHECK(inverse_norm(4, 1e-11f, 2e-12f) == 0, "a remainder that was rounding errors");
  CHECK(inverse_norm(0, 0, 0) == 0, "no vector");
  CHECK(std::isnan(inverse_norm(NAN, NAN, NAN)), "not a number");
}

void more_blocks_than_the_space_has_room_for_are_left_out() {
  CHECK(KrylovShape::of(1000, 500, 4, 3).blocks == 4, "few of many");
  CHECK(KrylovShape::of(1000, 10, 4, 99).blocks == 4, "ten features are three blocks of four, and a last one");
  CHECK(KrylovShape::of(1, 10, 4, 99).blocks == 2, "one token");
  CHECK(KrylovShape::of(0, 10, 4, 99).blocks == 1, "no tokens");
}

}  // namespace

int main() {
  eigenvectors_solve_their_equation();
  scales_are_powers_of_two_near_one();
  dependent_vectors_are_dropped();
  more_blocks_than_the_space_has_room_for_are_left_out();
  return finish("parts of the power iteration");
}
