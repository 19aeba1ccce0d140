// What the mathematics needs from the compiler, on the host and on the device alike.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ZOEXT_HD __host__ __device__ __forceinline__
#else
#define ZOEXT_HD inline __attribute__((always_inline))
#endif
