// The moments of a window of estimates and the step they make. `count` is a multiple of `tile_alignment`.

// m and v take in the estimate g = coefficient * z: as the sum of one term, since x + (-0) is x.
template <class Number>
inline __attribute__((always_inline)) auto add_moments_to(Number* m, Number* v, Number coefficient,
                                                          Number first_weight, Number second_weight) {
  const auto c = fill(coefficient), first = fill(first_weight), second = fill(second_weight);
  return [=](const Floats* z, int packs, int64_t offset) __attribute__((always_inline)) {
    for (int j = 0; j < packs; ++j, offset += lanes) {
      auto mean = load(m + offset), square = load(v + offset);
      add_moments(first, second, multiply(c, pack_of<Number>(z[j])), mean, square);
      store(m + offset, mean);
      store(v + offset, square);
    }
  };
}

template <class Number>
void add_moments_of_normals(const Field& field, Number coefficient, Number first_weight, Number second_weight,
                            uint64_t index, int64_t count, Number* m, Number* v, Upcoming upcoming) {
  for_each_normals(field, index, count, upcoming, add_moments_to(m, v, coefficient, first_weight, second_weight));
}

template <class Number>
void add_moments_of_signs(const Field& field, Number coefficient, Number first_weight, Number second_weight,
                          uint64_t index, int64_t count, Number* m, Number* v, Upcoming upcoming) {
  for_each_signs(field, index, count, upcoming, add_moments_to(m, v, coefficient, first_weight, second_weight));
}

template <class Number>
void add_moments_of_estimates(Number first_weight, Number second_weight, const Number* g, int64_t count, Number* m,
                              Number* v) {
  const auto first = fill(first_weight), second = fill(second_weight);
  for (int64_t i = 0; i < count; i += lanes) {
    auto mean = load(m + i), square = load(v + i);
    add_moments(first, second, load(g + i), mean, square);
    store(m + i, mean);
    store(v + i, square);
  }
}

template <class Number>
void step_of_estimates(const Estimate<Number>* estimates, int64_t estimates_count, Number minus_lr, Number eps,
                       int64_t count, Number* change) {
  constexpr int packs = 4;  // whose chains of additions overlap
  static_assert(tile_alignment % (packs * lanes) == 0);
  const auto rate = fill(minus_lr), delta = fill(eps);
  for (int64_t i = 0; i < count; i += packs * lanes) {
    Pack<Number> m[packs], v[packs];
    for (auto& pack : m) pack = fill(Number{empty_sum});
    for (auto& pack : v) pack = fill(Number{0});
    for (const Estimate<Number>* one = estimates; one != estimates + estimates_count; ++one) {
      const auto first = fill(one->first_weight), second = fill(one->second_weight);
      for (int j = 0; j < packs; ++j) add_moments(first, second, load(one->g + i + j * lanes), m[j], v[j]);
    }
    for (int j = 0; j < packs; ++j) store(change + i + j * lanes, moments_step(rate, delta, m[j], v[j]));
  }
}

template <class Number>
void step(Number minus_lr, Number eps, const Number* m, const Number* v, int64_t count, Number* change) {
  const auto rate = fill(minus_lr), delta = fill(eps);
  for (int64_t i = 0; i < count; i += lanes)
    store(change + i, moments_step(rate, delta, load(m + i), load(v + i)));
}
