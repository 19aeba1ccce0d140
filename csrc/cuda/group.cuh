// A few consecutive elements in the registers of a thread.
#pragma once

#include "../core/storage.h"
#include "chunks.h"

namespace zoext::cuda {

// Elements as they are stored: read and written with 16-byte accesses where the group is whole and
// its address allows it, else one by one.
template <class Storage, int vector>
struct Group {
  static constexpr int quads = vector * sizeof(Storage) / sizeof(uint4);

  union {
    uint4 quad[quads];
    Storage element[vector];
  };

  static __device__ bool is_fast(const Storage* address, const Part& part) {
    return part.first == 0 && part.last == vector && reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0;
  }

  __device__ void load(const void* tensor, const Part& part) {
    const Storage* from = static_cast<const Storage*>(tensor) + part.local;
    if (is_fast(from, part)) {
#pragma unroll
      for (int q = 0; q < quads; ++q) quad[q] = reinterpret_cast<const uint4*>(from)[q];
    } else {
#pragma unroll
      for (int i = 0; i < vector; ++i) element[i] = i >= part.first && i < part.last ? from[i] : Storage{};
    }
  }

  __device__ void store(void* tensor, const Part& part) const {
    Storage* to = static_cast<Storage*>(tensor) + part.local;
    if (is_fast(to, part)) {
      // An assignment of a uint4 made of elements is taken apart by nvcc; this store is not.
#pragma unroll
      for (int q = 0; q < quads; ++q) __stwb(reinterpret_cast<uint4*>(to) + q, quad[q]);
    } else {
#pragma unroll
      for (int i = 0; i < vector; ++i)
        if (i >= part.first && i < part.last) to[i] = element[i];
    }
  }
};

}  // namespace zoext::cuda
