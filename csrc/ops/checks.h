// Checks of single arguments. Errors name the argument, its value and the remedy.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "../core/rules.h"
#include "../core/span.h"
#include "../core/storage.h"
#include "../core/stream.h"

namespace zoext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor's place in the noise field.
struct Place {
  uint32_t key;
  Span span;
};

// Calls f(Storage{}) with the storage type of a checked tensor.
template <class F>
void for_storage(ScalarType type, F f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: return f(Half{});
  }
}

}  // namespace zoext

namespace zoext::ops {

inline bool is_storage(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline bool rounds(ScalarType type) {
  bool result = false;
  for_storage(type, [&](auto storage) { result = can_round<decltype(storage)>; });
  return result;
}

inline void check_tensors(const char* name, const std::vector<Tensor>& tensors) {
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Tensor& tensor = tensors[t];
    STD_TORCH_CHECK(tensor.is_contiguous(), name, "[", t, "] is not contiguous; pass tensor.contiguous()");
    STD_TORCH_CHECK(is_storage(tensor.scalar_type()), name, "[", t,
                    "] must be float32, float64, bfloat16 or float16");
    STD_TORCH_CHECK(tensor.device() == tensors[0].device(), name, "[", t, "] is on another device than ", name,
                    "[0]; call the operator once per device");
  }
}

// The terms of a step, [K], or of several, [steps, K].
inline void check_terms(const Tensor& seeds, const Tensor& coefficients, const Tensor& like, int64_t dimensions) {
  STD_TORCH_CHECK(seeds.dim() == dimensions && seeds.scalar_type() == ScalarType::Long && seeds.is_contiguous(),
                  "seeds must be a contiguous int64 tensor of ",
                  dimensions == 1 ? "one dimension" : "two dimensions: steps and terms of a step");
  STD_TORCH_CHECK(coefficients.dim() == dimensions && coefficients.scalar_type() == ScalarType::Float &&
                      coefficients.is_contiguous() && coefficients.numel() == seeds.numel() &&
                      coefficients.size(0) == seeds.size(0),
                  "coefficients must be a contiguous float32 tensor with one element per seed");
  STD_TORCH_CHECK(seeds.device() == like.device() && coefficients.device() == like.device(),
                  "seeds and coefficients must be on the device of the parameters");
}

// The directions of several copies, [K].
inline void check_seeds(const Tensor& seeds, const Tensor& like) {
  STD_TORCH_CHECK(seeds.dim() == 1 && seeds.scalar_type() == ScalarType::Long && seeds.is_contiguous(),
                  "seeds must be a contiguous int64 tensor of one dimension, not of ", seeds.dim());
  STD_TORCH_CHECK(seeds.device() == like.device(), "seeds must be on the device of the parameters");
}

// The coefficients of several copies, [copies, terms].
inline void check_coefficients_of_copies(const Tensor& coefficients, int64_t terms, const Tensor& like) {
  STD_TORCH_CHECK(
      coefficients.dim() == 2 && coefficients.scalar_type() == ScalarType::Float && coefficients.is_contiguous(),
      "coefficients must be a contiguous float32 tensor of two dimensions: copies and terms of a copy");
  STD_TORCH_CHECK(coefficients.size(1) == terms, "coefficients must have a column for each of ", terms,
                  " terms, not ", coefficients.size(1));
  STD_TORCH_CHECK(coefficients.device() == like.device(),
                  "coefficients must be on the device of the other tensors");
}

inline void check_scalar(const char* name, const Tensor& scalar, ScalarType type, const Tensor& like) {
  STD_TORCH_CHECK(scalar.numel() == 1 && scalar.scalar_type() == type, name, " must hold one ",
                  type == ScalarType::Long ? "int64" : "float32", " number");
  STD_TORCH_CHECK(scalar.device() == like.device(), name, " must be on the device of the parameters");
}

// A float32 number for each of `steps` steps.
inline void check_per_step(const char* name, const Tensor& numbers, int64_t steps, const Tensor& like) {
  STD_TORCH_CHECK(
      numbers.numel() == steps && numbers.scalar_type() == ScalarType::Float && numbers.is_contiguous(), name,
      " must be a contiguous float32 tensor of one number for each step, ", steps, ", not of ", numbers.numel());
  STD_TORCH_CHECK(numbers.device() == like.device(), name, " must be on the device of the parameters");
}

// The weights of windows of H steps, [H] for one or [S, H] for S of them, over a history of S + H - 1 `rows`.
inline void check_window_weights(const Tensor& first_weights, const Tensor& second_weights, int64_t rows,
                                 const Tensor& like) {
  const bool is_one = first_weights.dim() != 2;
  const int64_t steps = is_one ? 1 : first_weights.size(0), horizon = rows - steps + 1;
  for (const Tensor* weights : {&first_weights, &second_weights}) {
    STD_TORCH_CHECK(weights->dim() == (is_one ? 1 : 2) && weights->scalar_type() == ScalarType::Float &&
                        weights->is_contiguous() && weights->size(0) == (is_one ? horizon : steps) &&
                        weights->numel() == steps * horizon,
                    "first_weights and second_weights must be contiguous float32 tensors with one element per "
                    "step of a window, ",
                    is_one ? "" : "a row for each window, ", "which has ", horizon, " of ", rows, " steps");
    STD_TORCH_CHECK(weights->device() == like.device(),
                    "seeds, coefficients and weights must be on the device of the parameters");
  }
}

// The factors of matrices: float32 [terms or 1, rank, rows] and [terms or 1, rank, columns].
inline void check_factors(const std::vector<Tensor>& theta, const std::vector<Tensor>& left,
                          const std::vector<Tensor>& right, int64_t terms) {
  STD_TORCH_CHECK(left.size() == theta.size() && right.size() == theta.size(),
                  "left and right must have one tensor per matrix; there are ", theta.size(), " matrices, ",
                  left.size(), " left and ", right.size(), " right factors");
  for (size_t t = 0; t < theta.size(); ++t) {
    for (const Tensor* factor : {&left[t], &right[t]}) {
      const char* name = factor == &left[t] ? "left" : "right";
      STD_TORCH_CHECK(factor->dim() == 3 && factor->scalar_type() == ScalarType::Float && factor->is_contiguous(),
                      name, "[", t,
                      "] must be a contiguous float32 tensor of three dimensions: terms, rank, length");
      STD_TORCH_CHECK(factor->size(0) == terms || factor->size(0) == 1, name, "[", t,
                      "] must have a factor for each of ", terms, " terms, or one for all, not ", factor->size(0));
      STD_TORCH_CHECK(factor->device() == theta[0].device(), name, "[", t,
                      "] must be on the device of the parameters");
    }
    STD_TORCH_CHECK(left[t].size(1) == right[t].size(1), "left[", t, "] and right[", t,
                    "] must have one rank, not ", left[t].size(1), " and ", right[t].size(1));
    int64_t elements;
    STD_TORCH_CHECK(
        !__builtin_mul_overflow(left[t].size(2), right[t].size(2), &elements) && elements == theta[t].numel(),
        "theta[", t, "] has ", theta[t].numel(), " elements, but its factors are those of a matrix of ",
        left[t].size(2), " x ", right[t].size(2));
  }
}

inline Distribution checked_distribution(int64_t distribution) {
  STD_TORCH_CHECK(distribution == 0 || distribution == 1, "distribution must be 0 (normal) or 1 (sign), not ",
                  distribution);
  return static_cast<Distribution>(distribution);
}

// "0 (adam), 1 (sign), ..."
template <class... Functors>
std::string numbered_names(RuleList<Functors...> rules) {
  std::string names;
  for (int rule = 0; rule < rules.count; ++rule)
    names += (rule ? ", " : "") + std::to_string(rule) + " (" + rules.names[rule] + ")";
  return names;
}

inline int checked_rule(int64_t rule) {
  STD_TORCH_CHECK(rule >= 0 && rule < Rules::count, "rule must be one of ", numbered_names(Rules{}), ", not ",
                  rule);
  return static_cast<int>(rule);
}

// Of a copy.
inline Rounding checked_rounding(int64_t rounding) {
  STD_TORCH_CHECK(rounding == 0 || rounding == 1, "rounding must be 0 (nearest) or 1 (stochastic), not ",
                  rounding);
  return static_cast<Rounding>(rounding);
}

// Of what moves theta.
inline Rounding checked_rounding(int64_t rounding, const std::vector<Tensor>& theta,
                                 const std::vector<Tensor>& residuals) {
  STD_TORCH_CHECK(rounding >= 0 && rounding <= 2,
                  "rounding must be 0 (nearest), 1 (stochastic) or 2 (with residuals), not ", rounding);
  const auto how = static_cast<Rounding>(rounding);
  STD_TORCH_CHECK(residuals.size() == (how == Rounding::residual ? theta.size() : 0),
                  "residuals must have one tensor per tensor of theta with rounding 2, else none; there are ",
                  residuals.size(), " with rounding ", rounding);
  for (size_t t = 0; t < residuals.size(); ++t) {
    const bool is_rounded = rounds(theta[t].scalar_type());
    STD_TORCH_CHECK(residuals[t].scalar_type() == ScalarType::Char && residuals[t].is_contiguous() &&
                        residuals[t].numel() == (is_rounded ? theta[t].numel() : 0) &&
                        residuals[t].device() == theta[t].device(),
                    "residuals[", t, "] must be a contiguous int8 tensor on the device of theta[", t, "] with ",
                    is_rounded ? theta[t].numel() : 0, " elements");
  }
  return how;
}

// Whether no index of `count` local elements leaves the range of int64.
inline bool fits(const Span& span, int64_t count) {
  if (count == 0) return true;
  int64_t last_run, last;
  return !__builtin_mul_overflow((count - 1) / span.run, span.stride, &last_run) &&
         !__builtin_add_overflow(span.base, last_run, &last) &&
         !__builtin_add_overflow(last, (span.run < count ? span.run : count) - 1, &last);
}

inline std::vector<Place> checked_places(const std::vector<Tensor>& tensors, const std::vector<int64_t>& keys,
                                         const std::vector<int64_t>& spans) {
  STD_TORCH_CHECK(keys.size() == tensors.size() && spans.size() == 3 * tensors.size(),
                  "keys must have one and spans three numbers per tensor; there are ", tensors.size(),
                  " tensors, ", keys.size(), " keys and ", spans.size(), " span numbers");
  std::vector<Place> places;
  places.reserve(tensors.size());
  for (size_t t = 0; t < tensors.size(); ++t) {
    STD_TORCH_CHECK(keys[t] >= 0 && keys[t] <= 0xffffffffLL, "keys[", t, "] must be in 0 .. 2^32 - 1, not ",
                    keys[t]);
    const Span span{spans[3 * t], spans[3 * t + 1], spans[3 * t + 2]};
    STD_TORCH_CHECK(span.base >= 0 && span.run >= 1 && span.stride >= 0, "spans[", t,
                    "] must have base >= 0, run >= 1 and stride >= 0, not (", span.base, ", ", span.run, ", ",
                    span.stride, ")");
    STD_TORCH_CHECK(fits(span, tensors[t].numel()), "spans[", t, "] must end below 2^63, but starts at ",
                    span.base, " with stride ", span.stride, " over ", tensors[t].numel(), " elements");
    places.push_back({static_cast<uint32_t>(keys[t]), span});
  }
  return places;
}

// Whether two tensors of one size share memory, but not all of it.
inline bool overlap_in_part(const Tensor& a, const Tensor& b) {
  const auto first = reinterpret_cast<uintptr_t>(a.const_data_ptr());
  const auto second = reinterpret_cast<uintptr_t>(b.const_data_ptr());
  const auto bytes = static_cast<uintptr_t>(a.numel()) * a.element_size();
  return first != second && (first < second ? second - first : first - second) < bytes;
}

inline void check_copy(const std::vector<Tensor>& out, const std::vector<Tensor>& theta) {
  STD_TORCH_CHECK(out.size() == theta.size(), "out and theta must be lists of one length, not ", out.size(),
                  " and ", theta.size());
  for (size_t t = 0; t < out.size(); ++t) {
    STD_TORCH_CHECK(out[t].numel() == theta[t].numel() && out[t].scalar_type() == theta[t].scalar_type() &&
                        out[t].device() == theta[t].device(),
                    "out[", t, "] must have the size, the dtype and the device of theta[", t, "]");
    STD_TORCH_CHECK(!overlap_in_part(out[t], theta[t]), "out[", t, "] must be theta[", t,
                    "] itself or lie apart from it, but they share a part of their memory");
  }
}

// Whether two tensors share any memory.
inline bool overlap(const Tensor& a, const Tensor& b) {
  const auto first = reinterpret_cast<uintptr_t>(a.const_data_ptr());
  const auto second = reinterpret_cast<uintptr_t>(b.const_data_ptr());
  return first < second + static_cast<uintptr_t>(b.numel()) * b.element_size() &&
         second < first + static_cast<uintptr_t>(a.numel()) * a.element_size();
}

inline std::string shape_of(const Tensor& tensor) {
  std::string shape = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) shape += (i ? ", " : "") + std::to_string(tensor.size(i));
  return shape + "]";
}

inline void check_copies(const std::vector<Tensor>& out, const std::vector<Tensor>& theta, int64_t copies) {
  STD_TORCH_CHECK(out.size() == theta.size(), "out and theta must be lists of one length, not ", out.size(),
                  " and ", theta.size());
  for (size_t t = 0; t < out.size(); ++t) {
    bool is_stack = out[t].dim() == theta[t].dim() + 1 && out[t].size(0) == copies;
    for (int64_t i = 0; is_stack && i < theta[t].dim(); ++i) is_stack = out[t].size(i + 1) == theta[t].size(i);
    STD_TORCH_CHECK(is_stack, "out[", t, "] must have a copy of theta[", t, "] for each row of coefficients, ",
                    copies, " of shape ", shape_of(theta[t]), ", not the shape ", shape_of(out[t]));
    STD_TORCH_CHECK(out[t].scalar_type() == theta[t].scalar_type() && out[t].device() == theta[t].device(), "out[",
                    t, "] must have the dtype and the device of theta[", t, "]");
    STD_TORCH_CHECK(!overlap(out[t], theta[t]), "out[", t, "] and theta[", t,
                    "] share memory; pass tensors that lie apart");
  }
}

}  // namespace zoext::ops
