// Which instructions this processor has, and the loops compiled for them.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "../../core/combine.h"
#include "../../core/factored_linear.h"
#include "../../core/power_iteration.h"
#include "../../core/rules.h"
#include "../../core/sign.h"
#include "../../core/storage.h"

namespace zoext::cpu {

constexpr int tile_alignment = 256;  // a power of two: whole groups of Philox blocks
constexpr int tile_elements = 1024;  // of a tile whose first index is aligned

// Weights that are needed next. They are prefetched line by line while noise is computed: noise is bound by
// arithmetic and weights by memory, and a burst of prefetches would only move the wait for memory elsewhere.
struct Upcoming {
  const char* read;   // where they are, or null
  const char* write;  // where they go, if that is another place, else null
  int64_t bytes_per_element;
  const char* residuals;  // a byte an element, or null

  ZOEXT_HD void prefetch(int64_t element, int64_t count) const {
    constexpr int64_t line = 64;
    const int64_t begin = element * bytes_per_element, end = begin + count * bytes_per_element;
    if (read)
      for (int64_t at = begin; at < end; at += line) __builtin_prefetch(read + at, 0, 3);
    if (write)
      for (int64_t at = begin; at < end; at += line) __builtin_prefetch(write + at, 1, 3);
    if (residuals)
      for (int64_t at = element; at < element + count; at += line) __builtin_prefetch(residuals + at, 0, 3);
  }
};

constexpr Upcoming nothing{nullptr, nullptr, 0, nullptr};

// A term that contributes to a combination; `number` is its place in the operator's list of terms.
struct Term {
  int64_t number;
  uint64_t seed;
  float coefficient;
};

// A step that contributes to a window; `number` is its row in the operator's history. Arguments of loops are plain
// pointers, since no function of the standard library may be compiled for one instruction set.
struct Step {
  int64_t number;
  float first_weight, second_weight;
  const Term* terms;
  int64_t count;
};

// Whether the estimate of a step enters the moments of elements: there is no need to draw one whose weight is
// zero, unless the rule squares it.
ZOEXT_HD bool enters_moments(SecondMoment second_moment, const Step& step) {
  return second_moment == SecondMoment::elements || contributes(step.first_weight);
}

// The factors of a matrix of rows x columns, and how far it is from those of a term to the next one's.
struct Factors {
  const float *left, *right;
  int64_t rows, columns, rank, left_stride, right_stride;
};

// A direction over an aligned stretch of a parameter: `start` sets sum to coefficient * direction,
// `add` adds it.
template <class Number>
struct DirectionLoops {
  using Loop = void (*)(const Field&, Number coefficient, uint64_t index, int64_t count, Number* sum, Upcoming);
  Loop start, add;
};

// A direction that lies in memory: `start` sets sum to coefficient * z, `add` adds it. `count` is that of an
// aligned stretch.
template <class Number>
struct DrawnLoops {
  using Loop = void (*)(const Number* z, Number coefficient, int64_t count, Number* sum, Upcoming);
  Loop start, add;
};

// An estimate that lies in memory, with its weights in a window.
template <class Number>
struct Estimate {
  const Number* g;
  Number first_weight, second_weight;
};

// What the moves of all elements have in common. `shared_v` is the second moment of a rule that has one for all
// elements, else zero.
template <class Number>
struct Scale {
  Number minus_lr, eps, shared_v;
};

constexpr int widest_pack = 16;  // lanes of the widest instruction set

// Over elements from, from + 1, ... of a matrix. The last pack is written whole: up to `widest_pack` - 1
// numbers beyond the last element.
template <class Number>
struct FactoredLoops {
  void (*combine)(const Factors&, const Term* terms, int64_t terms_count, int64_t from, int64_t count, Number* sum,
                  Upcoming);
};

// The windows of one rule, over as many numbers as an aligned stretch has. `v` is neither read nor written by
// rules that have none for each element.
template <class Number>
struct RuleLoops {
  SecondMoment second_moment;
  // m and v take in the step that has one term.
  using AddTerm = void (*)(const Field&, Number coefficient, Number first_weight, Number second_weight,
                           uint64_t index, int64_t count, Number* m, Number* v, Upcoming);
  AddTerm add_normals, add_signs;
  void (*add_estimate)(const Estimate<Number>&, int64_t count, Number* m, Number* v);
  void (*move)(Scale<Number>, const Number* m, const Number* v, int64_t count, Number* change);
  // All of it at once: for estimates in memory, and for entries of a matrix, as those of `FactoredLoops`.
  void (*move_estimates)(const Estimate<Number>* estimates, int64_t estimates_count, Scale<Number>, int64_t count,
                         Number* change);
  void (*move_factored)(const Factors&, const Step* steps, int64_t steps_count, Scale<Number>, int64_t from,
                        int64_t count, Number* change, Upcoming);
};

template <class Number>
struct ArithmeticLoops {
  DirectionLoops<Number> normals, signs;
  DrawnLoops<Number> drawn;
  FactoredLoops<Number> factored;
  RuleLoops<Number> rules[Rules::count];
};

// The steps of core/factored_linear.h on a few rows of activations.
template <class Storage>
struct LinearLoops {
  using Number = typename Arithmetic<Storage>::type;
  // products[t, v] = <rows[t], vectors[v]>, for rows that follow one another
  void (*multiply)(const Storage* rows, int64_t rows_count, int64_t length, const float* const* vectors,
                   int64_t vectors_count, Number* products);
  // weights[i] = sum_k coefficients[k] vectors[k][i]
  void (*combine)(const float* const* vectors, const float* coefficients, int64_t vectors_count, int64_t length,
                  Number* weights);
  // out[t, i] = round(out[t, i] + sum_v products[t, v] weights[v, i]) for `columns` columns of rows that are
  // `row_stride` apart. A row of weights has `linear_columns` numbers, of which those in the last pack that has
  // columns are read.
  void (*add)(Storage* out, int64_t rows_count, int64_t row_stride, int64_t columns, const Number* products,
              const Number* weights, int64_t vectors_count);
};

constexpr int64_t linear_columns = 256;  // of a call of these loops: a row of weights is a kibibyte

// `displace` is out = round(theta + (sum - decay theta)).
template <class Storage>
struct StorageLoops {
  using Number = typename Arithmetic<Storage>::type;
  void (*displace)(Storage* out, const Storage* theta, const Number* sum, Number decay, int64_t count);
  void (*write)(Storage* out, const Number* sum, int64_t count);
  void (*to_fp32)(const Storage* from, int64_t count, float* out);
  LinearLoops<Storage> linear;
};

// The loops of storage types that round: also with 16 random bits per element, or with residuals.
template <class Storage>
struct RoundedLoops : StorageLoops<Storage> {
  void (*displace_stochastically)(Storage* out, const Storage* theta, const float* sum, float decay, int64_t count,
                                  const uint16_t* random);
  void (*displace_split)(Storage* theta, int8_t* residuals, const float* sum, float decay, int64_t count);
};

constexpr int most_rows = 4;  // of a call of these loops

// Rows of `length` numbers each, and a vector of that length; sums in the order of core/power_iteration.h.
struct RowLoops {
  // products[t] = <rows[t], vector>
  void (*dot)(const float* const* rows, int count, const float* vector, int64_t length, float* products);
  // sum = weights[0] rows[0] + weights[1] rows[1] + ..., or that added to the sum
  void (*start)(const float* const* rows, int count, const float* weights, int64_t length, float* sum);
  void (*add)(const float* const* rows, int count, const float* weights, int64_t length, float* sum);
};

struct InstructionSet {
  const char* name;
  // 16 for each of at most `tile_elements` elements.
  void (*rounding_bits)(const Field&, uint64_t index, int64_t count, uint16_t* out);
  ArithmeticLoops<float> fp32;
  ArithmeticLoops<double> fp64;
  StorageLoops<float> float32;
  StorageLoops<double> float64;
  RoundedLoops<BFloat16> bfloat16;
  RoundedLoops<Half> float16;
  RowLoops rows;

  template <class Number>
  const ArithmeticLoops<Number>& arithmetic() const {
    if constexpr (std::is_same_v<Number, float>)
      return fp32;
    else
      return fp64;
  }

  template <class Storage>
  const auto& storage() const {
    if constexpr (std::is_same_v<Storage, float>)
      return float32;
    else if constexpr (std::is_same_v<Storage, double>)
      return float64;
    else if constexpr (std::is_same_v<Storage, BFloat16>)
      return bfloat16;
    else
      return float16;
  }
};

// The set in use: the best the processor has, unless ZOEXT_ISA or `use_instruction_set` chose another.
const InstructionSet& instruction_set();

// What this build and this processor can run, best first.
std::vector<std::string> available_instruction_sets();

// Throws std::invalid_argument for a set that is not available. Not to be called during an operator.
void use_instruction_set(const std::string& name);

}  // namespace zoext::cpu
