// The operator power_iteration: its schema, its checked arguments, and memory to work in.
#pragma once

#include <optional>
#include <tuple>

#include "../core/power_iteration.h"
#include "checks.h"

namespace zoext::ops {

// An orthonormal basis (float32 [rank, d], one vector a row) of the leading right singular subspace of the rows of
// `input` ([..., d]) that `mask` (bool [...]) counts, and its singular values (float32 [rank]). Vectors beyond the
// rank of the input are zero. Where the input is not finite the basis is zero and the values are NaN.
inline constexpr const char* power_iteration_schema =
    "power_iteration(Tensor input, Tensor? mask, Tensor seed, SymInt rank, SymInt iterations) -> (Tensor, Tensor)";

inline void check_mask(const Tensor& mask, const Tensor& input) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous(),
                  "mask must be a contiguous bool tensor; pass (mask != 0).contiguous()");
  bool same_shape = mask.dim() == input.dim() - 1;
  for (int64_t i = 0; same_shape && i < mask.dim(); ++i) same_shape = mask.size(i) == input.size(i);
  STD_TORCH_CHECK(same_shape, "mask must have the shape of input without its last dimension: ",
                  input.numel() / input.size(input.dim() - 1), " elements, not ", mask.numel());
  STD_TORCH_CHECK(mask.device() == input.device(), "mask must be on the device of input");
}

inline KrylovShape checked_krylov_shape(const Tensor& input, const std::optional<Tensor>& mask, const Tensor& seed,
                                        int64_t rank, int64_t iterations) {
  STD_TORCH_CHECK(input.is_contiguous(), "input is not contiguous; pass input.contiguous()");
  STD_TORCH_CHECK(is_storage(input.scalar_type()), "input must be float32, float64, bfloat16 or float16");
  STD_TORCH_CHECK(input.dim() >= 1 && input.size(input.dim() - 1) >= 1,
                  "input must have a last dimension of at least one feature");
  const int64_t features = input.size(input.dim() - 1);
  STD_TORCH_CHECK(rank >= 1 && rank <= features, "rank must be in 1 .. ", features,
                  ", the number of features of input, not ", rank);
  STD_TORCH_CHECK(iterations >= 0, "iterations must be at least 0, not ", iterations);
  check_scalar("seed", seed, ScalarType::Long, input);
  if (mask) check_mask(*mask, input);
  return KrylovShape::of(input.numel() / features, features, rank, iterations);
}

// The intermediate results of core/power_iteration.h, from the device's own allocator.
class KrylovWorkspace {
 public:
  KrylovWorkspace(const KrylovShape& shape, const Tensor& like) {
    const int64_t vectors = shape.vectors();
    const int64_t sizes[] = {vectors * shape.features,
                             vectors * shape.tokens,
                             shape.chunks() * shape.rank * shape.features,
                             shape.rank * vectors,
                             vectors,
                             1};
    float** const parts[] = {&basis, &products, &partials, &coefficients, &projections, &scale};
    int64_t total = 0;
    for (const int64_t size : sizes) total += aligned(size);
    floats_ = torch::stable::new_empty(like, {total}, ScalarType::Float);
    doubles_ = torch::stable::new_empty(like, {Eigenproblem::doubles(vectors)}, ScalarType::Double);
    float* next = static_cast<float*>(floats_.mutable_data_ptr());
    for (int part = 0; part < 6; ++part) {
      *parts[part] = next;
      next += aligned(sizes[part]);
    }
    gram = Eigenproblem::in(static_cast<double*>(doubles_.mutable_data_ptr()), vectors);
  }

  float* basis;         // Q: vectors x features
  float* products;      // Y: vectors x tokens; its first block holds Omega before
  float* partials;      // of a block of Q, for every chunk of tokens: chunks x rank x features
  float* coefficients;  // C: rank x vectors
  float* projections;   // of one vector on the others
  float* scale;         // one number
  Eigenproblem gram;    // Y Y^T

 private:
  static int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }  // to a cache line
  Tensor floats_, doubles_;
};

// What a kernel reads, writes and works in.
struct PowerIteration {
  KrylovShape shape;
  const Tensor& input;
  const std::optional<Tensor>& mask;
  const Tensor& seed;
  KrylovWorkspace workspace;
  Tensor basis, values;
};

template <void (*kernel)(PowerIteration&)>
std::tuple<Tensor, Tensor> power_iteration(Tensor input, std::optional<Tensor> mask, Tensor seed, int64_t rank,
                                           int64_t iterations) {
  const KrylovShape shape = checked_krylov_shape(input, mask, seed, rank, iterations);
  PowerIteration arguments{shape,
                           input,
                           mask,
                           seed,
                           KrylovWorkspace(shape, input),
                           torch::stable::new_empty(input, {rank, shape.features}, ScalarType::Float),
                           torch::stable::new_empty(input, {rank}, ScalarType::Float)};
  kernel(arguments);
  return {arguments.basis, arguments.values};
}

}  // namespace zoext::ops
