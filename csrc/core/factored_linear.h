// What a factored displacement of a linear layer's weight adds to the layer's output:
//
//   out[t] += sum_k c_k (x[t] R_k^T) L_k     x: rows x features, R_k: rank x features, L_k: rank x outputs
//
// which is the layer of theta + sum_k c_k L_k^T R_k without a displaced theta. Terms whose coefficient is zero are
// left out; where none is left, out stays as it is.
//
// Orders of sums. A product <x[t], R_k[q]>: lane l of `product_lanes` adds the products l, l + product_lanes, ...
// by fused multiply-adds from zero, missing ones as 0 * 0, then lanes l and l + 8 are added, l and l + 4, 2, 1.
// The coefficients join the left factors: where all terms share R, w_q = sum_k c_k L_k[q], a chain of fused
// multiply-adds from -0 in the order of k; else there is a w_kq = c_k L_k[q] for each k and q. An output is a
// chain of fused multiply-adds of products and w from -0, in the order of k and q, added to out and rounded once.
#pragma once

#include "combine.h"

namespace zoext {

constexpr int product_lanes = 16;

// The sizes of a call: `copies` of `rows` rows each, and a row of `terms` coefficients for each copy.
struct FactoredLinearShape {
  int64_t copies, rows, features, outputs, terms, rank;
  bool has_shared_left, has_shared_right;

  // The right vectors of a row, of which each has a product: those of a term, or of all terms.
  ZOEXT_HD int64_t products() const { return has_shared_right ? rank : terms * rank; }
};

}  // namespace zoext
