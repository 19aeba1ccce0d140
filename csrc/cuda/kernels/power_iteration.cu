// The power iteration on CUDA. Products with the tokens are spread over the device; what is small, the
// orthonormalisation and the Rayleigh-Ritz step, is the work of one block.
#include "../../core/normal.h"
#include "../../core/storage.h"
#include "../../ops/power_iteration.h"
#include "../device/block.cuh"
#include "../device/words.cuh"
#include "launch.h"

namespace zoext::cuda {
namespace {

constexpr int threads = 256, threads_alone = 512;  // of a block among many, and of a single one
constexpr int vectors_at_once = 4;                 // that share a read of the tokens

template <class Storage>
struct Tokens {
  const Storage* input;
  const bool* mask;  // or null

  __device__ bool counts(int64_t token) const { return !mask || mask[token]; }
  __device__ float at(int64_t i) const { return static_cast<float>(widen(input[i])); }
};

// The pointers of a KrylovWorkspace.
struct Buffers {
  float *basis, *products, *partials, *coefficients, *projections, *scale;
  Eigenproblem gram;

  explicit Buffers(const ops::KrylovWorkspace& w)
      : basis(w.basis),
        products(w.products),
        partials(w.partials),
        coefficients(w.coefficients),
        projections(w.projections),
        scale(w.scale),
        gram(w.gram) {}
};

// Omega, in the place of the first block of Y: four elements a thread.
__global__ void __launch_bounds__(threads) draw(KrylovShape shape, const int64_t* seed, float* products) {
  const Field field{seed_at(seed, 0), 0, static_cast<uint32_t>(Stream::power_iteration)};
  const int64_t count = shape.tokens * shape.rank, block = int64_t{blockIdx.x} * threads + threadIdx.x;
  if (4 * block >= count) return;
  const Words<uint32_t> words = words_of(field, static_cast<uint64_t>(block));
  float z[4];
  box_muller(words.w[0], words.w[1], z[0], z[1]);
  box_muller(words.w[2], words.w[3], z[2], z[3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t element = 4 * block + i;
    if (element < count) products[element % shape.rank * shape.tokens + element / shape.rank] = z[i];
  }
}

// The columns of a block of Y, from a block of Q: a warp a token.
template <class Storage>
__global__ void __launch_bounds__(threads)
    multiply_rows(KrylovShape shape, Tokens<Storage> tokens, const float* vectors, const float* scale,
                  float* products) {
  const int lane = threadIdx.x % warp_lanes;
  const int64_t token = int64_t{blockIdx.x} * (threads / warp_lanes) + threadIdx.x / warp_lanes;
  if (token >= shape.tokens) return;
  const bool counts = tokens.counts(token);
  for (int64_t first = 0; first < shape.rank; first += vectors_at_once) {
    float sums[vectors_at_once] = {};
    if (counts)
      for (int64_t i = lane; i < shape.features; i += warp_lanes) {
        const float x = tokens.at(token * shape.features + i);
#pragma unroll
        for (int q = 0; q < vectors_at_once; ++q)
          if (first + q < shape.rank)
            sums[q] = fused_multiply_add(x, vectors[(first + q) * shape.features + i], sums[q]);
      }
#pragma unroll
    for (int q = 0; q < vectors_at_once; ++q) {
      const float product = multiply(halving_sum(sums[q]), *scale);
      if (lane == 0 && first + q < shape.rank) products[(first + q) * shape.tokens + token] = product;
    }
  }
}

// The part of a chunk of tokens in Y X, for a block of Y: a thread a column.
template <class Storage>
__global__ void __launch_bounds__(threads)
    add_rows(KrylovShape shape, Tokens<Storage> tokens, const float* products, float* partials) {
  const int64_t column = int64_t{blockIdx.y} * threads + threadIdx.x;
  const int64_t begin = int64_t{blockIdx.x} * chunk_tokens;
  const int64_t end = begin + chunk_tokens < shape.tokens ? begin + chunk_tokens : shape.tokens;
  if (column >= shape.features) return;
  for (int64_t first = 0; first < shape.rank; first += vectors_at_once) {
    float sums[vectors_at_once] = {};
#pragma unroll 8
    for (int64_t token = begin; token < end; ++token) {
      const float x = tokens.at(token * shape.features + column);
      if (tokens.counts(token))
#pragma unroll
        for (int q = 0; q < vectors_at_once; ++q)
          if (first + q < shape.rank)
            sums[q] = fused_multiply_add(products[(first + q) * shape.tokens + token], x, sums[q]);
    }
#pragma unroll
    for (int q = 0; q < vectors_at_once; ++q)
      if (first + q < shape.rank)
        partials[(blockIdx.x * shape.rank + first + q) * shape.features + column] = sums[q];
  }
}

// A block of Q, orthonormal, from the parts of all chunks.
__global__ void __launch_bounds__(threads_alone) finish_block(KrylovShape shape, Buffers work, int64_t block) {
  const int64_t count = shape.rank * shape.features, done = block * shape.rank;
  float* const vectors = work.basis + done * shape.features;
  for (int64_t i = Block::first(); i < count; i += Block::step()) {
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t chunk = 0; chunk < shape.chunks(); ++chunk) sum = sum + work.partials[chunk * count + i];
    vectors[i] = sum;
  }
  Block::wait();
  if (block == 0) {
    const float largest = Block::largest(vectors, count);
    if (threadIdx.x == 0) *work.scale = scale_to_one(largest);
  }
  for (int64_t q = 0; q < shape.rank; ++q)
    orthonormalise(Block{}, work.basis, done + q, vectors + q * shape.features, shape.features, work.projections);
}

// Y Y^T: a warp an element. Products of two float32 are exact in double.
__global__ void __launch_bounds__(threads)
    multiply_products(KrylovShape shape, const float* products, double* gram) {
  const int64_t element = int64_t{blockIdx.x} * (threads / warp_lanes) + threadIdx.x / warp_lanes;
  if (element >= shape.vectors() * shape.vectors()) return;
  const float* const a = products + element / shape.vectors() * shape.tokens;
  const float* const b = products + element % shape.vectors() * shape.tokens;
  double sum = 0.0;
  for (int64_t i = threadIdx.x % warp_lanes; i < shape.tokens; i += warp_lanes)
    sum = sum + multiply(static_cast<double>(a[i]), static_cast<double>(b[i]));
  sum = halving_sum(sum);
  if (threadIdx.x % warp_lanes == 0) gram[element] = sum;
}

// The basis and its values from Q and Y Y^T; a vector is zero where its value is zero or not a number.
__global__ void __launch_bounds__(threads_alone)
    finish(KrylovShape shape, Buffers work, float* basis, float* values) {
  solve_ritz(Block{}, work.gram, shape.rank, *work.scale, work.coefficients, values);
  for (int64_t q = 0; q < shape.rank; ++q) {
    float* const vector = basis + q * shape.features;
    const bool exists = values[q] > 0.0f;
    for (int64_t i = Block::first(); i < shape.features; i += Block::step()) {
      float sum = 0.0f;
      for (int64_t row = 0; exists && row < shape.vectors(); ++row)
        sum = fused_multiply_add(work.coefficients[q * shape.vectors() + row],
                                 work.basis[row * shape.features + i], sum);
      vector[i] = sum;
    }
    Block::wait();
    if (exists) orthonormalise(Block{}, basis, q, vector, shape.features, work.projections);
  }
}

unsigned blocks_for(int64_t work, int64_t work_per_block) {
  return static_cast<unsigned>((work + work_per_block - 1) / work_per_block);
}

template <class Storage>
void launch_all(const KrylovShape& shape, const Tokens<Storage>& tokens, const int64_t* seed, const Buffers& work,
                float* basis, float* values, cudaStream_t stream) {
  constexpr int warps = threads / warp_lanes;
  const dim3 tiles(blocks_for(shape.tokens, chunk_tokens), blocks_for(shape.features, threads));
  if (shape.tokens > 0) {
    draw<<<blocks_for(shape.tokens * shape.rank, 4 * threads), threads, 0, stream>>>(shape, seed, work.products);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for (int64_t block = 0; block < shape.blocks; ++block) {
    // The weights of the first block are Omega, which Y then overwrites.
    const float* const weights = work.products + (block > 0 ? block - 1 : 0) * shape.rank * shape.tokens;
    if (shape.tokens > 0) {
      add_rows<<<tiles, threads, 0, stream>>>(shape, tokens, weights, work.partials);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    finish_block<<<1, threads_alone, 0, stream>>>(shape, work, block);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (shape.tokens > 0) {
      multiply_rows<<<blocks_for(shape.tokens, warps), threads, 0, stream>>>(
          shape, tokens, work.basis + block * shape.rank * shape.features, work.scale,
          work.products + block * shape.rank * shape.tokens);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  multiply_products<<<blocks_for(shape.vectors() * shape.vectors(), warps), threads, 0, stream>>>(
      shape, work.products, work.gram.matrix);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  finish<<<1, threads_alone, 0, stream>>>(shape, work, basis, values);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void find_basis(ops::PowerIteration& call) {
  const torch::stable::accelerator::DeviceGuard guard(call.input.get_device_index());
  for_storage(call.input.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    const Tokens<Storage> tokens{static_cast<const Storage*>(call.input.const_data_ptr()),
                                 call.mask ? static_cast<const bool*>(call.mask->const_data_ptr()) : nullptr};
    launch_all(call.shape, tokens, static_cast<const int64_t*>(call.seed.const_data_ptr()),
               Buffers(call.workspace), static_cast<float*>(call.basis.mutable_data_ptr()),
               static_cast<float*>(call.values.mutable_data_ptr()), current_stream(call.input));
  });
}

}  // namespace
}  // namespace zoext::cuda

STABLE_TORCH_LIBRARY_IMPL(zoext, CUDA, m) {
  m.impl("power_iteration", TORCH_BOX(&zoext::ops::power_iteration<&zoext::cuda::find_basis>));
}
