// The power iteration on the CPU: threads divide the chunks of tokens. The rows of a chunk come from
// memory once in an iteration, a few at a time: while they are in the first-level cache they are
// multiplied with the vectors of the last block and added to those of the next.
#include "../../ops/power_iteration.h"

#include <algorithm>
#include <memory>

#include "../loops/vectors.h"
#include "tiles.h"

namespace zoext::cpu {
namespace {

// The tokens that count, as rows of float32.
template <class Storage>
struct Tokens {
  const InstructionSet& set;
  const Storage* input;
  const bool* mask;  // or null
  int64_t count, features;

  // f(rows) for every few of the rows [begin, end) that count, in order.
  template <class F>
  void for_each_few(int64_t begin, int64_t end, F f) const {
    constexpr bool is_single = std::is_same_v<Storage, float>;
    const std::unique_ptr<float[]> converted(is_single ? nullptr : new float[most_rows * features]);
    Rows rows{};
    for (int64_t t = begin; t < end; ++t) {
      if (mask && !mask[t]) continue;
      const Storage* const row = input + t * features;
      if constexpr (is_single) {
        rows.of[rows.count] = row;
      } else {
        float* const single = converted.get() + rows.count * features;
        set.storage<Storage>().to_fp32(row, features, single);
        rows.of[rows.count] = single;
      }
      rows.token[rows.count++] = t;
      if (rows.count < most_rows) continue;
      f(rows);
      rows.count = 0;
    }
    if (rows.count > 0) f(rows);
  }
};

// One call of the operator.
template <class Storage>
class BlockKrylov {
 public:
  BlockKrylov(const KrylovShape& shape, const ops::KrylovWorkspace& workspace, const Tokens<Storage>& tokens)
      : shape_(shape), work_(workspace), tokens_(tokens), set_(tokens.set) {}

  void run(uint64_t seed, float* basis, float* values) const {
    const IeeeArithmetic ieee;
    for_each_chunk([&](int64_t begin, int64_t end) {
      draw(seed, begin, end);
      add_rows(begin, end);
    });
    for (int64_t block = 0; block < shape_.blocks; ++block) {
      finish_block(block);
      const bool is_last = block + 1 == shape_.blocks;
      for_each_chunk([&](int64_t begin, int64_t end) { multiply_rows(block, begin, end, !is_last); });
    }
    multiply_products();
    solve_ritz(OneThread{}, work_.gram, shape_.rank, *work_.scale, work_.coefficients, values);
    for (int64_t q = 0; q < shape_.rank; ++q) write_vector(q, values[q], basis);
  }

 private:
  // f(begin, end) for every chunk of tokens, in parallel.
  template <class F>
  void for_each_chunk(F f) const {
    constexpr int64_t worth_a_thread = 1 << 15;  // products
    const int64_t products = chunk_tokens * shape_.features * shape_.rank;
    torch::stable::parallel_for(0, shape_.chunks(), (worth_a_thread + products - 1) / products,
                                [&](int64_t first, int64_t last) {
                                  const IeeeArithmetic ieee;
                                  for (int64_t chunk = first; chunk < last; ++chunk)
                                    f(chunk * chunk_tokens, std::min((chunk + 1) * chunk_tokens, shape_.tokens));
                                });
  }

  // Omega, in the place of the first block of Y.
  void draw(uint64_t seed, int64_t begin, int64_t end) const {
    const Field field{seed, 0, static_cast<uint32_t>(Stream::power_iteration)};
    const int64_t first = begin * shape_.rank, last = end * shape_.rank;
    alignas(64) float normals[tile_alignment];
    for (int64_t at = first / tile_alignment * tile_alignment; at < last; at += tile_alignment) {
      set_.fp32.normals.start(field, 1.0f, static_cast<uint64_t>(at), tile_alignment, normals, nothing);
      for (int64_t i = std::max(at, first); i < std::min(at + tile_alignment, last); ++i)
        work_.products[i % shape_.rank * shape_.tokens + i / shape_.rank] = normals[i - at];
    }
  }

  float* partial(int64_t begin) const {
    return work_.partials + begin / chunk_tokens * shape_.rank * shape_.features;
  }

  // The chunk's part of Omega^T X.
  void add_rows(int64_t begin, int64_t end) const {
    bool first = true;
    tokens_.for_each_few(begin, end, [&](const Rows& rows) {
      for (int64_t q = 0; q < shape_.rank; ++q) {
        float weights[most_rows];
        for (int t = 0; t < rows.count; ++t) weights[t] = work_.products[q * shape_.tokens + rows.token[t]];
        add_to_partial(rows, weights, first, partial(begin) + q * shape_.features);
      }
      first = false;
    });
    if (first) std::fill_n(partial(begin), shape_.rank * shape_.features, 0.0f);
  }

  // The chunk's columns of Y for a block, and its part of the next block of Q.
  void multiply_rows(int64_t block, int64_t begin, int64_t end, bool adds) const {
    const float* const vectors = work_.basis + block * shape_.rank * shape_.features;
    float* const products = work_.products + block * shape_.rank * shape_.tokens;
    if (tokens_.mask)
      for (int64_t q = 0; q < shape_.rank; ++q)
        std::fill(products + q * shape_.tokens + begin, products + q * shape_.tokens + end, 0.0f);
    bool first = true;
    tokens_.for_each_few(begin, end, [&](const Rows& rows) {
      for (int64_t q = 0; q < shape_.rank; ++q) {
        float weights[most_rows];
        set_.rows.dot(rows.of, rows.count, vectors + q * shape_.features, shape_.features, weights);
        for (int t = 0; t < rows.count; ++t) {
          weights[t] = multiply(weights[t], *work_.scale);
          products[q * shape_.tokens + rows.token[t]] = weights[t];
        }
        if (adds) add_to_partial(rows, weights, first, partial(begin) + q * shape_.features);
      }
      first = false;
    });
    if (adds && first) std::fill_n(partial(begin), shape_.rank * shape_.features, 0.0f);
  }

  void add_to_partial(const Rows& rows, const float* weights, bool first, float* sum) const {
    (first ? set_.rows.start : set_.rows.add)(rows.of, rows.count, weights, shape_.features, sum);
  }

  // A block of Q from the parts of all chunks.
  void finish_block(int64_t block) const {
    const int64_t count = shape_.rank * shape_.features, done = block * shape_.rank;
    float* const vectors = work_.basis + done * shape_.features;
    constexpr int64_t worth_a_thread = 1 << 15;  // sums
    torch::stable::parallel_for(0, count,
                                std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, shape_.chunks())),
                                [&](int64_t begin, int64_t end) {
                                  const IeeeArithmetic ieee;
                                  std::fill(vectors + begin, vectors + end, 0.0f);
                                  for (int64_t chunk = 0; chunk < shape_.chunks(); ++chunk)
                                    for (int64_t i = begin; i < end; ++i)
                                      vectors[i] = vectors[i] + work_.partials[chunk * count + i];
                                });
    const VectorLoops loops{set_};
    if (block == 0) *work_.scale = scale_to_one(loops.largest(vectors, count));
    for (int64_t q = 0; q < shape_.rank; ++q)
      orthonormalise(loops, work_.basis, done + q, vectors + q * shape_.features, shape_.features,
                     work_.projections);
  }

  // Y Y^T. Products of two float32 are exact in double.
  void multiply_products() const {
    constexpr int64_t worth_a_thread = 1 << 15;  // products
    const int64_t vectors = shape_.vectors(), tokens = shape_.tokens;
    torch::stable::parallel_for(
        0, vectors, 1 + worth_a_thread / (1 + vectors * tokens), [&](int64_t begin, int64_t end) {
          const IeeeArithmetic ieee;
          for (int64_t i = begin; i < end; ++i)
            for (int64_t j = 0; j <= i; ++j) {
              const double product = exact_dot(work_.products + i * tokens, work_.products + j * tokens, tokens);
              work_.gram.matrix[i * vectors + j] = work_.gram.matrix[j * vectors + i] = product;
            }
        });
  }

  // Vector `q` of the result; there is none where the value is zero or not a number.
  void write_vector(int64_t q, float value, float* basis) const {
    float* const vector = basis + q * shape_.features;
    std::fill_n(vector, shape_.features, 0.0f);
    if (!(value > 0.0f)) return;
    const float* const weights = work_.coefficients + q * shape_.vectors();
    for_each_few(work_.basis, shape_.vectors(), shape_.features, [&](const Rows& rows) {
      set_.rows.add(rows.of, rows.count, weights + rows.token[0], shape_.features, vector);
    });
    orthonormalise(VectorLoops{set_}, basis, q, vector, shape_.features, work_.projections);
  }

  static double exact_dot(const float* a, const float* b, int64_t length) {
    double lane[dot_lanes] = {};
    const auto add = [&](int64_t begin, int count) __attribute__((always_inline)) {
      for (int l = 0; l < count; ++l)
        lane[l] += static_cast<double>(a[begin + l]) * static_cast<double>(b[begin + l]);
    };
    const int64_t whole = length / dot_lanes * dot_lanes;
    for (int64_t i = 0; i < whole; i += dot_lanes) add(i, dot_lanes);  // a constant, to be unrolled
    add(whole, static_cast<int>(length - whole));
    for (int half = dot_lanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    return lane[0];
  }

  const KrylovShape shape_;
  const ops::KrylovWorkspace& work_;
  const Tokens<Storage> tokens_;
  const InstructionSet& set_;
};

void find_basis(ops::PowerIteration& call) {
  for_storage(call.input.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    const Tokens<Storage> tokens{instruction_set(), static_cast<const Storage*>(call.input.const_data_ptr()),
                                 call.mask ? static_cast<const bool*>(call.mask->const_data_ptr()) : nullptr,
                                 call.shape.tokens, call.shape.features};
    BlockKrylov<Storage>(call.shape, call.workspace, tokens)
        .run(static_cast<uint64_t>(*static_cast<const int64_t*>(call.seed.const_data_ptr())),
             static_cast<float*>(call.basis.mutable_data_ptr()),
             static_cast<float*>(call.values.mutable_data_ptr()));
  });
}

}  // namespace
}  // namespace zoext::cpu

STABLE_TORCH_LIBRARY_IMPL(zoext, CPU, m) {
  m.impl("power_iteration", TORCH_BOX(&zoext::ops::power_iteration<&zoext::cpu::find_basis>));
}
