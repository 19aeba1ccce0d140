// What is read from and written to weights.

// out = round(theta + (sum - decay * theta)); `random` holds 16 bits an element, or nothing for
// rounding to nearest.
template <class Storage>
void displace(Storage* out, const Storage* theta, const typename Arithmetic<Storage>::type* sum,
              typename Arithmetic<Storage>::type decay, int64_t count, const uint16_t* random) {
  using Number = typename Arithmetic<Storage>::type;
  int64_t i = 0;
  if constexpr (can_round<Storage>) {
    if (random) {
      for (; i < count; ++i) {
        const Number value = widen(theta[i]);
        out[i] = round_stochastically<Storage>(value + add_decay<Number>(decay, value, sum[i]), random[i]);
      }
      return;
    }
  }
  if constexpr (sizeof(Number) == 4) {
    const Floats one = Lanes<Floats>::fill(1.0f), minus_decay = Lanes<Floats>::fill(-decay);
    const bool decays = contributes(decay);
    for (; i + lanes <= count; i += lanes) {
      const Floats value = load(theta + i);
      Floats change = load(sum + i);
      if (decays) change = fused_multiply_add(minus_decay, value, change);
      store(out + i, fused_multiply_add(one, value, change));
    }
  }
  for (; i < count; ++i) {
    const Number value = widen(theta[i]);
    out[i] = round_to_nearest<Storage>(value + add_decay<Number>(decay, value, sum[i]));
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
