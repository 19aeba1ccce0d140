// AVX2, FMA and F16C lanes. Included with the instruction sets switched on.
#pragma once

#include <immintrin.h>

#include "../../core/normal.h"
#include "../../core/storage.h"

namespace zoext::cpu::avx2 {

struct Ints {
  __m256i v;
};
struct Floats {
  __m256 v;
};
// 32-bit words in the low halves of 64-bit lanes; the high halves hold anything. A product then
// needs no shuffle. Two vectors side by side keep the multipliers busy while the other one waits.
constexpr int vectors = 2;
struct Counters {
  __m256i v[vectors];
  Counters() = default;
  explicit Counters(uint32_t word) : v{_mm256_set1_epi64x(word), _mm256_set1_epi64x(word)} {}
  Counters(__m256i a, __m256i b) : v{a, b} {}
};

constexpr int lanes = 8;
constexpr int blocks_per_vector = 4;
constexpr int blocks_per_group = vectors * blocks_per_vector;

// The halves of each lane exchanged. A shuffle, not a shift: shifts share their port with the products.
inline __m256i exchanged(__m256i a) { return _mm256_shuffle_epi32(a, 0xb1); }

inline Counters xor_of_three(Counters a, Counters b, __m256i key) {
  for (int j = 0; j < vectors; ++j) {
    __m256i early = _mm256_xor_si256(b.v[j], key);
    asm("" : "+x"(early));
    a.v[j] = _mm256_xor_si256(a.v[j], early);
  }
  return a;
}

// Counters before the last round, after which both halves of a lane are needed: it makes words 0 and 2, in high
// halves, beside words 1 and 3.
struct LastCounters {
  __m256i v[vectors];
  LastCounters() = default;
  explicit LastCounters(const Counters& a) {
    for (int j = 0; j < vectors; ++j) v[j] = a.v[j];
  }
};

inline LastCounters xor_of_three(const LastCounters& product, const LastCounters& b, __m256i key) {
  const __m256i high_halves = _mm256_set1_epi64x(~int64_t{0xffffffff});
  LastCounters words;
  for (int j = 0; j < vectors; ++j)
    words.v[j] =
        _mm256_xor_si256(product.v[j], _mm256_and_si256(_mm256_xor_si256(exchanged(b.v[j]), key), high_halves));
  return words;
}

// The keys of a seed in all lanes, in memory: kept from the compiler's eyes, which would make each
// one again in every iteration.
template <int rounds>
struct Keys {
  __m256i keys[rounds][2];

  explicit Keys(uint64_t seed) {
    for (int round = 0; round < rounds; ++round) {
      keys[round][0] = _mm256_set1_epi32(static_cast<int>(RoundKeys{seed}.first(round)));
      keys[round][1] = _mm256_set1_epi32(static_cast<int>(RoundKeys{seed}.second(round)));
    }
    asm volatile("" : : "r"(keys) : "memory");
  }
  __m256i first(int round) const { return keys[round][0]; }
  __m256i second(int round) const { return keys[round][1]; }
};

// The same for a loop that is soon over: they are spread over the lanes where they are read.
template <int rounds>
struct NarrowKeys {
  uint32_t keys[rounds][2];

  explicit NarrowKeys(uint64_t seed) {
    for (int round = 0; round < rounds; ++round) {
      keys[round][0] = RoundKeys{seed}.first(round);
      keys[round][1] = RoundKeys{seed}.second(round);
    }
    asm volatile("" : : "r"(keys) : "memory");
  }
  __m256i first(int round) const { return _mm256_set1_epi32(static_cast<int>(keys[round][0])); }
  __m256i second(int round) const { return _mm256_set1_epi32(static_cast<int>(keys[round][1])); }

  // Those of the rounds from `start` on.
  struct Later {
    const NarrowKeys& all;
    int start;
    __m256i first(int round) const { return all.first(start + round); }
    __m256i second(int round) const { return all.second(start + round); }
  };
  Later from(int round) const { return {*this, round}; }
};

inline Product<Counters> multiply_wide(uint32_t constant, Counters a) {
  const __m256i factor = _mm256_set1_epi64x(constant);
  const __m256i p = _mm256_mul_epu32(factor, a.v[0]), q = _mm256_mul_epu32(factor, a.v[1]);
  return {{exchanged(p), exchanged(q)}, {p, q}};
}

inline Product<LastCounters> multiply_wide(uint32_t constant, const LastCounters& a) {
  const __m256i factor = _mm256_set1_epi64x(constant);
  LastCounters product;
  for (int j = 0; j < vectors; ++j) product.v[j] = _mm256_mul_epu32(factor, a.v[j]);
  return {product, product};
}

// In the order that makes `in_order` two unpack instructions a vector.
inline Counters consecutive_blocks(uint32_t first) {
  const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);
  const __m256i next = _mm256_add_epi64(order, _mm256_set1_epi64x(blocks_per_vector));
  return {_mm256_add_epi64(_mm256_set1_epi64x(first), order), _mm256_add_epi64(_mm256_set1_epi64x(first), next)};
}

inline void advance(Counters& blocks) {
  for (__m256i& vector : blocks.v) vector = _mm256_add_epi64(vector, _mm256_set1_epi64x(blocks_per_group));
}

inline Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.v, b.v)}; }
inline Ints operator|(Ints a, Ints b) { return {_mm256_or_si256(a.v, b.v)}; }
inline Ints operator^(Ints a, Ints b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Ints operator~(Ints a) { return {_mm256_xor_si256(a.v, _mm256_set1_epi32(-1))}; }
inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline Ints operator<<(Ints a, int n) { return {_mm256_slli_epi32(a.v, n)}; }
inline Ints operator>>(Ints a, int n) { return {_mm256_srli_epi32(a.v, n)}; }
inline Ints smaller_signed(Ints a, Ints b) { return {_mm256_min_epi32(a.v, b.v)}; }
inline Ints larger(Ints a, Ints b) { return {_mm256_max_epu32(a.v, b.v)}; }
// Bits of `a` where `mask` has ones, else of `b`.
inline Ints choose(uint32_t mask, Ints a, Ints b) {
  const __m256i ones = _mm256_set1_epi32(static_cast<int>(mask));
  return {_mm256_or_si256(_mm256_and_si256(ones, a.v), _mm256_andnot_si256(ones, b.v))};
}
// Whether a lane, read without a sign, is at least `limit`.
inline bool any_at_least(Ints a, uint32_t limit) {
  const __m256i largest = _mm256_max_epu32(a.v, _mm256_set1_epi32(static_cast<int>(limit)));
  return _mm256_movemask_epi8(_mm256_cmpeq_epi32(largest, a.v)) != 0;
}
inline Floats signed_to_float(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Ints bits_of(Floats a) { return {_mm256_castps_si256(a.v)}; }
inline Floats float_of_bits(Ints a) { return {_mm256_castsi256_ps(a.v)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Floats divide(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Floats square_root(Floats a) { return {_mm256_sqrt_ps(a.v)}; }
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats square_root_of_normal(Floats a) { return square_root(a); }
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Floats unit_step(Floats a) { return {_mm256_blendv_ps(_mm256_set1_ps(1.0f), _mm256_setzero_ps(), a.v)}; }
inline Floats sign_of(Floats a) {
  const __m256 sign = _mm256_and_ps(a.v, _mm256_set1_ps(-0.0f));
  const __m256 is_not_zero = _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NEQ_OQ);
  return {_mm256_and_ps(is_not_zero, _mm256_or_ps(sign, _mm256_set1_ps(1.0f)))};
}

// The sum of the lanes: l and l + 4, then l and l + 2, 1.
inline float halving_sum(Floats a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Words of a group as pairs: words 0 and 2 of each block side by side, and words 1 and 3.
struct Pairs {
  Ints first[vectors], second[vectors];
};

inline Ints merge(__m256i even, __m256i odd) {
  return {_mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xa0), 0xaa)};
}

inline Pairs pair_up(const Words<Counters>& words) {
  const auto& [a, b, c, d] = words.w;
  return {{merge(a.v[0], c.v[0]), merge(a.v[1], c.v[1])}, {merge(b.v[0], d.v[0]), merge(b.v[1], d.v[1])}};
}

inline void in_order(const Ints (&first)[vectors], const Ints (&second)[vectors], Ints (&out)[2 * vectors]) {
  for (int j = 0; j < vectors; ++j) {
    out[2 * j] = {_mm256_unpacklo_epi32(first[j].v, second[j].v)};
    out[2 * j + 1] = {_mm256_unpackhi_epi32(first[j].v, second[j].v)};
  }
}
inline void in_order(const Floats (&first)[vectors], const Floats (&second)[vectors], Floats (&out)[2 * vectors]) {
  for (int j = 0; j < vectors; ++j) {
    out[2 * j] = {_mm256_unpacklo_ps(first[j].v, second[j].v)};
    out[2 * j + 1] = {_mm256_unpackhi_ps(first[j].v, second[j].v)};
  }
}

inline Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Floats load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Floats load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Ints load_words(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Ints load_words(const int8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
// The first `count` lanes from memory, the others zero; nothing beyond is read.
inline Floats load_first(const float* p, int count) {
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return {_mm256_maskload_ps(p, mask)};
}
inline void store(float* p, Floats a) { _mm256_storeu_ps(p, a.v); }
inline void store(uint32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
// The low bits of each lane; for 16 of them the others are zero.
inline void store_low(uint16_t* p, Ints a) {
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
}
inline void store_low(int8_t* p, Ints a) {
  const __m256i lowest = _mm256_setr_epi32(0x0c080400, -1, -1, -1, 0x0c080400, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(a.v, lowest);
  const __m128i narrow = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow);
}
inline void store(BFloat16* p, Floats a) {
  const __m256i bits = _mm256_castps_si256(a.v), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i not_a_number = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, quiet, not_a_number), 16);
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
}
inline void store(Half* p, Floats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
constexpr bool truncates_to_half = true;

// Two packs in float16, rounded toward zero.
inline __m256i truncated(Floats a, Floats b) {
  const __m128i first = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __m128i second = _mm256_cvtps_ph(b.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
}
// One bit is set where a magnitude is above 0x0400, the smallest normal number, and not above 0x4400, which is 4:
// what is rounded to such a pattern was neither subnormal nor too large for float16.
inline __m256i range_bits(__m256i halves) { return _mm256_add_epi16(halves, _mm256_set1_epi16(0x3bff)); }
inline bool all_in_range(__m256i bits) { return _mm256_testc_si256(bits, _mm256_set1_epi16(0x4000)); }
// Whether all lanes are in range, so that what was written is right.
inline bool store_truncated(Half* p, Floats a, Floats b) {
  const __m256i halves = truncated(a, b);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  return all_in_range(range_bits(halves));
}
// The same for parts of 24 bits: the patterns of a and b hold the number plus half a unit of each part. Lanes have
// to be in range before as well.
inline bool replace_split(Half* p, int8_t* residuals, Ints a, Ints b) {
  const __m256i before = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i halves = truncated(float_of_bits(a), float_of_bits(b));
  const bool in_range = all_in_range(_mm256_and_si256(range_bits(before), range_bits(halves)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  const __m256i words = _mm256_blend_epi16(_mm256_srli_epi32(a.v, 5), _mm256_slli_epi32(b.v, 11), 0xaa);
  const __m256i lowest = _mm256_setr_epi32(0x0c080400, 0x0e0a0602, -1, -1, 0x0c080400, 0x0e0a0602, -1, -1);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(words, lowest), order);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(residuals),
                   _mm_xor_si128(_mm256_castsi256_si128(bytes), _mm_set1_epi8(-128)));
  return in_range;
}

// The words of a group of blocks in the order of their number.
template <int rounds>
inline __attribute__((always_inline)) void store_words(uint32_t* p, const Words<Counters>& counters,
                                                       const NarrowKeys<rounds>& keys) {
  const Words<Counters> state = philox4x32<rounds - 1>(counters, keys);
  const Words<LastCounters> last{
      {LastCounters(state.w[0]), LastCounters(state.w[1]), LastCounters(state.w[2]), LastCounters(state.w[3])}};
  const Words<LastCounters> words = philox4x32<1>(last, keys.from(rounds - 1));
  float* const to = reinterpret_cast<float*>(p);
  for (int j = 0; j < vectors; ++j) {
    const __m256 even = _mm256_castsi256_ps(words.w[0].v[j]), odd = _mm256_castsi256_ps(words.w[2].v[j]);
    _mm256_storeu_ps(to + 2 * j * lanes, _mm256_shuffle_ps(even, odd, 0x11));
    _mm256_storeu_ps(to + (2 * j + 1) * lanes, _mm256_shuffle_ps(even, odd, 0xbb));
  }
}

// Signs of consecutive elements whose first bit is `bit` of `word`.
inline Floats signs(uint32_t word, unsigned bit) {
  const __m256i shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  const __m256i bits = _mm256_set1_epi32(static_cast<int>(word >> bit));
  const __m256i top = _mm256_and_si256(_mm256_sllv_epi32(bits, shifts), _mm256_set1_epi32(INT32_MIN));
  return {_mm256_castsi256_ps(_mm256_or_si256(top, _mm256_set1_epi32(0x3f800000)))};
}

}  // namespace zoext::cpu::avx2

namespace zoext {

template <>
struct Lanes<cpu::avx2::Floats> {
  using Word = cpu::avx2::Ints;
  static inline cpu::avx2::Floats fill(float a) { return {_mm256_set1_ps(a)}; }
  static inline cpu::avx2::Ints fill_word(uint32_t word) { return {_mm256_set1_epi32(static_cast<int>(word))}; }
};

}  // namespace zoext
