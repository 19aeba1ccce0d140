// The threads of one block, as the small problems of csrc/core want them.
#pragma once

#include "../../core/power_iteration.h"

namespace zoext::cuda {

constexpr int warp_lanes = 32;
static_assert(warp_lanes == dot_lanes, "a lane of a dot product is a thread of a warp");

// The sum of a warp's lanes, in its first lane: l and l + 16, then 8, 4, 2, 1.
template <class Number>
__device__ Number halving_sum(Number lane) {
#pragma unroll
  for (int half = warp_lanes / 2; half > 0; half /= 2) lane = lane + __shfl_down_sync(0xffffffffu, lane, half);
  return lane;
}

// All threads call every function, with the same arguments, and see what it wrote when it returns.
struct Block {
  static __device__ int64_t first() { return threadIdx.x; }
  static __device__ int64_t step() { return blockDim.x; }
  static __device__ void wait() { __syncthreads(); }

  // What `f` returns to the one thread that runs it.
  template <class F>
  static __device__ auto once(F f) {
    __shared__ decltype(f()) shared;
    if (threadIdx.x == 0) shared = f();
    __syncthreads();
    const auto result = shared;
    __syncthreads();
    return result;
  }

  static __device__ float largest(const float* vector, int64_t length) {
    __shared__ unsigned shared;
    if (threadIdx.x == 0) shared = 0;
    __syncthreads();
    uint32_t mine = 0;
    for (int64_t i = first(); i < length; i += step()) mine = larger_magnitude(mine, vector[i]);
    atomicMax(&shared, mine);  // of integers: in any order the same
    __syncthreads();
    const uint32_t result = shared;
    __syncthreads();
    return float_of_bits(result);
  }

  static __device__ void multiply(float* vector, float factor, int64_t length) {
    for (int64_t i = first(); i < length; i += step()) vector[i] = zoext::multiply(vector[i], factor);
    __syncthreads();
  }

  static __device__ float dot(const float* a, const float* b, int64_t length) {
    __shared__ float shared;
    if (threadIdx.x < warp_lanes) {
      const float product = warp_dot(a, b, length);
      if (threadIdx.x == 0) shared = product;
    }
    __syncthreads();
    const float result = shared;
    __syncthreads();
    return result;
  }

  static __device__ void dots(const float* basis, int64_t count, const float* vector, int64_t length,
                              float* products) {
    for (int64_t row = threadIdx.x / warp_lanes; row < count; row += blockDim.x / warp_lanes) {
      const float product = warp_dot(basis + row * length, vector, length);
      if (threadIdx.x % warp_lanes == 0) products[row] = product;
    }
    __syncthreads();
  }

  static __device__ void subtract(const float* basis, int64_t count, const float* coefficients, float* vector,
                                  int64_t length) {
    for (int64_t i = first(); i < length; i += step()) {
      float sum = vector[i];
      for (int64_t row = 0; row < count; ++row)
        sum = fused_multiply_add(-coefficients[row], basis[row * length + i], sum);
      vector[i] = sum;
    }
    __syncthreads();
  }

 private:
  // In the first lane of a warp.
  static __device__ float warp_dot(const float* a, const float* b, int64_t length) {
    float lane = 0.0f;
    for (int64_t i = threadIdx.x % warp_lanes; i < length; i += warp_lanes)
      lane = fused_multiply_add(a[i], b[i], lane);
    return halving_sum(lane);
  }
};

}  // namespace zoext::cuda
