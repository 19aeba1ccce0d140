// The leading right singular vectors of a matrix X of tokens x features, by a block Krylov method with
// Rayleigh-Ritz: Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate
// singular value decomposition", NeurIPS 2015, algorithm 2. With vectors as rows:
//
//   Q_0 = orth(Omega^T X)                       Omega: tokens x rank, standard normals
//   Y_k = scale Q_k X^T                         k = 0 .. K; scale: a power of two near 1 / |Omega^T X|
//   Q_{k+1} = orth(Y_k X, also to Q_0 .. Q_k)   k < K
//   Y Y^T = C^T Theta C                         basis = orth(C Q), singular values sqrt(Theta) / scale
//
// It takes the products that K power iterations take and finds the best vectors in the space of all of
// them, where a power iteration keeps the last ones: the error falls with a Chebyshev polynomial of
// degree K in place of the K-th power.
//
// Orders of sums. Over features: lane l of `dot_lanes` adds the products l, l + dot_lanes, ... by fused
// multiply-adds, then lanes l and l + 16 are added, l and l + 8, 4, 2, 1. Over tokens: a chain of fused
// multiply-adds within a chunk of `chunk_tokens`, then the chunks in order. Tokens that a mask leaves
// out leave their link out of the chain.
#pragma once

#include "symmetric_eigen.h"

namespace zoext {

constexpr int dot_lanes = 32;
constexpr int64_t chunk_tokens = 64;

struct KrylovShape {
  int64_t tokens, features, rank, blocks;

  // More blocks than fill the whole space would find nothing.
  static ZOEXT_HD KrylovShape of(int64_t tokens, int64_t features, int64_t rank, int64_t iterations) {
    const int64_t dimension = tokens < features ? tokens : features;
    const int64_t enough = (dimension + rank - 1) / rank;
    return {tokens, features, rank, (iterations < enough ? iterations : enough) + 1};
  }
  ZOEXT_HD int64_t vectors() const { return blocks * rank; }
  ZOEXT_HD int64_t chunks() const { return (tokens + chunk_tokens - 1) / chunk_tokens; }
};

// The power of two that brings `magnitude` to 1 .. 2, as far as there is one.
ZOEXT_HD float scale_to_one(float magnitude) {
  const uint32_t exponent = bits_of(magnitude) >> 23 & 0xffu;
  return float_of_bits((exponent < 253u ? 254u - exponent : 1u) << 23);
}

// The larger magnitude of two. Not a number is larger than any.
ZOEXT_HD uint32_t larger_magnitude(uint32_t magnitude, float a) {
  const uint32_t other = bits_of(a) & 0x7fffffffu;
  return magnitude > other ? magnitude : other;
}

// What normalises a vector whose square was `before`, and after one and two projections `once` and
// `twice`; zero, which drops it, where float32 cannot tell the remainder from rounding errors.
ZOEXT_HD float inverse_norm(float before, float once, float twice) {
  constexpr float smallest_remainder = 1e-12f, least_kept = 0.25f;  // squares
  if (twice <= multiply(smallest_remainder, before) || twice < multiply(least_kept, once)) return 0.0f;
  return divide(1.0f, square_root(twice));
}

// Makes `vector` orthonormal to `count` rows of `basis`, or zero where it depends on them: projected
// twice, which is enough (Giraud, Langou, Rozloznik, Computers and Mathematics with Applications 50,
// 2005). The Team supplies, over `features` elements: `largest` magnitude, `multiply` by a number, `dot`,
// `dots` with the rows of the basis, and `subtract` of their multiples in the order of the rows.
template <class Team>
ZOEXT_HD void orthonormalise(const Team& team, const float* basis, int64_t count, float* vector, int64_t features,
                             float* coefficients) {
  team.multiply(vector, scale_to_one(team.largest(vector, features)), features);
  const float before = team.dot(vector, vector, features);
  float once = before, twice = before;
  for (int pass = 0; pass < 2 && count > 0; ++pass) {
    team.dots(basis, count, vector, features, coefficients);
    team.subtract(basis, count, coefficients, vector, features);
    once = twice;
    twice = team.dot(vector, vector, features);
  }
  team.multiply(vector, inverse_norm(before, once, twice), features);
}

// The Rayleigh-Ritz step, from the matrix Y Y^T in `p`. Row q of `coefficients` (float [rank, size])
// combines the rows of Q to the vector of the q-th largest singular value, and `values` (float [rank])
// has that value. Both are zero where the value is lost in the rounding errors of the largest, and the
// values are not numbers where the matrix is not finite.
template <class Team>
ZOEXT_HD void solve_ritz(const Team& team, const Eigenproblem& p, int64_t rank, float scale, float* coefficients,
                         float* values) {
  constexpr double smallest_ratio = 1e-12;  // of squares of singular values
  const bool finite = team.once([&] {
    bool all = true;
    for (int64_t i = 0; i < p.size; ++i) all = all && p.matrix[i * p.size + i] < 0x1p1000;
    return all;
  });
  if (!finite) {
    for (int64_t i = team.first(); i < rank; i += team.step()) values[i] = float_of_bits(0x7fc00000u);
    for (int64_t i = team.first(); i < rank * p.size; i += team.step()) coefficients[i] = 0.0f;
    team.wait();
    return;
  }
  solve(team, p);
  for (int64_t i = team.first(); i < p.size; i += team.step()) {
    double largest = p.values[i];
    int64_t place = 0;
    for (int64_t j = 0; j < p.size; ++j) {
      largest = p.values[j] > largest ? p.values[j] : largest;
      place += p.values[j] > p.values[i] || (p.values[j] == p.values[i] && j < i);
    }
    if (place >= rank) continue;
    const bool counts = p.values[i] > multiply(smallest_ratio, largest);
    for (int64_t j = 0; j < p.size; ++j)
      coefficients[place * p.size + j] = counts ? static_cast<float>(p.vectors[i * p.size + j]) : 0.0f;
    const double value = divide(square_root(counts ? p.values[i] : 0.0), static_cast<double>(scale));
    values[place] = static_cast<float>(value);
  }
  team.wait();
}

}  // namespace zoext
