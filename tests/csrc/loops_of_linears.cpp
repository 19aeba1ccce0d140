// The loops of factored linear layers, and those that add directions in memory.
#include <cstdint>
#include <vector>

#include "core/factored_linear.h"
#include "core/storage.h"
#include "loops.h"

namespace zoext {
namespace {

using cpu::InstructionSet;
using cpu::linear_columns;

// A normal as it is stored.
template <class Storage>
Storage stored(uint32_t key, int64_t i) {
  return round_to_nearest<Storage>(core_normal({5, key, 7}, static_cast<uint64_t>(i)));
}

// The product of core/factored_linear.h, as it is described there.
template <class Storage>
auto plain_product(const Storage* row, const float* vector, int64_t length) {
  using Number = typename Arithmetic<Storage>::type;
  Number lane[product_lanes] = {};
  const int64_t padded = (length + product_lanes - 1) / product_lanes * product_lanes;
  for (int64_t i = 0; i < padded; ++i) {
    const Number a = i < length ? widen(row[i]) : 0, b = i < length ? vector[i] : 0;
    lane[i % product_lanes] = fused_multiply_add(a, b, lane[i % product_lanes]);
  }
  for (int half = product_lanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// Vectors of their exact size, so that the sanitizer sees a read beyond the end.
struct Vectors {
  std::vector<std::vector<float>> numbers;
  std::vector<const float*> pointers;

  Vectors(int64_t count, int64_t length) : numbers(count, std::vector<float>(length)) {
    for (int64_t v = 0; v < count; ++v) {
      for (int64_t i = 0; i < length; ++i) numbers[v][i] = core_normal({6, static_cast<uint32_t>(v), 7}, i);
      pointers.push_back(numbers[v].data());
    }
  }
};

template <class Storage>
void products_are_the_cores(const InstructionSet& set, int64_t rows, int64_t length, int64_t count) {
  using Number = typename Arithmetic<Storage>::type;
  std::vector<Storage> input(rows * length);
  for (int64_t i = 0; i < rows * length; ++i) input[i] = stored<Storage>(1, i);
  const Vectors vectors(count, length);
  std::vector<Number> products(rows * count);
  set.storage<Storage>().linear.multiply(input.data(), rows, length, vectors.pointers.data(), count,
                                         products.data());
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t v = 0; v < count; ++v) {
      const Number expected = plain_product(input.data() + t * length, vectors.pointers[v], length);
      CHECK(same(products[t * count + v], expected), "%s: product of row %d and vector %d of %d numbers is %a",
            set.name, int(t), int(v), int(length), double(products[t * count + v]));
    }
}

template <class Storage>
void outputs_are_the_cores(const InstructionSet& set, int64_t rows, int64_t columns, int64_t count) {
  using Number = typename Arithmetic<Storage>::type;
  const auto& loops = set.storage<Storage>().linear;
  const Vectors vectors(count, columns);
  const std::vector<float> coefficients{0.3f, -1.7f, 1e-3f, 2.5f, 0.7f};
  std::vector<Number> weights(count * linear_columns);
  for (int64_t v = 0; v < count; ++v) {
    loops.combine(vectors.pointers.data(), coefficients.data(), v + 1, columns,
                  weights.data() + v * linear_columns);
    for (int64_t i = 0; i < columns; ++i) {
      Number expected{empty_sum};
      for (int64_t k = 0; k <= v; ++k)
        expected = add_term<Number>(coefficients[k], vectors.pointers[k][i], expected);
      CHECK(same(weights[v * linear_columns + i], expected), "%s: weight %d of %d terms", set.name, int(i),
            int(v));
    }
  }
  const int64_t stride = columns + 3;  // the columns of a wider matrix
  std::vector<Storage> out((rows - 1) * stride + columns);
  for (size_t i = 0; i < out.size(); ++i) out[i] = stored<Storage>(2, i);
  const std::vector<Storage> before = out;
  std::vector<Number> products(rows * count);
  for (int64_t i = 0; i < rows * count; ++i) products[i] = core_normal({7, 0, 7}, i);
  loops.add(out.data(), rows, stride, columns, products.data(), weights.data(), count);
  for (int64_t at = 0; at < int64_t(out.size()); ++at) {
    const int64_t t = at / stride, i = at % stride;
    Storage expected = before[at];
    if (i < columns) {
      Number sum{empty_sum};
      for (int64_t v = 0; v < count; ++v)
        sum = fused_multiply_add(products[t * count + v], weights[v * linear_columns + i], sum);
      expected = round_to_nearest<Storage>(widen(expected) + sum);
    }
    CHECK(same(out[at], expected), "%s: output %d of row %d, of %d", set.name, int(i), int(t), int(columns));
  }
}

template <class Number>
void drawn_directions_are_added(const InstructionSet& set) {
  const cpu::DrawnLoops<Number>& loops = set.arithmetic<Number>().drawn;
  const int64_t count = 3 * cpu::tile_alignment;
  std::vector<Number> z(count), sum(count);
  for (int64_t i = 0; i < count; ++i) z[i] = core_normal({8, 0, 7}, i);
  loops.start(z.data(), Number(0.3f), count, sum.data(), cpu::nothing);
  loops.add(z.data(), Number(-1.7f), count, sum.data(), cpu::nothing);
  for (int64_t i = 0; i < count; ++i) {
    const Number first = add_term<Number>(0.3f, z[i], Number{empty_sum});
    CHECK(same(sum[i], add_term<Number>(-1.7f, z[i], first)), "%s: element %d", set.name, int(i));
  }
}

}  // namespace

void linear_layers_are_the_cores(const InstructionSet& set) {
  Storages::for_each([&](auto storage) {
    using Storage = decltype(storage);
    for (int64_t length : {1, 3, 15, 16, 17, 33, 64, 100})
      for (int64_t rows : {1, 2, 3, 4, 7})
        for (int64_t count : {1, 2, 3}) products_are_the_cores<Storage>(set, rows, length, count);
    for (int64_t columns : {1, 5, 8, 16, 31, 64, 67, 256})
      for (int64_t rows : {1, 2, 3})
        for (int64_t count : {1, 2, 5}) outputs_are_the_cores<Storage>(set, rows, columns, count);
  });
  drawn_directions_are_added<float>(set);
  drawn_directions_are_added<double>(set);
}

}  // namespace zoext
