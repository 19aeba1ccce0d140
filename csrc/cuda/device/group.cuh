// A few consecutive elements in the registers of a thread.
#pragma once

#include <type_traits>

#include "../../core/storage.h"
#include "chunks.h"

namespace zoext::cuda {

// Elements as they are stored: read and written with accesses of 16 bytes (8, of eight bytes) where the
// group is whole and its address allows it, else one by one.
template <class Storage, int vector>
struct Group {
  static constexpr int bytes = vector * sizeof(Storage);
  using Access = std::conditional_t<bytes % sizeof(uint4) == 0, uint4, uint2>;
  static constexpr int accesses = bytes / sizeof(Access);

  union {
    Access access[accesses];
    uint32_t word[bytes / sizeof(uint32_t)];
    Storage element[vector];
  };

  // Element `i`, widened.
  __device__ auto number(int i) const {
    // nvcc takes the upper half of a word out before it shifts it back in.
    if constexpr (std::is_same_v<Storage, BFloat16>)
      return float_of_bits(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    else
      return widen(element[i]);
  }

  static __device__ bool is_fast(const Storage* address, const Part& part) {
    return part.first == 0 && part.last == vector && reinterpret_cast<uintptr_t>(address) % sizeof(Access) == 0;
  }

  __device__ void load(const void* tensor, const Part& part) {
    const Storage* from = static_cast<const Storage*>(tensor) + part.local;
    if (is_fast(from, part)) {
#pragma unroll
      for (int a = 0; a < accesses; ++a) access[a] = reinterpret_cast<const Access*>(from)[a];
    } else {
#pragma unroll
      for (int i = 0; i < vector; ++i) element[i] = i >= part.first && i < part.last ? from[i] : Storage{};
    }
  }

  __device__ void load(const Storage* share, const WholePart& part) {
    const auto from = reinterpret_cast<const Access*>(share + part.offset);
#pragma unroll
    for (int a = 0; a < accesses; ++a)
      // Of an address that went through `WholeShareInPlace::advance` nvcc does not know that it is global.
      if constexpr (sizeof(Storage) <= 2)
        access[a] = __ldca(from + a);
      else
        access[a] = from[a];
  }

  __device__ void store(Storage* share, const WholePart& part) const {
    const auto to = reinterpret_cast<Access*>(share + part.offset);
#pragma unroll
    for (int a = 0; a < accesses; ++a) __stwb(to + a, access[a]);
  }

  __device__ void store(void* tensor, const Part& part) const {
    Storage* to = static_cast<Storage*>(tensor) + part.local;
    if (is_fast(to, part)) {
      // An assignment of a uint4 made of elements is taken apart by nvcc; this store is not.
#pragma unroll
      for (int a = 0; a < accesses; ++a) __stwb(reinterpret_cast<Access*>(to) + a, access[a]);
    } else {
#pragma unroll
      for (int i = 0; i < vector; ++i)
        if (i >= part.first && i < part.last) to[i] = element[i];
    }
  }
};

}  // namespace zoext::cuda
