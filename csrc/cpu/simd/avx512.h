// AVX-512 lanes. Included with the instruction set switched on.
#pragma once

#include <immintrin.h>

#include "../../core/normal.h"
#include "../../core/storage.h"

namespace zoext::cpu::avx512 {

struct Ints {
  __m512i v;
};
struct Floats {
  __m512 v;
};
// 32-bit words in the low halves of 64-bit lanes; the high halves hold anything. A product then
// needs no shuffle. Several vectors side by side keep the multipliers busy while one waits.
constexpr int vectors = 4;
struct Counters {
  __m512i v[vectors];
  Counters() = default;
  explicit Counters(uint32_t word) {
    for (__m512i& vector : v) vector = _mm512_set1_epi64(word);
  }
};

constexpr int lanes = 16;
constexpr int blocks_per_vector = 8;
constexpr int blocks_per_group = vectors * blocks_per_vector;

// The halves of each lane exchanged. A shuffle, not a shift: shifts share their port with the products.
inline __m512i exchanged(__m512i a) { return _mm512_shuffle_epi32(a, _MM_PERM_CDAB); }

inline Counters xor_of_three(Counters a, const Counters& b, __m512i key) {
  for (int j = 0; j < vectors; ++j) a.v[j] = _mm512_ternarylogic_epi32(a.v[j], b.v[j], key, 0x96);
  return a;
}

// Counters before the last round, after which both halves of a lane are needed: it makes words 0 and 2, in high
// halves, beside words 1 and 3.
struct LastCounters {
  __m512i v[vectors];
  LastCounters() = default;
  explicit LastCounters(const Counters& a) {
    for (int j = 0; j < vectors; ++j) v[j] = a.v[j];
  }
};

inline LastCounters xor_of_three(const LastCounters& product, const LastCounters& b, __m512i key) {
  constexpr __mmask16 high_halves = 0xaaaa;
  LastCounters words;
  for (int j = 0; j < vectors; ++j)
    words.v[j] = _mm512_mask_ternarylogic_epi32(product.v[j], high_halves, exchanged(b.v[j]), key, 0x96);
  return words;
}

// The keys of a seed in all lanes, in memory: kept from the compiler's eyes, which would make each
// one again in every iteration.
template <int rounds>
struct Keys {
  __m512i keys[rounds][2];

  explicit Keys(uint64_t seed) {
    for (int round = 0; round < rounds; ++round) {
      keys[round][0] = _mm512_set1_epi32(static_cast<int>(RoundKeys{seed}.first(round)));
      keys[round][1] = _mm512_set1_epi32(static_cast<int>(RoundKeys{seed}.second(round)));
    }
    asm volatile("" : : "r"(keys) : "memory");
  }
  __m512i first(int round) const { return keys[round][0]; }
  __m512i second(int round) const { return keys[round][1]; }
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
  __m512i first(int round) const { return _mm512_set1_epi32(static_cast<int>(keys[round][0])); }
  __m512i second(int round) const { return _mm512_set1_epi32(static_cast<int>(keys[round][1])); }

  // Those of the rounds from `start` on.
  struct Later {
    const NarrowKeys& all;
    int start;
    __m512i first(int round) const { return all.first(start + round); }
    __m512i second(int round) const { return all.second(start + round); }
  };
  Later from(int round) const { return {*this, round}; }
};

inline Product<Counters> multiply_wide(uint32_t constant, const Counters& a) {
  const __m512i factor = _mm512_set1_epi64(constant);
  Product<Counters> product;
  for (int j = 0; j < vectors; ++j) {
    product.low.v[j] = _mm512_mul_epu32(factor, a.v[j]);
    product.high.v[j] = exchanged(product.low.v[j]);
  }
  return product;
}

inline Product<LastCounters> multiply_wide(uint32_t constant, const LastCounters& a) {
  const __m512i factor = _mm512_set1_epi64(constant);
  LastCounters product;
  for (int j = 0; j < vectors; ++j) product.v[j] = _mm512_mul_epu32(factor, a.v[j]);
  return {product, product};
}

// In the order that makes `in_order` two unpack instructions a vector.
inline Counters consecutive_blocks(uint32_t first) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  Counters blocks;
  for (int j = 0; j < vectors; ++j)
    blocks.v[j] = _mm512_add_epi64(_mm512_set1_epi64(first),
                                   _mm512_add_epi64(order, _mm512_set1_epi64(j * blocks_per_vector)));
  return blocks;
}

inline void advance(Counters& blocks) {
  for (__m512i& vector : blocks.v) vector = _mm512_add_epi64(vector, _mm512_set1_epi64(blocks_per_group));
}

inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Ints operator~(Ints a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi32(-1))}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints operator<<(Ints a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
inline Ints operator>>(Ints a, int n) { return {_mm512_srli_epi32(a.v, n)}; }
inline Ints smaller_signed(Ints a, Ints b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline Ints larger(Ints a, Ints b) { return {_mm512_max_epu32(a.v, b.v)}; }
// Bits of `a` where `mask` has ones, else of `b`.
inline Ints choose(uint32_t mask, Ints a, Ints b) {
  return {_mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(mask)), a.v, b.v, 0xca)};
}
// Whether a lane, read without a sign, is at least `limit`.
inline bool any_at_least(Ints a, uint32_t limit) {
  return _mm512_cmpge_epu32_mask(a.v, _mm512_set1_epi32(static_cast<int>(limit))) != 0;
}
inline Floats signed_to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints bits_of(Floats a) { return {_mm512_castps_si512(a.v)}; }
inline Floats float_of_bits(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats divide(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats square_root(Floats a) { return {_mm512_sqrt_ps(a.v)}; }
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats square_root_of_normal(Floats a) { return square_root(a); }
inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats unit_step(Floats a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GE_OQ), _mm512_set1_ps(1.0f))};
}
inline Floats sign_of(Floats a) {
  const __m512 signed_one = _mm512_or_ps(_mm512_and_ps(a.v, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1.0f));
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_OQ), signed_one)};
}

// The sum of the lanes: l and l + 8, then l and l + 4, 2, 1.
inline float halving_sum(Floats a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Words of a group as pairs: words 0 and 2 of each block side by side, and words 1 and 3.
struct Pairs {
  Ints first[vectors], second[vectors];
};

inline Ints merge(__m512i even, __m512i odd) {
  return {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_shuffle_epi32(odd, static_cast<_MM_PERM_ENUM>(0xa0)))};
}

inline Pairs pair_up(const Words<Counters>& words) {
  Pairs pairs;
  for (int j = 0; j < vectors; ++j) {
    pairs.first[j] = merge(words.w[0].v[j], words.w[2].v[j]);
    pairs.second[j] = merge(words.w[1].v[j], words.w[3].v[j]);
  }
  return pairs;
}

inline void in_order(const Ints (&first)[vectors], const Ints (&second)[vectors], Ints (&out)[2 * vectors]) {
  for (int j = 0; j < vectors; ++j) {
    out[2 * j] = {_mm512_unpacklo_epi32(first[j].v, second[j].v)};
    out[2 * j + 1] = {_mm512_unpackhi_epi32(first[j].v, second[j].v)};
  }
}
inline void in_order(const Floats (&first)[vectors], const Floats (&second)[vectors], Floats (&out)[2 * vectors]) {
  for (int j = 0; j < vectors; ++j) {
    out[2 * j] = {_mm512_unpacklo_ps(first[j].v, second[j].v)};
    out[2 * j + 1] = {_mm512_unpackhi_ps(first[j].v, second[j].v)};
  }
}

inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Floats load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Ints load_words(const uint16_t* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Ints load_words(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// The first `count` lanes from memory, the others zero; nothing beyond is read.
inline Floats load_first(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
}
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline void store(uint32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
// The low bits of each lane; for 16 of them the others are zero.
inline void store_low(uint16_t* p, Ints a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
inline void store_low(int8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline void store(BFloat16* p, Floats a) {
  const __m512i bits = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  const __mmask16 not_a_number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_blend_epi32(not_a_number, nearest, quiet);
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}
inline void store(Half* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
constexpr bool truncates_to_half = true;

// Two packs in float16, rounded toward zero.
inline __m512i truncated(Floats a, Floats b) {
  const __m256i first = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __m256i second = _mm512_cvtps_ph(b.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}
// Not a magnitude above 0x0400, the smallest normal number, and up to 0x7400, which is 2^14: what is rounded to
// such a pattern was neither subnormal nor too large for float16.
inline __mmask32 out_of_range(__m512i halves) {
  const __m512i moved = _mm512_add_epi16(halves, _mm512_set1_epi16(0x0bff));
  return _mm512_testn_epi16_mask(moved, _mm512_set1_epi16(0x7000));
}
// Whether all lanes are in range, so that what was written is right.
inline bool store_truncated(Half* p, Floats a, Floats b) {
  const __m512i halves = truncated(a, b);
  _mm512_storeu_si512(p, halves);
  return out_of_range(halves) == 0;
}
// The same for parts of 24 bits: the patterns of a and b hold the number plus half a unit of each part. Lanes have
// to be in range before as well.
inline bool replace_split(Half* p, int8_t* residuals, Ints a, Ints b) {
  const __m512i halves = truncated(float_of_bits(a), float_of_bits(b));
  const bool in_range = _kortestz_mask32_u8(out_of_range(_mm512_loadu_si512(p)), out_of_range(halves));
  _mm512_storeu_si512(p, halves);
  const __m512i words = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff), _mm512_srli_epi32(a.v, 5),
                                                  _mm512_slli_epi32(b.v, 11), 0xca);
  const __m512i lowest = _mm512_set4_epi32(-1, -1, 0x0e0a0602, 0x0c080400);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(words, lowest));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(residuals),
                      _mm256_xor_si256(_mm512_castsi512_si256(bytes), _mm256_set1_epi8(-128)));
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
  for (int j = 0; j < vectors; ++j) {
    const __m512 even = _mm512_castsi512_ps(words.w[0].v[j]), odd = _mm512_castsi512_ps(words.w[2].v[j]);
    _mm512_storeu_ps(p + 2 * j * lanes, _mm512_shuffle_ps(even, odd, 0x11));
    _mm512_storeu_ps(p + (2 * j + 1) * lanes, _mm512_shuffle_ps(even, odd, 0xbb));
  }
}

// Signs of consecutive elements whose first bit is `bit` of `word`.
inline Floats signs(uint32_t word, unsigned bit) {
  const __mmask16 minus = static_cast<__mmask16>(word >> bit);
  return {_mm512_mask_blend_ps(minus, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f))};
}

}  // namespace zoext::cpu::avx512

namespace zoext {

template <>
struct Lanes<cpu::avx512::Floats> {
  using Word = cpu::avx512::Ints;
  static inline cpu::avx512::Floats fill(float a) { return {_mm512_set1_ps(a)}; }
  static inline cpu::avx512::Ints fill_word(uint32_t word) { return {_mm512_set1_epi32(static_cast<int>(word))}; }
};

}  // namespace zoext
