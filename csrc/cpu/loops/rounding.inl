// Stochastic rounding and residuals of weights in 16 bits: the formulas of core/storage.h in lanes. A pack of
// which only some lanes round to nearest is left to the core, as are the last elements. Where the processor can
// truncate to float16, pairs of packs of normal numbers need neither long patterns nor a branch; pairs with other
// numbers are computed again afterwards. The loops are functions without calls, so that their constants stay in
// registers.

// f(displace_pack), specialised for no decay, which is most frequent.
template <class F>
inline __attribute__((always_inline)) auto with_displacement(float decay, F f) {
  return contributes(decay) ? f(displacement(decay)) : f(displacement(0.0f));
}

inline Ints fill_word(uint32_t word) { return Lanes<Floats>::fill_word(word); }
inline Ints magnitudes(Ints bits) { return bits & fill_word(0x7fffffffu); }

constexpr uint32_t sign_bit = 0x80000000u;

// Numbers as patterns of their storage with 16 more bits behind them. Those of float16 are the core's
// `half_pattern`, here without numbers that are subnormal in float32, which make some processors stop for a
// hundred cycles: (a + 2^-14) / 2 counts float16's subnormal numbers, and is the larger one just for these.
// Then the exponents fit into three bits less, of which the first is the same.
template <class Storage>
inline __attribute__((always_inline)) Ints long_pattern(Floats a) {
  const Ints bits = bits_of(a);
  if constexpr (std::is_same_v<Storage, BFloat16>) return bits;
  const Floats smallest_normal = float_of_bits(choose(sign_bit, bits, bits_of(fill(0x1p-15f))));
  const Ints counted = bits_of(fused_multiply_add(fill(0.5f), a, smallest_normal));
  return choose(0xc0000000u, bits, larger(bits, counted) << 3);
}

// The inverse.
template <class Storage>
inline __attribute__((always_inline)) Floats of_long_pattern(Ints pattern) {
  if constexpr (std::is_same_v<Storage, BFloat16>) return float_of_bits(pattern);
  const Floats normal = float_of_bits((magnitudes(pattern) >> 3) + fill_word(0x38000000u));
  const Floats magnitude = smaller(fused_multiply_add(fill(2.0f), normal, fill(-0x1p-14f)), normal);
  return float_of_bits(choose(sign_bit, pattern, bits_of(magnitude)));
}

// Magnitudes that are rounded to nearest begin here.
template <class Storage>
constexpr uint32_t unbounded = std::is_same_v<Storage, BFloat16> ? 0x7f7f0000u : 0x477fe000u;

template <class Storage>
constexpr bool truncates = std::is_same_v<Storage, Half> && truncates_to_half;

constexpr int pair = 2 * lanes;

// Weights before a loop over pairs of packs, which may leave some of them wrong.
template <class Storage>
struct Before {
  alignas(64) Storage theta[tile_elements];
  alignas(64) int8_t residuals[tile_elements];
};

// spoiled = loop(first element, count, before) and redo(first element, count, before, spoiled) for stretches of
// whole pairs; how many elements they have. The last pair of a stretch has the lowest bit of `spoiled`.
template <class Storage, class Loop, class Redo>
inline __attribute__((always_inline)) int64_t displace_pairs(int64_t count, Loop loop, Redo redo) {
  static_assert(!truncates<Storage> || tile_elements / pair <= 64, "a bit for each pair");
  const int64_t whole = count / pair * pair;
  Before<Storage> before;
  for (int64_t i = 0; i < whole; i += tile_elements) {
    const int64_t part = whole - i < tile_elements ? whole - i : tile_elements;
    if (const uint64_t spoiled = loop(i, part, before)) redo(i, part, before, spoiled);
  }
  return whole;
}

// f(first element) for every spoiled pair.
template <class F>
inline __attribute__((always_inline)) void for_each_spoiled(uint64_t spoiled, int64_t count, F f) {
  for (; spoiled; spoiled &= spoiled - 1) f(count - pair * (1 + __builtin_ctzll(spoiled)));
}

// Rounds by the random bits of each lane, unless a lane is rounded to nearest; whether none is.
template <class Storage>
inline __attribute__((always_inline)) bool store_stochastically(Storage* out, Floats value,
                                                                const uint16_t* random) {
  if (any_at_least(magnitudes(bits_of(value)), unbounded<Storage>)) return false;
  store_low(&out->bits, (long_pattern<Storage>(value) + load_words(random)) >> 16);
  return true;
}

inline Floats add_to_pattern(Floats a, Ints n) { return float_of_bits(bits_of(a) + n); }

// Normal numbers of float16. Pairs with others are spoiled; a bit for each of them.
template <class Storage>
__attribute__((noinline)) uint64_t displace_pairs_stochastically(Storage* out, const Storage* theta,
                                                                 const float* sum, float decay, int64_t count,
                                                                 const uint16_t* random, Before<Storage>& before) {
  return with_displacement(decay, [=, &before](auto displace_pack) __attribute__((always_inline)) {
    uint64_t spoiled = 0;
    for (int64_t i = 0; i < count; i += pair) {
      std::memcpy(before.theta + i, theta + i, pair * sizeof(Storage));
      const auto rounded = [&](int64_t j) __attribute__((always_inline)) {
        return add_to_pattern(displace_pack(load(theta + j), load(sum + j)), load_words(random + j) >> 3);
      };
      spoiled = 2 * spoiled + !store_truncated(out + i, rounded(i), rounded(i + lanes));
    }
    return spoiled;
  });
}

// Packs until a lane is rounded to nearest; how many elements they have.
template <class Storage>
__attribute__((noinline)) int64_t displace_packs_stochastically(Storage* out, const Storage* theta,
                                                                const float* sum, float decay, int64_t count,
                                                                const uint16_t* random) {
  return with_displacement(decay, [=](auto displace_pack) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
      if (!store_stochastically(out + i, displace_pack(load(theta + i), load(sum + i)), random + i)) break;
    return i;
  });
}

template <class Storage>
void displace_any_stochastically(Storage* out, const Storage* theta, const float* sum, float decay, int64_t count,
                                 const uint16_t* random) {
  for (int64_t i = 0; i < count;) {
    i += displace_packs_stochastically(out + i, theta + i, sum + i, decay, count - i, random + i);
    for (const int64_t end = count - i < lanes ? count : i + lanes; i < end; ++i)
      out[i] = round_stochastically<Storage>(displaced(widen(theta[i]), sum[i], decay), random[i]);
  }
}

template <class Storage>
__attribute__((noinline)) void displace_spoiled_stochastically(Storage* out, const float* sum, float decay,
                                                               const uint16_t* random, uint64_t spoiled,
                                                               int64_t count, const Before<Storage>& before) {
  const auto displace_pack = displacement(decay);
  for_each_spoiled(spoiled, count, [=, &before](int64_t first) __attribute__((always_inline)) {
    for (int64_t i = first; i < first + pair; i += lanes)
      if (!store_stochastically(out + i, displace_pack(load(before.theta + i), load(sum + i)), random + i))
        displace_any_stochastically(out + i, before.theta + i, sum + i, decay, lanes, random + i);
  });
}

template <class Storage>
void displace_stochastically(Storage* out, const Storage* theta, const float* sum, float decay, int64_t count,
                             const uint16_t* random) {
  int64_t i = 0;
  if constexpr (truncates<Storage>)
    i = displace_pairs<Storage>(
        count,
        [=](int64_t from, int64_t part, Before<Storage>& before) {
          return displace_pairs_stochastically(out + from, theta + from, sum + from, decay, part, random + from,
                                               before);
        },
        [=](int64_t from, int64_t part, const Before<Storage>& before, uint64_t spoiled) {
          displace_spoiled_stochastically(out + from, sum + from, decay, random + from, spoiled, part, before);
        });
  if (i < count) displace_any_stochastically(out + i, theta + i, sum + i, decay, count - i, random + i);
}

// Magnitudes without a residual begin here.
template <class Storage>
constexpr uint32_t unsplit = std::is_same_v<Storage, BFloat16> ? 0x7f7f7f80u : 0x477feff0u;

// Patterns of float16 that `of_long_pattern` does not read begin here: that of infinity, less a residual.
// Those below zero are among them.
constexpr uint32_t unreadable_half = 0x7c000000u - 0x8000u;

// Moves floats of 24 bits, unless a lane is not to be read or rounded so; whether none is.
template <class Storage, class DisplacePack>
inline __attribute__((always_inline)) bool displace_split_pack(Storage* theta, int8_t* residuals, const float* sum,
                                                               const DisplacePack& displace_pack) {
  const Ints pattern = (load_words(&theta->bits) << 16) + (load_words(residuals) << 8);
  if (std::is_same_v<Storage, Half> && any_at_least(magnitudes(pattern), unreadable_half)) return false;
  const Floats value = displace_pack(of_long_pattern<Storage>(pattern), load(sum));
  // The bits of both are at least as much as each: a pattern of bfloat16 that holds an infinity is found as well,
  // and what is found needlessly, on the way from less than 2 to more, is moved all the same.
  const Ints seen = std::is_same_v<Storage, Half> ? bits_of(value) : pattern | bits_of(value);
  if (any_at_least(magnitudes(seen), unsplit<Storage>)) return false;
  const Ints rounded = long_pattern<Storage>(value) + fill_word(0x80u);
  store_low(&theta->bits, (rounded + fill_word(0x8000u)) >> 16);
  store_low(residuals, rounded >> 8);
  return true;
}

// Half a unit of the 16 bits and of the 24, in a pattern of float32.
constexpr uint32_t half_units = 0x1000u + 0x10u;

template <class Storage>
__attribute__((noinline)) uint64_t displace_pairs_split(Storage* theta, int8_t* residuals, const float* sum,
                                                        float decay, int64_t count, Before<Storage>& before) {
  return with_displacement(decay, [=, &before](auto displace_pack) __attribute__((always_inline)) {
    uint64_t spoiled = 0;
    for (int64_t i = 0; i < count; i += pair) {
      std::memcpy(before.theta + i, theta + i, pair * sizeof(Storage));
      std::memcpy(before.residuals + i, residuals + i, pair);
      const auto rounded = [&](int64_t j) __attribute__((always_inline)) {
        const Floats value = add_to_pattern(load(theta + j), load_words(residuals + j) << 5);
        return bits_of(displace_pack(value, load(sum + j))) + fill_word(half_units);
      };
      spoiled = 2 * spoiled + !replace_split(theta + i, residuals + i, rounded(i), rounded(i + lanes));
    }
    return spoiled;
  });
}

template <class Storage>
__attribute__((noinline)) int64_t displace_packs_split(Storage* theta, int8_t* residuals, const float* sum,
                                                       float decay, int64_t count) {
  return with_displacement(decay, [=](auto displace_pack) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
      if (!displace_split_pack(theta + i, residuals + i, sum + i, displace_pack)) break;
    return i;
  });
}

template <class Storage>
void displace_any_split(Storage* theta, int8_t* residuals, const float* sum, float decay, int64_t count) {
  for (int64_t i = 0; i < count;) {
    i += displace_packs_split(theta + i, residuals + i, sum + i, decay, count - i);
    for (const int64_t end = count - i < lanes ? count : i + lanes; i < end; ++i) {
      const float value = join<Storage>({theta[i], residuals[i]});
      const Split<Storage> parts = split<Storage>(displaced(value, sum[i], decay));
      theta[i] = parts.nearest;
      residuals[i] = parts.residual;
    }
  }
}

template <class Storage>
__attribute__((noinline)) void displace_spoiled_split(Storage* theta, int8_t* residuals, const float* sum,
                                                      float decay, uint64_t spoiled, int64_t count,
                                                      const Before<Storage>& before) {
  const auto displace_pack = displacement(decay);
  for_each_spoiled(spoiled, count, [=, &before](int64_t first) __attribute__((always_inline)) {
    std::memcpy(theta + first, before.theta + first, pair * sizeof(Storage));
    std::memcpy(residuals + first, before.residuals + first, pair);
    for (int64_t i = first; i < first + pair; i += lanes)
      if (!displace_split_pack(theta + i, residuals + i, sum + i, displace_pack))
        displace_any_split(theta + i, residuals + i, sum + i, decay, lanes);
  });
}

template <class Storage>
void displace_split(Storage* theta, int8_t* residuals, const float* sum, float decay, int64_t count) {
  int64_t i = 0;
  if constexpr (truncates<Storage>)
    i = displace_pairs<Storage>(
        count,
        [=](int64_t from, int64_t part, Before<Storage>& before) {
          return displace_pairs_split(theta + from, residuals + from, sum + from, decay, part, before);
        },
        [=](int64_t from, int64_t part, const Before<Storage>& before, uint64_t spoiled) {
          displace_spoiled_split(theta + from, residuals + from, sum + from, decay, spoiled, part, before);
        });
  if (i < count) displace_any_split(theta + i, residuals + i, sum + i, decay, count - i);
}
