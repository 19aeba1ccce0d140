// Random words on the device.
#pragma once

#include "../../core/stream.h"

#if __has_include(<curand_philox4x32_x.h>)
#include <curand_philox4x32_x.h>
#define ZOEXT_CURAND_ROUNDS
#endif

namespace zoext::cuda {

// Seeds stay on the device, so that no launch waits for the host.
__device__ __forceinline__ uint64_t seed_at(const int64_t* seeds, int64_t k) {
  return static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(seeds) + k));
}

// cuRAND's rounds, or those of csrc/core where the toolkit has no cuRAND; the words are equal.
__device__ __forceinline__ Words<uint32_t> words_of(const Field& field, uint64_t block) {
#if defined(ZOEXT_CURAND_ROUNDS)
  const Words<uint32_t> counter = field.counter(block);
  const uint4 words =
      curand_Philox4x32_10(make_uint4(counter.w[0], counter.w[1], counter.w[2], counter.w[3]),
                           make_uint2(static_cast<uint32_t>(field.seed), static_cast<uint32_t>(field.seed >> 32)));
  return {{words.x, words.y, words.z, words.w}};
#else
  return field.words(block);
#endif
}

}  // namespace zoext::cuda
