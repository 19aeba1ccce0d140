// Directions of a matrix from its factors, a pack of columns at a time: everything about an entry stays
// in registers.

// The first `count` columns of packs from column `column` on of row `row`.
struct Columns {
  int64_t row, column;
  int count;
};

template <bool whole>
inline __attribute__((always_inline)) Floats load_columns(const float* p, int count) {
  if constexpr (whole)
    return load(p);
  else
    return load_first(p, count);
}

// sum += coefficient * sum_q left_q right_q, for packs of columns that are whole, or one that is not.
template <bool whole, int packs, class Number>
inline __attribute__((always_inline)) void add_entries(const Factors& factors, const Term& term, const Columns& at,
                                                       Pack<Number> (&sum)[packs]) {
  const float* left = factors.left + term.number * factors.left_stride + at.row;
  const float* right = factors.right + term.number * factors.right_stride + at.column;
  Pack<Number> entries[packs];
  for (auto& entry : entries) entry = fill(Number{empty_sum});
  for (int64_t q = 0; q < factors.rank; ++q, left += factors.rows, right += factors.columns) {
    const Pack<Number> row = fill(Number{*left});
    for (int j = 0; j < packs; ++j)
      entries[j] = add_term(row, pack_of<Number>(load_columns<whole>(right + j * lanes, at.count)), entries[j]);
  }
  const Pack<Number> coefficient = fill(Number{term.coefficient});
  for (int j = 0; j < packs; ++j) sum[j] = add_term(coefficient, entries[j], sum[j]);
}

template <class Number>
struct FactoredCombination {
  const Factors& factors;
  const Term* terms;
  int64_t count;

  template <bool whole, int packs>
  inline __attribute__((always_inline)) void evaluate(const Columns& at, Pack<Number> (&sum)[packs]) const {
    for (auto& pack : sum) pack = fill(Number{empty_sum});
    for (int64_t k = 0; k < count; ++k) add_entries<whole, packs, Number>(factors, terms[k], at, sum);
  }
};

template <class Rule, class Number>
struct FactoredMove {
  const Factors& factors;
  const Step* steps;
  int64_t count;
  Scale<Number> scale;

  template <bool whole, int packs>
  inline __attribute__((always_inline)) void evaluate(const Columns& at, Pack<Number> (&change)[packs]) const {
    Pack<Number> m[packs], v[packs];
    for (auto& pack : m) pack = fill(Number{empty_sum});
    for (auto& pack : v) pack = fill(scale.shared_v);
    for (const Step* step = steps; step != steps + count; ++step) {
      if (!enters_moments(Rule::second_moment, *step)) continue;
      Pack<Number> g[packs];
      FactoredCombination<Number>{factors, step->terms, step->count}.template evaluate<whole>(at, g);
      const auto first = fill(Number{step->first_weight}), second = fill(Number{step->second_weight});
      for (int j = 0; j < packs; ++j) add_estimate_to<Rule>(m[j], v[j], first, second, g[j]);
    }
    const auto minus_lr = fill(scale.minus_lr), eps = fill(scale.eps);
    for (int j = 0; j < packs; ++j) change[j] = Rule::move(minus_lr, eps, m[j], v[j]);
  }
};

template <bool whole, int packs, class Number, class Change>
inline __attribute__((always_inline)) void write_change(const Change& change, const Columns& at, Number* to) {
  Pack<Number> values[packs];
  change.template evaluate<whole>(at, values);
  for (int j = 0; j < packs; ++j) store(to + j * lanes, values[j]);
}

// Writes the change of elements from, from + 1, ... of a matrix, row by row and in their order, since
// the last pack of a row also writes to where the next row goes.
template <class Number, class Change>
inline __attribute__((always_inline)) void for_each_pack(const Change& change, int64_t from, int64_t count,
                                                         Number* to, Upcoming upcoming) {
  constexpr int packs = 4;
  int64_t row = from / change.factors.columns, column = from % change.factors.columns;
  for (int64_t done = 0; done < count; ++row, column = 0) {
    const int64_t left_in_row = change.factors.columns - column, left = count - done;
    const int64_t end = column + (left < left_in_row ? left : left_in_row);
    upcoming.prefetch(done, end - column);
    for (; column + packs * lanes <= end; column += packs * lanes, done += packs * lanes)
      write_change<true, packs>(change, {row, column, lanes}, to + done);
    for (; column + lanes <= end; column += lanes, done += lanes)
      write_change<true, 1>(change, {row, column, lanes}, to + done);
    const int rest = static_cast<int>(end - column);
    if (rest > 0) write_change<false, 1>(change, {row, column, rest}, to + done);
    done += rest;
  }
}

template <class Number>
void combine_factored(const Factors& factors, const Term* terms, int64_t terms_count, int64_t from, int64_t count,
                      Number* sum, Upcoming upcoming) {
  for_each_pack(FactoredCombination<Number>{factors, terms, terms_count}, from, count, sum, upcoming);
}

template <class Rule, class Number>
void move_factored(const Factors& factors, const Step* steps, int64_t steps_count, Scale<Number> scale,
                   int64_t from, int64_t count, Number* change, Upcoming upcoming) {
  for_each_pack(FactoredMove<Rule, Number>{factors, steps, steps_count, scale}, from, count, change, upcoming);
}
