// The moments of a window of estimates and the moves that a rule makes of them. `count` is a multiple of
// `tile_alignment`.

// The moments at `m` and `v` take in the estimate g.
template <class Rule, class Number>
inline __attribute__((always_inline)) void add_estimate_at(Number* m, Number* v, const Pack<Number>& first_weight,
                                                           const Pack<Number>& second_weight,
                                                           const Pack<Number>& g) {
  store(m, add_first_moment(first_weight, g, load(m)));
  if constexpr (has_moments_of_elements<Rule>) store(v, add_second_moment(second_weight, g, load(v)));
}

// The estimate g = coefficient * z, as the sum of one term, since x + (-0) is x.
template <class Rule, class Number>
inline __attribute__((always_inline)) auto add_term_to(Number* m, Number* v, Number coefficient,
                                                       Number first_weight, Number second_weight) {
  const auto c = fill(coefficient), first = fill(first_weight), second = fill(second_weight);
  return [=](const Floats* z, int packs, int64_t offset) __attribute__((always_inline)) {
    for (int j = 0; j < packs; ++j, offset += lanes)
      add_estimate_at<Rule, Number>(m + offset, v + offset, first, second, multiply(c, pack_of<Number>(z[j])));
  };
}

template <class Rule, class Number>
void add_normals_to_moments(const Field& field, Number coefficient, Number first_weight, Number second_weight,
                            uint64_t index, int64_t count, Number* m, Number* v, Upcoming upcoming) {
  for_each_normals(field, index, count, upcoming,
                   add_term_to<Rule>(m, v, coefficient, first_weight, second_weight));
}

template <class Rule, class Number>
void add_signs_to_moments(const Field& field, Number coefficient, Number first_weight, Number second_weight,
                          uint64_t index, int64_t count, Number* m, Number* v, Upcoming upcoming) {
  for_each_signs(field, index, count, upcoming, add_term_to<Rule>(m, v, coefficient, first_weight, second_weight));
}

template <class Rule, class Number>
void add_estimate_to_moments(const Estimate<Number>& estimate, int64_t count, Number* m, Number* v) {
  const auto first = fill(estimate.first_weight), second = fill(estimate.second_weight);
  for (int64_t i = 0; i < count; i += lanes)
    add_estimate_at<Rule, Number>(m + i, v + i, first, second, load(estimate.g + i));
}

template <class Rule, class Number>
void move_moments(Scale<Number> scale, const Number* m, const Number* v, int64_t count, Number* change) {
  const auto minus_lr = fill(scale.minus_lr), eps = fill(scale.eps), shared_v = fill(scale.shared_v);
  for (int64_t i = 0; i < count; i += lanes) {
    auto second = shared_v;
    if constexpr (has_moments_of_elements<Rule>) second = load(v + i);
    store(change + i, Rule::move(minus_lr, eps, load(m + i), second));
  }
}

// Moments in registers take in the estimate g. Callers keep them in arrays of their own: GCC does not take members
// of a class apart into registers.
template <class Rule, class AnyPack>
inline __attribute__((always_inline)) void add_estimate_to(AnyPack& m, AnyPack& v, const AnyPack& first_weight,
                                                           const AnyPack& second_weight, const AnyPack& g) {
  m = add_first_moment(first_weight, g, m);
  if constexpr (has_moments_of_elements<Rule>) v = add_second_moment(second_weight, g, v);
}

template <class Rule, class Number>
void move_estimates(const Estimate<Number>* estimates, int64_t estimates_count, Scale<Number> scale, int64_t count,
                    Number* change) {
  constexpr int packs = 4;  // whose chains of additions overlap
  static_assert(tile_alignment % (packs * lanes) == 0);
  const auto minus_lr = fill(scale.minus_lr), eps = fill(scale.eps), shared_v = fill(scale.shared_v);
  for (int64_t i = 0; i < count; i += packs * lanes) {
    Pack<Number> m[packs], v[packs];
    for (auto& pack : m) pack = fill(Number{empty_sum});
    for (auto& pack : v) pack = shared_v;
    for (const Estimate<Number>* one = estimates; one != estimates + estimates_count; ++one) {
      const auto first = fill(one->first_weight), second = fill(one->second_weight);
      for (int j = 0; j < packs; ++j)
        add_estimate_to<Rule>(m[j], v[j], first, second, load(one->g + i + j * lanes));
    }
    for (int j = 0; j < packs; ++j) store(change + i + j * lanes, Rule::move(minus_lr, eps, m[j], v[j]));
  }
}
