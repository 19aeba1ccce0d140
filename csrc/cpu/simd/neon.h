// NEON lanes.
#pragma once

#include <arm_neon.h>

#include "../../core/normal.h"
#include "../../core/storage.h"

namespace zoext::cpu::neon {

struct Ints {
  uint32x4_t v;
};
struct Floats {
  float32x4_t v;
};
// 32-bit words in the low halves of 64-bit lanes. Two vectors side by side keep the multipliers busy
// while the other one waits.
constexpr int vectors = 2;
struct Counters {
  uint64x2_t v[vectors];
  Counters() = default;
  explicit Counters(uint32_t word) : v{vdupq_n_u64(word), vdupq_n_u64(word)} {}
  Counters(uint64x2_t a, uint64x2_t b) : v{a, b} {}
};

constexpr int lanes = 4;
constexpr int blocks_per_vector = 2;
constexpr int blocks_per_group = vectors * blocks_per_vector;

inline Counters xor_of_three(Counters a, Counters b, uint32_t key) {
  const uint64x2_t k = vdupq_n_u64(key);
  return {veorq_u64(veorq_u64(a.v[0], b.v[0]), k), veorq_u64(veorq_u64(a.v[1], b.v[1]), k)};
}

template <int rounds>
using Keys = RoundKeys;
template <int rounds>
using NarrowKeys = RoundKeys;

inline Product<Counters> multiply_wide(uint32_t constant, Counters a) {
  const uint64x2_t p = vmull_n_u32(vmovn_u64(a.v[0]), constant), q = vmull_n_u32(vmovn_u64(a.v[1]), constant);
  return {{vshrq_n_u64(p, 32), vshrq_n_u64(q, 32)}, {p, q}};
}

inline Counters consecutive_blocks(uint32_t first) {
  const uint64x2_t order = {0, 1};
  return {vaddq_u64(vdupq_n_u64(first), order), vaddq_u64(vdupq_n_u64(first + blocks_per_vector), order)};
}

inline void advance(Counters& blocks) {
  for (uint64x2_t& vector : blocks.v) vector = vaddq_u64(vector, vdupq_n_u64(blocks_per_group));
}

inline Ints operator&(Ints a, Ints b) { return {vandq_u32(a.v, b.v)}; }
inline Ints operator|(Ints a, Ints b) { return {vorrq_u32(a.v, b.v)}; }
inline Ints operator^(Ints a, Ints b) { return {veorq_u32(a.v, b.v)}; }
inline Ints operator~(Ints a) { return {vmvnq_u32(a.v)}; }
inline Ints operator+(Ints a, Ints b) { return {vaddq_u32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {vsubq_u32(a.v, b.v)}; }
inline Ints operator<<(Ints a, int n) { return {vshlq_u32(a.v, vdupq_n_s32(n))}; }
inline Ints operator>>(Ints a, int n) { return {vshlq_u32(a.v, vdupq_n_s32(-n))}; }
inline Ints smaller_signed(Ints a, Ints b) {
  return {vreinterpretq_u32_s32(vminq_s32(vreinterpretq_s32_u32(a.v), vreinterpretq_s32_u32(b.v)))};
}
inline Ints larger(Ints a, Ints b) { return {vmaxq_u32(a.v, b.v)}; }
// Bits of `a` where `mask` has ones, else of `b`.
inline Ints choose(uint32_t mask, Ints a, Ints b) { return {vbslq_u32(vdupq_n_u32(mask), a.v, b.v)}; }
// Whether a lane, read without a sign, is at least `limit`.
inline bool any_at_least(Ints a, uint32_t limit) { return vmaxvq_u32(a.v) >= limit; }
inline Floats signed_to_float(Ints a) { return {vcvtq_f32_s32(vreinterpretq_s32_u32(a.v))}; }
inline Ints bits_of(Floats a) { return {vreinterpretq_u32_f32(a.v)}; }
inline Floats float_of_bits(Ints a) { return {vreinterpretq_f32_u32(a.v)}; }
inline Floats operator+(Floats a, Floats b) { return {vaddq_f32(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {vsubq_f32(a.v, b.v)}; }
inline Floats multiply(Floats a, Floats b) { return {vmulq_f32(a.v, b.v)}; }
inline Floats divide(Floats a, Floats b) { return {vdivq_f32(a.v, b.v)}; }
inline Floats square_root(Floats a) { return {vsqrtq_f32(a.v)}; }
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Floats square_root_of_normal(Floats a) { return square_root(a); }
inline Floats smaller(Floats a, Floats b) { return {vminq_f32(a.v, b.v)}; }
inline Floats unit_step(Floats a) { return {vbslq_f32(vcltzq_f32(a.v), vdupq_n_f32(0.0f), vdupq_n_f32(1.0f))}; }
inline Floats sign_of(Floats a) {
  const float32x4_t signed_one = vbslq_f32(vdupq_n_u32(0x80000000u), a.v, vdupq_n_f32(1.0f));
  const uint32x4_t has_sign = vorrq_u32(vcgtzq_f32(a.v), vcltzq_f32(a.v));
  return {vreinterpretq_f32_u32(vandq_u32(has_sign, vreinterpretq_u32_f32(signed_one)))};
}

// The sum of the lanes: l and l + 2, then l and l + 1.
inline float halving_sum(Floats a) {
  const float32x2_t two = vadd_f32(vget_low_f32(a.v), vget_high_f32(a.v));
  return vget_lane_f32(vpadd_f32(two, two), 0);
}

// Words of a group as pairs: words 0 and 2 of each block side by side, and words 1 and 3.
struct Pairs {
  Ints first[vectors], second[vectors];
};

inline Ints merge(uint64x2_t even, uint64x2_t odd) {
  return {vtrn1q_u32(vreinterpretq_u32_u64(even), vreinterpretq_u32_u64(odd))};
}

inline Pairs pair_up(const Words<Counters>& words) {
  const auto& [a, b, c, d] = words.w;
  return {{merge(a.v[0], c.v[0]), merge(a.v[1], c.v[1])}, {merge(b.v[0], d.v[0]), merge(b.v[1], d.v[1])}};
}

inline void in_order(const Ints (&first)[vectors], const Ints (&second)[vectors], Ints (&out)[2 * vectors]) {
  for (int j = 0; j < vectors; ++j) {
    out[2 * j] = {vzip1q_u32(first[j].v, second[j].v)};
    out[2 * j + 1] = {vzip2q_u32(first[j].v, second[j].v)};
  }
}
inline void in_order(const Floats (&first)[vectors], const Floats (&second)[vectors], Floats (&out)[2 * vectors]) {
  for (int j = 0; j < vectors; ++j) {
    out[2 * j] = {vzip1q_f32(first[j].v, second[j].v)};
    out[2 * j + 1] = {vzip2q_f32(first[j].v, second[j].v)};
  }
}

inline Floats load(const float* p) { return {vld1q_f32(p)}; }
inline Floats load(const BFloat16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
}
inline Floats load(const Half* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}
inline Ints load_words(const uint16_t* p) { return {vmovl_u16(vld1_u16(p))}; }
inline Ints load_words(const int8_t* p) {
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes)));
  return {vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(wide)))};
}
// The first `count` lanes from memory, the others zero; nothing beyond is read.
inline Floats load_first(const float* p, int count) {
  float padded[lanes] = {};
  for (int j = 0; j < count; ++j) padded[j] = p[j];
  return {vld1q_f32(padded)};
}
inline void store(float* p, Floats a) { vst1q_f32(p, a.v); }
inline void store(uint32_t* p, Ints a) { vst1q_u32(p, a.v); }
// The low bits of each lane; for 16 of them the others are zero.
inline void store_low(uint16_t* p, Ints a) { vst1_u16(p, vmovn_u32(a.v)); }
inline void store_low(int8_t* p, Ints a) {
  const uint16x4_t halves = vmovn_u32(a.v);
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))), 0);
  std::memcpy(p, &bytes, sizeof bytes);
}
inline void store(BFloat16* p, Floats a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
  const uint32x4_t rounded = vbslq_u32(vceqq_f32(a.v, a.v), nearest, quiet);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(rounded, 16));
}
inline void store(Half* p, Floats a) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
}
constexpr bool truncates_to_half = false;

// The words of a group of blocks in the order of their number.
template <int rounds>
inline void store_words(uint32_t* p, const Words<Counters>& counters, const NarrowKeys<rounds>& keys) {
  const Pairs pairs = pair_up(philox4x32<rounds>(counters, keys));
  Ints ordered[2 * vectors];
  in_order(pairs.first, pairs.second, ordered);
  for (int j = 0; j < 2 * vectors; ++j) store(p + j * lanes, ordered[j]);
}

// Signs of consecutive elements whose first bit is `bit` of `word`.
inline Floats signs(uint32_t word, unsigned bit) {
  const int32x4_t shifts = {31, 30, 29, 28};
  const uint32x4_t top = vandq_u32(vshlq_u32(vdupq_n_u32(word >> bit), shifts), vdupq_n_u32(0x80000000u));
  return {vreinterpretq_f32_u32(vorrq_u32(top, vdupq_n_u32(0x3f800000)))};
}

}  // namespace zoext::cpu::neon

namespace zoext {

template <>
struct Lanes<cpu::neon::Floats> {
  using Word = cpu::neon::Ints;
  static inline cpu::neon::Floats fill(float a) { return {vdupq_n_f32(a)}; }
  static inline cpu::neon::Ints fill_word(uint32_t word) { return {vdupq_n_u32(word)}; }
};

}  // namespace zoext
