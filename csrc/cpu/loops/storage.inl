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
  if constexpr (std::is_same_v<Number, float>) {
    const auto displace_pack = displacement(decay);
    for (; i + lanes <= count; i += lanes) store(out + i, displace_pack(load(theta + i), load(sum + i)));
  }
  for (; i < count; ++i) out[i] = round_to_nearest<Storage>(displaced<Number>(widen(theta[i]), sum[i], decay));
}

// out = round(sum)
template <class Storage>
void write(Storage* out, const typename Arithmetic<Storage>::type* sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = round_to_nearest<Storage>(sum[i]);
}

template <class Storage>
void to_fp32(const Storage* from, int64_t count, float* out) {
  int64_t i = 0;
  if constexpr (can_round<Storage>)
    for (; i + lanes <= count; i += lanes) store(out + i, load(from + i));
  for (; i < count; ++i) out[i] = static_cast<float>(widen(from[i]));
}
