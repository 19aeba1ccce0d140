// The loops of one instruction set, over stretches of a parameter short enough to stay in the
// first-level cache. Included once per instruction set, inside the namespace of its lane types.
//
// `index` and `count` are multiples of `tile_alignment` wherever random words are made.

constexpr int words_per_group = 4 * blocks_per_group;
constexpr int packs_per_group = words_per_group / lanes;
constexpr int pairs_per_group = packs_per_group / 2;

// Or a group that begins just below a carry of the counter would be written past the end of a tile.
static_assert(tile_alignment % (roundings_per_block * blocks_per_group) == 0);
static_assert(tile_elements % tile_alignment == 0);

// Calls f(words, offset) for every group of Philox blocks. The high word of the counter is constant
// within a stretch, so that the compiler can take its share of the first rounds out of the loop.
template <class F>
inline __attribute__((always_inline)) void for_each_group(const Field& field, uint64_t block, int64_t blocks,
                                                          F f) {
  const Keys keys{field.seed};
  for (int64_t done = 0; done < blocks;) {
    const uint64_t first = block + static_cast<uint64_t>(done);
    const int64_t until_carry = static_cast<int64_t>((uint64_t{1} << 32) - (first & 0xffffffffu));
    const int64_t stretch = blocks - done < until_carry ? blocks - done : until_carry;
    const Counters high(static_cast<uint32_t>(first >> 32)), key(field.key), stream(field.stream);
    const auto group = [&](int64_t i) __attribute__((always_inline)) {
      const Counters low = consecutive_blocks(static_cast<uint32_t>(first + static_cast<uint64_t>(i)));
      return pair_up(philox4x32_10(Words<Counters>{{low, high, key, stream}}, keys));
    };
    // One group ahead: the words of the next group fill the waits of what `f` does with this one.
    Pairs current = group(0);
    int64_t i = 0;
    for (; i + blocks_per_group < stretch; i += blocks_per_group) {
      const Pairs next = group(i + blocks_per_group);
      f(current, (done + i) * 4);
      current = next;
    }
    f(current, (done + i) * 4);
    done += stretch;
  }
}

void words(const Field& field, uint64_t block, int64_t blocks, uint32_t* out) {
  for_each_group(field, block, blocks, [&](const Pairs& pairs, int64_t offset) {
    Ints ordered[packs_per_group];
    in_order(pairs.first, pairs.second, ordered);
    for (int j = 0; j < packs_per_group; ++j) store(out + offset + j * lanes, ordered[j]);
  });
}

inline __attribute__((always_inline)) void normals_of(const Pairs& pairs, Floats (&z)[packs_per_group]) {
  Floats sine[pairs_per_group], cosine[pairs_per_group];
  for (int j = 0; j < pairs_per_group; ++j) box_muller(pairs.first[j], pairs.second[j], sine[j], cosine[j]);
  in_order(sine, cosine, z);
}

// sum = coefficient * z, or sum += coefficient * z
template <bool first>
inline __attribute__((always_inline)) void add_packs(const Floats* z, int packs, float coefficient, float* sum) {
  const Floats c = Lanes<Floats>::fill(coefficient), empty = Lanes<Floats>::fill(empty_sum);
  for (int j = 0; j < packs; ++j, sum += lanes) store(sum, fused_multiply_add(c, z[j], first ? empty : load(sum)));
}

template <bool first>
inline __attribute__((always_inline)) void add_packs(const Floats* z, int packs, double coefficient, double* sum) {
  float single[words_per_group > 32 ? words_per_group : 32];
  for (int j = 0; j < packs; ++j) store(single + j * lanes, z[j]);
  for (int i = 0; i < packs * lanes; ++i)
    sum[i] = add_term<double>(coefficient, single[i], first ? double{empty_sum} : sum[i]);
}

template <class Number, bool first>
void add_normals(const Field& field, Number coefficient, uint64_t index, int64_t count, Number* sum,
                 Upcoming upcoming) {
  for_each_group(field, index / 4, count / 4, [&](const Pairs& pairs, int64_t offset) {
    upcoming.prefetch(offset, words_per_group);
    Floats z[packs_per_group];
    normals_of(pairs, z);
    add_packs<first>(z, packs_per_group, coefficient, sum + offset);
  });
}

template <class Number, bool first>
void add_signs(const Field& field, Number coefficient, uint64_t index, int64_t count, Number* sum,
               Upcoming upcoming) {
  constexpr int word_bits = 32;
  uint32_t bits[tile_elements / word_bits + 2 * words_per_group];
  const uint64_t first_block = index / signs_per_block / blocks_per_group * blocks_per_group;
  const uint64_t end_block = (index + static_cast<uint64_t>(count) + signs_per_block - 1) / signs_per_block;
  const uint64_t groups = (end_block - first_block + blocks_per_group - 1) / blocks_per_group;
  words(field, first_block, static_cast<int64_t>(groups * blocks_per_group), bits);
  const uint32_t* word = bits + (index - first_block * signs_per_block) / word_bits;
  for (int64_t i = 0; i < count; i += word_bits, ++word) {
    upcoming.prefetch(i, word_bits);
    Floats z[word_bits / lanes];
    for (int j = 0; j < word_bits / lanes; ++j) z[j] = signs(*word, static_cast<unsigned>(j * lanes));
    add_packs<first>(z, word_bits / lanes, coefficient, sum + i);
  }
}

template <class Number>
constexpr DirectionLoops<Number> direction_loops{
    {add_normals<Number, true>, add_normals<Number, false>},
    {add_signs<Number, true>, add_signs<Number, false>},
};

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

template <class Storage>
constexpr StorageLoops<Storage> storage_loops{&displace<Storage>, &write<Storage>, &to_single<Storage>};

const InstructionSet instruction_set{
    name,
    words,
    direction_loops<float>,
    direction_loops<double>,
    storage_loops<float>,
    storage_loops<double>,
    storage_loops<BFloat16>,
    storage_loops<Half>,
    row_loops,
};
