// Normals of words, and the root that they take. test_core_in_cpp.py builds and runs it.
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "core/normal.h"
#include "core/stream.h"

using namespace zoext;

namespace {

// The root on CUDA is corrected from an estimate. Of all mantissas of both parities, with all estimates
// within three quarters of the error that PTX allows to rsqrt.approx, 2^-22.9.
void one_correction_makes_the_root() {
  const double bound = 0.75 * std::exp2(-22.9);
  for (uint32_t bits = 0x3f800000u; bits < 0x40800000u; ++bits) {
    const float a = float_of_bits(bits), root = square_root(a);
    const double exact = 1 / std::sqrt(double{a});
    float estimate = static_cast<float>(exact * (1 - bound));
    if (estimate < exact * (1 - bound)) estimate = std::nextafter(estimate, 2.0f);
    for (; estimate <= exact * (1 + bound); estimate = std::nextafter(estimate, 2.0f))
      CHECK(corrected_square_root(a, estimate) == root, "%a with 1/sqrt about %a", a, estimate);
  }
}

void check_normals(uint32_t first, uint32_t second) {
  const double two_pi = 6.283185307179586476925;
  const double u = (first + 0.5) / 4294967296.0, v = (second + 0.5) / 4294967296.0;
  const double r = std::sqrt(-2 * std::log(u));
  float sine, cosine;
  box_muller(first, second, sine, cosine);
  CHECK(std::abs(sine - r * std::sin(two_pi * v)) <= 1.5e-6, "words %08x %08x: sine %.9g", first, second, sine);
  CHECK(std::abs(cosine - r * std::cos(two_pi * v)) <= 1.5e-6, "words %08x %08x: cosine %.9g", first, second,
        cosine);
  CHECK(std::abs(radius<float>(first) - r) <= 1.5e-6, "word %08x: radius %.9g", first, radius<float>(first));
}

void normals_are_box_mullers() {
  std::vector<uint32_t> edges;
  for (int bit = 0; bit < 32; ++bit)
    for (int offset = -2; offset <= 2; ++offset)
      for (uint32_t centre : {1u << bit, 0u - (1u << bit), 0x20000000u * static_cast<uint32_t>(bit)})
        edges.push_back(centre + static_cast<uint32_t>(offset));
  for (uint32_t first : edges)
    for (uint32_t second : edges) check_normals(first, second);
  const Field field{2026, 0, 0};
  for (uint64_t block = 0; block < 200000; ++block) {
    const Words<uint32_t> words = field.words(block);
    check_normals(words.w[0], words.w[1]);
    check_normals(words.w[2], words.w[3]);
  }
}

}  // namespace

int main() {
  one_correction_makes_the_root();
  normals_are_box_mullers();
  return finish("normals");
}
