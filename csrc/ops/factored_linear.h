// The operator factored_linear_: its schema and its checked arguments.
#pragma once

#include "../core/factored_linear.h"
#include "checks.h"

namespace zoext::ops {

// out[c] += sum_k coefficients[c, k] (input[c] right_k^T) left_k, for out [C, T, m], input [C, T, n], left float32
// [K or 1, r, m], right float32 [K or 1, r, n] and coefficients float32 [C, K].
inline constexpr const char* factored_linear_schema =
    "factored_linear_(Tensor(a!) out, Tensor input, Tensor left, Tensor right, Tensor coefficients) -> ()";

struct FactoredLinear {
  Tensor out, input, left, right, coefficients;
  FactoredLinearShape shape;
};

inline void check_activations(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must have three dimensions: copies, rows and ",
                  name[0] == 'o' ? "outputs" : "features", ", not the shape ", shape_of(tensor),
                  "; pass tensor.reshape(copies, -1, tensor.shape[-1])");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous; pass tensor.contiguous()");
  STD_TORCH_CHECK(is_storage(tensor.scalar_type()), name, " must be float32, float64, bfloat16 or float16");
}

// Of `terms` terms, or one that all share, on the side of the layer that has `length` numbers.
inline void check_side(const char* name, const Tensor& factor, int64_t terms, int64_t length, const Tensor& out) {
  STD_TORCH_CHECK(factor.dim() == 3 && factor.scalar_type() == ScalarType::Float && factor.is_contiguous(), name,
                  " must be a contiguous float32 tensor of three dimensions: terms, rank, length; its shape is ",
                  shape_of(factor));
  STD_TORCH_CHECK(factor.size(0) == terms || factor.size(0) == 1, name, " must have a factor for each of ", terms,
                  " columns of coefficients, or one for all, not ", factor.size(0));
  STD_TORCH_CHECK(factor.size(1) >= 1, name, " must have a rank of at least 1, not the shape ", shape_of(factor));
  STD_TORCH_CHECK(factor.size(2) == length, name, " must have as many numbers as the layer has ",
                  name[0] == 'l' ? "outputs, " : "features, ", length, ", not ", factor.size(2));
  STD_TORCH_CHECK(factor.device() == out.device(), name, " must be on the device of out");
}

inline FactoredLinearShape checked_factored_linear(const Tensor& out, const Tensor& input, const Tensor& left,
                                                   const Tensor& right, const Tensor& coefficients) {
  check_activations("out", out);
  check_activations("input", input);
  STD_TORCH_CHECK(input.scalar_type() == out.scalar_type() && input.device() == out.device(),
                  "input must have the dtype and the device of out");
  STD_TORCH_CHECK(input.size(0) == out.size(0) && input.size(1) == out.size(1),
                  "input and out must have the same copies and rows, not the shapes ", shape_of(input), " and ",
                  shape_of(out));
  const int64_t terms = coefficients.dim() == 2 ? coefficients.size(1) : 0;
  check_coefficients_of_copies(coefficients, terms, out);
  STD_TORCH_CHECK(coefficients.size(0) == out.size(0), "coefficients must have a row for each of ", out.size(0),
                  " copies of out, not ", coefficients.size(0));
  check_side("left", left, terms, out.size(2), out);
  check_side("right", right, terms, input.size(2), out);
  STD_TORCH_CHECK(left.size(1) == right.size(1), "left and right must have one rank, not ", left.size(1), " and ",
                  right.size(1));
  const struct {
    const char* name;
    const Tensor& tensor;
  } read[] = {{"input", input}, {"left", left}, {"right", right}, {"coefficients", coefficients}};
  for (const auto& [name, tensor] : read)
    STD_TORCH_CHECK(!overlap(out, tensor), "out and ", name, " share memory; pass an out that lies apart");
  return {out.size(0), out.size(1),  input.size(2),     out.size(2),
          terms,       left.size(1), left.size(0) == 1, right.size(0) == 1};
}

template <void (*kernel)(const FactoredLinear&)>
void factored_linear_(Tensor out, Tensor input, Tensor left, Tensor right, Tensor coefficients) {
  const FactoredLinearShape shape = checked_factored_linear(out, input, left, right, coefficients);
  if (out.numel() > 0 && shape.terms > 0) kernel({out, input, left, right, coefficients, shape});
}

}  // namespace zoext::ops
