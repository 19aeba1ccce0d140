// All eigenvectors of a small symmetric matrix, in double: Householder's reduction to a tridiagonal
// matrix and implicit QL steps (Golub, Van Loan, "Matrix Computations", 8.3; EISPACK's tred2 and tql2).
//
// A Team is the threads that share the work. `team.first()` and `team.step()` deal out a loop,
// `team.wait()` lets all see what all have written, and `team.once(f)` has one thread run f and gives
// everyone its result. Which thread does what changes no bit: there are products, sums, square roots and
// divisions, each rounded once, and every sum has its order.
#pragma once

#include "lane.h"

namespace zoext {

struct Eigenproblem {
  int64_t size;
  double* matrix;   // size x size; overwritten
  double* vectors;  // size x size: an eigenvector a row
  double* values;   // size: their eigenvalues, in no order
  double* work;     // 3 size

  static ZOEXT_HD int64_t doubles(int64_t size) { return size * (2 * size + 4); }
  static ZOEXT_HD Eigenproblem in(double* memory, int64_t size) {
    double* const vectors = memory + size * size;
    double* const values = vectors + size * size;
    return {size, memory, vectors, values, values + size};
  }
  ZOEXT_HD double* off_diagonal() const { return work; }
};

// The reflection I - u u^T / half_square, or none where half_square is zero.
struct Reflection {
  double half_square;
};

// The reflection that clears row `k` right of the element next to the diagonal.
ZOEXT_HD Reflection reflection_of_row(const Eigenproblem& p, int64_t k, double* u) {
  const double* const row = p.matrix + k * p.size;
  double tail = 0.0;
  for (int64_t i = k + 2; i < p.size; ++i) tail = tail + multiply(row[i], row[i]);
  const double head = row[k + 1];
  const double norm = square_root(multiply(head, head) + tail);
  const double image = head > 0.0 ? -norm : norm;  // away from head: no cancellation in u
  const double half_square = multiply(image, image - head);
  p.values[k] = row[k];
  if (!(tail > 0.0 && half_square > 0.0)) {
    p.off_diagonal()[k] = head;
    return {0.0};
  }
  p.off_diagonal()[k] = image;
  u[k + 1] = head - image;
  for (int64_t i = k + 2; i < p.size; ++i) u[i] = row[i];
  return {half_square};
}

// matrix = R matrix R and vectors = R vectors for the reflection R of rows and columns from `start` on.
template <class Team>
ZOEXT_HD void reflect(const Team& team, const Eigenproblem& p, int64_t start, double half_square, const double* u,
                      double* image) {
  const int64_t size = p.size;
  for (int64_t i = start + team.first(); i < size; i += team.step()) image[i] = 0.0;
  for (int64_t j = start; j < size; ++j)
    for (int64_t i = start + team.first(); i < size; i += team.step())
      image[i] = image[i] + multiply(p.matrix[j * size + i], u[j]);
  for (int64_t i = start + team.first(); i < size; i += team.step()) image[i] = divide(image[i], half_square);
  team.wait();
  const double half_projection = team.once([&] {
    double sum = 0.0;
    for (int64_t i = start; i < size; ++i) sum = sum + multiply(u[i], image[i]);
    return divide(sum, 2.0 * half_square);
  });
  for (int64_t i = start + team.first(); i < size; i += team.step())
    image[i] = image[i] - multiply(half_projection, u[i]);
  team.wait();
  for (int64_t i = start; i < size; ++i)
    for (int64_t j = start + team.first(); j < size; j += team.step())
      p.matrix[i * size + j] = p.matrix[i * size + j] - (multiply(image[i], u[j]) + multiply(u[i], image[j]));
  team.wait();
  // A column of `vectors` belongs to one thread throughout.
  for (int64_t j = team.first(); j < size; j += team.step()) image[j] = 0.0;
  for (int64_t i = start; i < size; ++i)
    for (int64_t j = team.first(); j < size; j += team.step())
      image[j] = image[j] + multiply(u[i], p.vectors[i * size + j]);
  for (int64_t j = team.first(); j < size; j += team.step()) image[j] = divide(image[j], half_square);
  for (int64_t i = start; i < size; ++i)
    for (int64_t j = team.first(); j < size; j += team.step())
      p.vectors[i * size + j] = p.vectors[i * size + j] - multiply(u[i], image[j]);
  team.wait();
}

// Makes the matrix tridiagonal: `values` is its diagonal, `off_diagonal` what stands next to it.
template <class Team>
ZOEXT_HD void tridiagonalise(const Team& team, const Eigenproblem& p) {
  const int64_t size = p.size;
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = team.first(); j < size; j += team.step()) p.vectors[i * size + j] = i == j ? 1.0 : 0.0;
  double* const u = p.work + size;
  for (int64_t k = 0; k + 1 < size; ++k) {
    const Reflection reflection = team.once([&] { return reflection_of_row(p, k, u); });
    if (reflection.half_square > 0.0) reflect(team, p, k + 1, reflection.half_square, u, u + size);
  }
  team.once([&] {
    p.values[size - 1] = p.matrix[size * size - 1];
    p.off_diagonal()[size - 1] = 0.0;
    return 0;
  });
}

// Plane rotations of the neighbours (i, i + 1) for i = last - 1 down to first.
struct Rotations {
  int64_t first, last;
};

// One implicit QL step on the unreduced block that begins at row `first`; no rotations if the block
// is a single row, whose eigenvalue is found.
ZOEXT_HD Rotations ql_step(const Eigenproblem& p, int64_t first, double* cosines, double* sines) {
  constexpr double epsilon = 0x1p-53;
  double *const d = p.values, *const e = p.off_diagonal();
  int64_t last = first;
  for (; last + 1 < p.size; ++last) {
    const double neighbours =
        (d[last] < 0.0 ? -d[last] : d[last]) + (d[last + 1] < 0.0 ? -d[last + 1] : d[last + 1]);
    if ((e[last] < 0.0 ? -e[last] : e[last]) <= multiply(epsilon, neighbours)) break;
  }
  if (last == first) return {first, first};
  const double slope = divide(d[first + 1] - d[first], 2.0 * e[first]);
  const double root = square_root(multiply(slope, slope) + 1.0);
  double g = d[last] - d[first] + divide(e[first], slope < 0.0 ? slope - root : slope + root);
  double sine = 1.0, cosine = 1.0, shift = 0.0;
  for (int64_t i = last - 1; i >= first; --i) {
    const double f = multiply(sine, e[i]), b = multiply(cosine, e[i]);
    const double radius = square_root(multiply(f, f) + multiply(g, g));
    e[i + 1] = radius;
    if (radius == 0.0) {  // the block falls apart here
      d[i + 1] = d[i + 1] - shift;
      e[last] = 0.0;
      return {i + 1, last};
    }
    sine = divide(f, radius);
    cosine = divide(g, radius);
    g = d[i + 1] - shift;
    const double r = multiply(d[i] - g, sine) + multiply(2.0 * cosine, b);
    shift = multiply(sine, r);
    d[i + 1] = g + shift;
    g = multiply(cosine, r) - b;
    cosines[i] = cosine;
    sines[i] = sine;
  }
  d[first] = d[first] - shift;
  e[first] = g;
  e[last] = 0.0;
  return {first, last};
}

template <class Team>
ZOEXT_HD void rotate_vectors(const Team& team, const Eigenproblem& p, const Rotations& rotations,
                             const double* cosines, const double* sines) {
  for (int64_t i = rotations.last - 1; i >= rotations.first; --i) {
    double *const upper = p.vectors + i * p.size, *const lower = upper + p.size;
    const double cosine = cosines[i], sine = sines[i];
    for (int64_t j = team.first(); j < p.size; j += team.step()) {
      const double a = upper[j], b = lower[j];
      lower[j] = multiply(sine, a) + multiply(cosine, b);
      upper[j] = multiply(cosine, a) - multiply(sine, b);
    }
  }
}

// Solves the problem; the matrix must be finite.
template <class Team>
ZOEXT_HD void solve(const Team& team, const Eigenproblem& p) {
  constexpr int most_steps = 40;  // per eigenvalue; two are usual
  tridiagonalise(team, p);
  double *const cosines = p.work + p.size, *const sines = cosines + p.size;
  for (int64_t first = 0; first < p.size; ++first)
    for (int step = 0; step < most_steps; ++step) {
      const Rotations rotations = team.once([&] { return ql_step(p, first, cosines, sines); });
      const bool found = rotations.first == rotations.last && rotations.first == first;
      if (found) break;
      rotate_vectors(team, p, rotations, cosines, sines);
      team.wait();
    }
}

}  // namespace zoext
