// Factored displacements of linear layers on CUDA: the products of all rows with the right factors, then what they
// and the left factors add to the outputs.
#include "../../core/divisor.h"
#include "../../core/storage.h"
#include "../../ops/factored_linear.h"
#include "launch.h"

namespace zoext::cuda {
namespace {

constexpr int threads = 256;
constexpr int vectors_at_once = 4;  // that share a read of a row
constexpr int rows_at_once = 8;     // that share a read of the left factors

// The factors and coefficients, which lie as the operator takes them.
struct LinearFactors {
  FactoredLinearShape shape;
  const float *left, *right, *coefficients;
  Divisor rank;

  __device__ float coefficient(int64_t copy, int64_t k) const {
    return __ldg(coefficients + copy * shape.terms + k);
  }

  // Whether product `v` of a row of this copy is used.
  __device__ bool uses(int64_t copy, int64_t v) const {
    if (!shape.has_shared_right) return contributes(coefficient(copy, rank.quotient(v)));
    for (int64_t k = 0; k < shape.terms; ++k)
      if (contributes(coefficient(copy, k))) return true;
    return false;
  }

  // What product `v` of a row of this copy is multiplied with in a column.
  template <class Number>
  __device__ Number weight(int64_t copy, int64_t v, int64_t column) const {
    const auto left_of = [&](int64_t k, int64_t q) {
      const int64_t vector = (shape.has_shared_left ? 0 : k) * shape.rank + q;
      return static_cast<Number>(__ldg(left + vector * shape.outputs + column));
    };
    Number sum{empty_sum};
    if (!shape.has_shared_right) {
      const int64_t k = rank.quotient(v);
      return add_term<Number>(coefficient(copy, k), left_of(k, v - k * shape.rank), sum);
    }
    for (int64_t k = 0; k < shape.terms; ++k) {
      const float c = coefficient(copy, k);
      if (contributes(c)) sum = add_term<Number>(c, left_of(k, v), sum);
    }
    return sum;
  }
};

// The sum of the lanes of a product, in the first of its threads: l and l + 8, then 4, 2, 1.
template <class Number>
__device__ Number sum_of_lanes(unsigned mask, Number lane) {
#pragma unroll
  for (int half = product_lanes / 2; half > 0; half /= 2)
    lane = lane + __shfl_down_sync(mask, lane, half, product_lanes);
  return lane;
}

// products[row, v] = <input[row], right[v]>: as many threads a row as a product has lanes.
template <class Storage>
__global__ void __launch_bounds__(threads)
    multiply_activations(LinearFactors factors, Divisor rows_of_copy, const Storage* input,
                         typename Arithmetic<Storage>::type* products) {
  using Number = typename Arithmetic<Storage>::type;
  constexpr int steps_at_once = sizeof(Number) == 8 ? 2 : 4;  // doubles would be spilled
  const FactoredLinearShape& shape = factors.shape;
  const int lane = threadIdx.x % product_lanes;
  const int64_t row = int64_t{blockIdx.x} * (threads / product_lanes) + threadIdx.x / product_lanes;
  if (row >= shape.copies * shape.rows) return;
  const int64_t copy = rows_of_copy.quotient(row), count = shape.products();
  const unsigned mask = 0xffffu << (threadIdx.x & product_lanes);  // of this row's threads
  const int64_t padded = (shape.features + product_lanes - 1) / product_lanes * product_lanes;
  for (int64_t first = 0; first < count; first += vectors_at_once) {
    bool is_used = false;
    for (int64_t v = first; v < count && v < first + vectors_at_once; ++v)
      is_used = is_used || factors.uses(copy, v);
    if (!is_used) continue;
    Number sums[vectors_at_once] = {};
#pragma unroll steps_at_once
    for (int64_t i = lane; i < padded; i += product_lanes) {
      const bool is_there = i < shape.features;
      const Number x = is_there ? widen(input[row * shape.features + i]) : Number{0};
#pragma unroll
      for (int v = 0; v < vectors_at_once; ++v)
        if (first + v < count) {
          const Number r = is_there ? __ldg(factors.right + (first + v) * shape.features + i) : 0.0f;
          sums[v] = fused_multiply_add(x, r, sums[v]);
        }
    }
#pragma unroll
    for (int v = 0; v < vectors_at_once; ++v) {
      const Number product = sum_of_lanes(mask, sums[v]);
      if (lane == 0 && first + v < count) products[row * count + first + v] = product;
    }
  }
}

// out[row, column] = round(out[row, column] + sum_v products[row, v] weight_v[column]): a thread a column of a few
// rows of one copy.
template <class Storage>
__global__ void __launch_bounds__(threads)
    add_products(LinearFactors factors, Divisor tiles_of_copy, const typename Arithmetic<Storage>::type* products,
                 Storage* out) {
  using Number = typename Arithmetic<Storage>::type;
  const FactoredLinearShape& shape = factors.shape;
  const int64_t column = int64_t{blockIdx.y} * threads + threadIdx.x;
  if (column >= shape.outputs) return;
  const int64_t count = shape.products(), copy = tiles_of_copy.quotient(blockIdx.x);
  const int64_t first = (blockIdx.x - copy * tiles_of_copy.value()) * rows_at_once;  // of the rows of its copy
  const int64_t row = copy * shape.rows + first;
  const int rows = static_cast<int>(shape.rows - first < rows_at_once ? shape.rows - first : rows_at_once);
  Number sums[rows_at_once];
#pragma unroll
  for (Number& sum : sums) sum = empty_sum;
  bool is_displaced = false;
  for (int64_t v = 0; v < count; ++v) {
    if (!factors.uses(copy, v)) continue;
    is_displaced = true;
    const Number weight = factors.weight<Number>(copy, v, column);
#pragma unroll
    for (int t = 0; t < rows_at_once; ++t)
      if (t < rows) sums[t] = fused_multiply_add(products[(row + t) * count + v], weight, sums[t]);
  }
  if (!is_displaced) return;
#pragma unroll
  for (int t = 0; t < rows_at_once; ++t)
    if (t < rows) {
      Storage* const to = out + (row + t) * shape.outputs + column;
      *to = round_to_nearest<Storage>(widen(*to) + sums[t]);
    }
}

unsigned blocks_for(int64_t work, int64_t work_per_block) {
  return static_cast<unsigned>((work + work_per_block - 1) / work_per_block);
}

template <class Storage>
void launch_both(const ops::FactoredLinear& call, cudaStream_t stream) {
  using Number = typename Arithmetic<Storage>::type;
  const FactoredLinearShape& shape = call.shape;
  const int64_t rows = shape.copies * shape.rows;
  const Tensor workspace = torch::stable::new_empty(call.out, {rows * shape.products()},
                                                    sizeof(Number) == 8 ? ScalarType::Double : ScalarType::Float);
  auto* const products = static_cast<Number*>(workspace.mutable_data_ptr());
  const LinearFactors factors{shape, floats_in(call.left), floats_in(call.right), floats_in(call.coefficients),
                              Divisor(shape.rank)};
  multiply_activations<Storage><<<blocks_for(rows, threads / product_lanes), threads, 0, stream>>>(
      factors, Divisor(shape.rows), static_cast<const Storage*>(call.input.const_data_ptr()), products);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const Divisor tiles(blocks_for(shape.rows, rows_at_once));
  const dim3 blocks(static_cast<unsigned>(shape.copies * tiles.value()), blocks_for(shape.outputs, threads));
  add_products<Storage><<<blocks, threads, 0, stream>>>(factors, tiles, products,
                                                        static_cast<Storage*>(call.out.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void add(const ops::FactoredLinear& call) {
  const torch::stable::accelerator::DeviceGuard guard(call.out.get_device_index());
  for_storage(call.out.scalar_type(),
              [&](auto storage) { launch_both<decltype(storage)>(call, current_stream(call.out)); });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) {
  m.impl("factored_linear_", TORCH_BOX(&zoext::ops::factored_linear_<&zoext::cuda::add>));
}
