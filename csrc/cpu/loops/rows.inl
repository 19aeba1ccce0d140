// The row loops of one instruction set. Included once per instruction set, inside the namespace of its
// lane types.

// The lanes of a dot product of core/power_iteration.h, as vectors.
constexpr int dot_vectors = dot_lanes / lanes;

struct DotLanes {
  Floats of[dot_vectors];

  inline __attribute__((always_inline)) DotLanes() {
    for (Floats& vector : of) vector = Lanes<Floats>::fill(0.0f);
  }

  // Adds the products of `count` pairs to the first lanes; a whole vector at a time as far as there are.
  inline __attribute__((always_inline)) void add_few(const float* a, const float* b, int64_t count) {
    for (int v = 0; v < dot_vectors; ++v) {
      const int64_t begin = v * lanes, left = count - begin;
      if (left >= lanes) {
        of[v] = fused_multiply_add(load(a + begin), load(b + begin), of[v]);
      } else if (left > 0) {
        float lane[lanes];
        store(lane, of[v]);
        for (int64_t l = 0; l < left; ++l)
          lane[l] = zoext::fused_multiply_add(a[begin + l], b[begin + l], lane[l]);
        of[v] = load(lane);
      }
    }
  }

  inline __attribute__((always_inline)) float sum() {
    for (int half = dot_vectors / 2; half > 0; half /= 2)
      for (int v = 0; v < half; ++v) of[v] = of[v] + of[v + half];
    return halving_sum(of[0]);
  }
};

template <int count>
inline __attribute__((always_inline)) void dot_rows(const float* const* rows, const float* vector, int64_t length,
                                                    float* products) {
  DotLanes sums[count];
  const int64_t whole = length / dot_lanes * dot_lanes;
  for (int64_t i = 0; i < whole; i += dot_lanes)
    for (int v = 0; v < dot_vectors; ++v) {
      const Floats b = load(vector + i + v * lanes);
      for (int t = 0; t < count; ++t)
        sums[t].of[v] = fused_multiply_add(load(rows[t] + i + v * lanes), b, sums[t].of[v]);
    }
  for (int t = 0; t < count; ++t) {
    if (whole < length) sums[t].add_few(rows[t] + whole, vector + whole, length - whole);
    products[t] = sums[t].sum();
  }
}

// As many rows at a time as have eight vectors of sums: enough to hide the latency of an addition.
constexpr int dots_at_once = dot_vectors < 8 ? 8 / dot_vectors : 1;

void dot(const float* const* rows, int count, const float* vector, int64_t length, float* products) {
  int t = 0;
  for (; t + dots_at_once <= count; t += dots_at_once)
    dot_rows<dots_at_once>(rows + t, vector, length, products + t);
  for (; t < count; ++t) dot_rows<1>(rows + t, vector, length, products + t);
}

template <bool first, int count>
inline __attribute__((always_inline)) void add_rows(const float* const* rows, const float* weights, int64_t length,
                                                    float* sum) {
  Floats weight[count];
  for (int t = 0; t < count; ++t) weight[t] = Lanes<Floats>::fill(weights[t]);
  int64_t i = 0;
  for (; i + lanes <= length; i += lanes) {
    Floats total = first ? Lanes<Floats>::fill(0.0f) : load(sum + i);
    for (int t = 0; t < count; ++t) total = fused_multiply_add(weight[t], load(rows[t] + i), total);
    store(sum + i, total);
  }
  for (; i < length; ++i) {
    float total = first ? 0.0f : sum[i];
    for (int t = 0; t < count; ++t) total = zoext::fused_multiply_add(weights[t], rows[t][i], total);
    sum[i] = total;
  }
}

template <bool first>
void combine(const float* const* rows, int count, const float* weights, int64_t length, float* sum) {
  static_assert(most_rows == 4);
  switch (count) {
    case 1: return add_rows<first, 1>(rows, weights, length, sum);
    case 2: return add_rows<first, 2>(rows, weights, length, sum);
    case 3: return add_rows<first, 3>(rows, weights, length, sum);
    case 4: return add_rows<first, 4>(rows, weights, length, sum);
  }
}

constexpr RowLoops row_loops{&dot, &combine<true>, &combine<false>};
