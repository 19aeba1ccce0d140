// What is read from and written to weights.

// theta + (sum - decay theta) in lanes.
inline __attribute__((always_inline)) auto displacement(float decay) {
  const Floats one = fill(1.0f), minus_decay = fill(-decay);
  const bool decays = contributes(decay);
  return [=](Floats value, Floats change) __attribute__((always_inline)) {
    if (decays) change = fused_multiply_add(minus_decay, value, change);
    return fused_multiply_add(one, value, change);
  };
}

template <class Number>
inline Number displaced(Number value, Number sum, Number decay) {
  return value + add_decay<Number>(decay, value, sum);
}

template <class Storage>
void displace(Storage* out, const Storage* theta, const typename Arithmetic<Storage>::type* sum,
              typename Arithmetic<Storage>::type decay, int64_t count) {
  using Number = typename Arithmetic<Storage>::type;
  int64_t i = 0;
  if constexpr (sizeof(Number) == 4) {
    const auto displace_pack = displacement(decay);
    for (; i + lanes <= count; i += lanes) store(out + i, displace_pack(load(theta + i), load(sum + i)));
  }
  for (; i < count; ++i) out[i] = round_to_nearest<Storage>(displaced<Number>(widen(theta[i]), sum[i], decay));
}

// --- Weights in 16 bits: the rules of core/storage.h in lanes. A pack with a lane that rounds to nearest
// --- although the others do not, which is rare, goes through the core.

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
void displace_stochastically(Storage* out, const Storage* theta, const float* sum, float decay, int64_t count,
                             const uint16_t* random) {
  const auto displace_pack = displacement(decay);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Floats value = displace_pack(load(theta + i), load(sum + i));
    if (any_at_least(magnitudes(bits_of(value)), unbounded<Storage>)) {
      float values[lanes];
      store(values, value);
      for (int j = 0; j < lanes; ++j) out[i + j] = round_stochastically<Storage>(values[j], random[i + j]);
    } else {
      store_low(&out[i].bits, (long_pattern<Storage>(value) + load_words(random + i)) >> 16);
    }
  }
  for (; i < count; ++i)
    out[i] = round_stochastically<Storage>(displaced(widen(theta[i]), sum[i], decay), random[i]);
}

template <class Storage>
inline __attribute__((always_inline)) Floats join_pack(const Storage* theta, const int8_t* residuals) {
  const Ints pattern = (load_words(&theta->bits) << 16) + (load_words(residuals) << 8);
  if constexpr (std::is_same_v<Storage, Half>)
    if (any_at_least(magnitudes(pattern), 0x7c000000u - 0x8000u)) {  // that of infinity, less a residual
      float values[lanes];
      for (int j = 0; j < lanes; ++j) values[j] = join<Storage>({theta[j], residuals[j]});
      return load(values);
    }
  return of_long_pattern<Storage>(pattern);
}

// Magnitudes whose nearest number is infinity begin here.
template <class Storage>
constexpr uint32_t infinite = std::is_same_v<Storage, BFloat16> ? 0x7f7f7f80u : 0x477feff0u;

template <class Storage>
inline __attribute__((always_inline)) void split_pack(Floats value, Storage* theta, int8_t* residuals) {
  if (any_at_least(magnitudes(bits_of(value)), infinite<Storage>)) {
    float values[lanes];
    store(values, value);
    for (int j = 0; j < lanes; ++j) {
      const Split<Storage> parts = split<Storage>(values[j]);
      theta[j] = parts.nearest;
      residuals[j] = parts.residual;
    }
  } else {
    const Ints rounded = long_pattern<Storage>(value) + fill_word(0x80u);
    store_low(&theta->bits, (rounded + fill_word(0x8000u)) >> 16);
    store_low(residuals, rounded >> 8);
  }
}

template <class Storage>
void displace_split(Storage* theta, int8_t* residuals, const float* sum, float decay, int64_t count) {
  const auto displace_pack = displacement(decay);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    split_pack(displace_pack(join_pack(theta + i, residuals + i), load(sum + i)), theta + i, residuals + i);
  for (; i < count; ++i) {
    const float value = join<Storage>({theta[i], residuals[i]});
    const Split<Storage> parts = split<Storage>(displaced(value, sum[i], decay));
    theta[i] = parts.nearest;
    residuals[i] = parts.residual;
  }
}

// out = round(sum)
template <class Storage>
void write(Storage* out, const typename Arithmetic<Storage>::type* sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = round_to_nearest<Storage>(sum[i]);
}

template <class Storage>
void to_single(const Storage* from, int64_t count, float* out) {
  int64_t i = 0;
  if constexpr (can_round<Storage>)
    for (; i + lanes <= count; i += lanes) store(out + i, load(from + i));
  for (; i < count; ++i) out[i] = static_cast<float>(widen(from[i]));
}
