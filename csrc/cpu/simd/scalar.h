// One lane: the core's own functions. The reference for the other instruction sets, and what runs
// on a processor that has none of them.
#pragma once

#include "../../core/normal.h"
#include "../../core/storage.h"

namespace zoext::cpu::scalar {

using Floats = float;
using Ints = uint32_t;
using Counters = uint32_t;
template <int rounds>
using Keys = RoundKeys;
template <int rounds>
using NarrowKeys = RoundKeys;

constexpr int lanes = 1;
constexpr int blocks_per_group = 1;

inline Counters consecutive_blocks(uint32_t first) { return first; }
inline void advance(Counters& block) { ++block; }

inline float halving_sum(Floats a) { return a; }

inline Ints larger(Ints a, Ints b) { return a < b ? b : a; }
inline Ints choose(uint32_t mask, Ints a, Ints b) { return (mask & a) | (~mask & b); }
inline bool any_at_least(Ints a, uint32_t limit) { return a >= limit; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

// Words of a group as two streams of pairs: words 0 and 2 of each block, and words 1 and 3.
struct Pairs {
  Ints first[2], second[2];
};

inline Pairs pair_up(const Words<Counters>& words) { return {{words.w[0], words.w[2]}, {words.w[1], words.w[3]}}; }

// The group's values in the order of their index.
template <class T>
inline void in_order(const T (&first)[2], const T (&second)[2], T (&out)[4]) {
  out[0] = first[0], out[1] = second[0], out[2] = first[1], out[3] = second[1];
}

template <class Storage>
inline Floats load(const Storage* p) {
  return widen(*p);
}
inline Ints load_words(const uint16_t* p) { return *p; }
inline Ints load_words(const int8_t* p) { return static_cast<uint32_t>(static_cast<int32_t>(*p)); }
inline Floats load_first(const float* p, int) { return *p; }
template <class Storage>
inline void store(Storage* p, Floats a) {
  *p = round_to_nearest<Storage>(a);
}
inline void store_low(uint16_t* p, Ints a) { *p = static_cast<uint16_t>(a); }
inline void store_low(int8_t* p, Ints a) { *p = static_cast<int8_t>(a); }
inline void store(uint32_t* p, Ints a) { *p = a; }
constexpr bool truncates_to_half = false;

// The words of a block in the order of their number.
template <int rounds>
inline void store_words(uint32_t* p, const Words<Counters>& counter, const NarrowKeys<rounds>& keys) {
  const Words<uint32_t> words = philox4x32<rounds>(counter, keys);
  for (int i = 0; i < 4; ++i) p[i] = words.w[i];
}

// Signs of consecutive elements whose first bit is `bit` of `word`.
inline Floats signs(uint32_t word, unsigned bit) { return float_of_bits(0x3f800000u | (word >> bit & 1u) << 31); }

}  // namespace zoext::cpu::scalar
