// The loops of a factored linear layer: core/factored_linear.h. Included once per instruction set, inside the
// namespace of its lane types.

inline float lanes_sum(Floats a) { return halving_sum(a); }
inline double lanes_sum(Doubles a) {
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) a.v[j] = a.v[j] + a.v[j + half];
  return a.v[0];
}

// The lanes of a product, as packs.
constexpr int product_packs = product_lanes / lanes;

// Rows and vectors at once: as many sums as hide the latency of an addition and fit into registers.
constexpr int rows_at_once = lanes == 16 ? 4 : lanes == 8 ? 3 : 2;
constexpr int vectors_at_once = 2;

template <int rows, int vectors, class Storage, class Sums>
inline __attribute__((always_inline)) void add_lanes(const Storage* row, int64_t row_stride,
                                                     const float* const (&vector)[vectors], int64_t at,
                                                     Sums& sums) {
  using Number = typename Arithmetic<Storage>::type;
  for (int p = 0; p < product_packs; ++p) {
    Pack<Number> b[vectors];
    for (int v = 0; v < vectors; ++v) b[v] = pack_of<Number>(load(vector[v] + at + p * lanes));
    for (int t = 0; t < rows; ++t) {
      const Pack<Number> a = load(row + t * row_stride + at + p * lanes);
      for (int v = 0; v < vectors; ++v) sums[t][v][p] = fused_multiply_add(a, b[v], sums[t][v][p]);
    }
  }
}

// products[t * stride + v] = <row + t * length, vectors[v]>
template <int rows, int vectors, class Storage>
inline __attribute__((always_inline)) void multiply_few(const Storage* row, int64_t length,
                                                        const float* const* vector_list,
                                                        typename Arithmetic<Storage>::type* products,
                                                        int64_t stride) {
  using Number = typename Arithmetic<Storage>::type;
  Pack<Number> sums[rows][vectors][product_packs];
  for (auto& of_row : sums)
    for (auto& of_vector : of_row)
      for (auto& pack : of_vector) pack = fill(Number{0});
  const float* vector[vectors];
  for (int v = 0; v < vectors; ++v) vector[v] = vector_list[v];
  int64_t i = 0;
  for (; i + product_lanes <= length; i += product_lanes) add_lanes<rows>(row, length, vector, i, sums);
  if (i < length) {  // padded with zeros
    Storage few[rows * product_lanes] = {};
    float few_of_vector[vectors][product_lanes] = {};
    const float* padded[vectors];
    const size_t rest = static_cast<size_t>(length - i);
    for (int t = 0; t < rows; ++t)
      std::memcpy(few + t * product_lanes, row + t * length + i, rest * sizeof(Storage));
    for (int v = 0; v < vectors; ++v) {
      std::memcpy(few_of_vector[v], vector[v] + i, rest * sizeof(float));
      padded[v] = few_of_vector[v];
    }
    add_lanes<rows>(few, product_lanes, padded, 0, sums);
  }
  for (int t = 0; t < rows; ++t)
    for (int v = 0; v < vectors; ++v) {
      auto& of = sums[t][v];
      for (int half = product_packs / 2; half > 0; half /= 2)
        for (int p = 0; p < half; ++p) of[p] = of[p] + of[p + half];
      products[t * stride + v] = lanes_sum(of[0]);
    }
}

template <int rows, class Storage>
void multiply_all(const Storage* row, int64_t length, const float* const* vectors, int64_t vectors_count,
                  typename Arithmetic<Storage>::type* products) {
  int64_t v = 0;
  for (; v + vectors_at_once <= vectors_count; v += vectors_at_once)
    multiply_few<rows, vectors_at_once>(row, length, vectors + v, products + v, vectors_count);
  for (; v < vectors_count; ++v) multiply_few<rows, 1>(row, length, vectors + v, products + v, vectors_count);
}

template <class Storage>
void multiply_rows(const Storage* rows, int64_t rows_count, int64_t length, const float* const* vectors,
                   int64_t vectors_count, typename Arithmetic<Storage>::type* products) {
  int64_t t = 0;
  for (; t + rows_at_once <= rows_count; t += rows_at_once)
    multiply_all<rows_at_once>(rows + t * length, length, vectors, vectors_count, products + t * vectors_count);
  for (; t < rows_count; ++t)
    multiply_all<1>(rows + t * length, length, vectors, vectors_count, products + t * vectors_count);
}

template <class Number>
void combine_weights(const float* const* vectors, const float* coefficients, int64_t vectors_count, int64_t length,
                     Number* weights) {
  int64_t i = 0;
  for (; i + lanes <= length; i += lanes) {
    Pack<Number> sum = fill(Number{empty_sum});
    for (int64_t k = 0; k < vectors_count; ++k)
      sum = add_term(fill(Number{coefficients[k]}), pack_of<Number>(load(vectors[k] + i)), sum);
    store(weights + i, sum);
  }
  for (; i < length; ++i) {
    Number sum{empty_sum};
    for (int64_t k = 0; k < vectors_count; ++k) sum = add_term<Number>(coefficients[k], vectors[k][i], sum);
    weights[i] = sum;
  }
}

template <int rows, int packs, class Storage>
inline __attribute__((always_inline)) void add_to_few(Storage* out, int64_t row_stride,
                                                      const typename Arithmetic<Storage>::type* products,
                                                      const typename Arithmetic<Storage>::type* weights,
                                                      int64_t vectors_count) {
  using Number = typename Arithmetic<Storage>::type;
  Pack<Number> sums[rows][packs];
  for (auto& of_row : sums)
    for (auto& pack : of_row) pack = fill(Number{empty_sum});
  for (int64_t v = 0; v < vectors_count; ++v, weights += linear_columns) {
    Pack<Number> weight[packs];
    for (int j = 0; j < packs; ++j) weight[j] = load(weights + j * lanes);
    for (int t = 0; t < rows; ++t) {
      const Pack<Number> product = fill(products[t * vectors_count + v]);
      for (int j = 0; j < packs; ++j) sums[t][j] = fused_multiply_add(product, weight[j], sums[t][j]);
    }
  }
  for (int t = 0; t < rows; ++t)
    for (int j = 0; j < packs; ++j) {
      Storage* const to = out + t * row_stride + j * lanes;
      store(to, load(to) + sums[t][j]);
    }
}

template <int rows, class Storage>
void add_to_rows(Storage* out, int64_t row_stride, int64_t columns,
                 const typename Arithmetic<Storage>::type* products,
                 const typename Arithmetic<Storage>::type* weights, int64_t vectors_count) {
  constexpr int packs = 4;
  int64_t i = 0;
  for (; i + packs * lanes <= columns; i += packs * lanes)
    add_to_few<rows, packs>(out + i, row_stride, products, weights + i, vectors_count);
  for (; i + lanes <= columns; i += lanes)
    add_to_few<rows, 1>(out + i, row_stride, products, weights + i, vectors_count);
  if (i == columns) return;
  Storage few[rows * lanes] = {};
  const size_t rest = static_cast<size_t>(columns - i) * sizeof(Storage);
  for (int t = 0; t < rows; ++t) std::memcpy(few + t * lanes, out + t * row_stride + i, rest);
  add_to_few<rows, 1>(few, lanes, products, weights + i, vectors_count);
  for (int t = 0; t < rows; ++t) std::memcpy(out + t * row_stride + i, few + t * lanes, rest);
}

template <class Storage>
void add_products(Storage* out, int64_t rows_count, int64_t row_stride, int64_t columns,
                  const typename Arithmetic<Storage>::type* products,
                  const typename Arithmetic<Storage>::type* weights, int64_t vectors_count) {
  constexpr int rows = 2;
  int64_t t = 0;
  for (; t + rows <= rows_count; t += rows)
    add_to_rows<rows>(out + t * row_stride, row_stride, columns, products + t * vectors_count, weights,
                      vectors_count);
  if (t < rows_count)
    add_to_rows<1>(out + t * row_stride, row_stride, columns, products + t * vectors_count, weights,
                   vectors_count);
}
