// Random words and the directions made of them. `index` and `count` are multiples of `tile_alignment`.

constexpr int words_per_group = 4 * blocks_per_group;
constexpr int packs_per_group = words_per_group / lanes;
constexpr int pairs_per_group = packs_per_group / 2;

// Or a group that begins just below a carry of the counter would be written past the end of a tile.
static_assert(tile_alignment % (4 * blocks_per_group) == 0 && tile_alignment % roundings_per_block == 0);
static_assert(tile_elements % tile_alignment == 0);

// Calls f(first, done, count) for stretches of blocks: `count` from `first` on, after `done` others. The high
// word of the counter is constant within a stretch, so that the compiler can take its share of the first rounds
// out of the loop.
template <class F>
inline __attribute__((always_inline)) void for_each_stretch(uint64_t block, int64_t blocks, F f) {
  for (int64_t done = 0; done < blocks;) {
    const uint64_t first = block + static_cast<uint64_t>(done);
    const int64_t until_carry = static_cast<int64_t>((uint64_t{1} << 32) - (first & 0xffffffffu));
    const int64_t count = blocks - done < until_carry ? blocks - done : until_carry;
    f(first, done, count);
    done += count;
  }
}

// Calls f(words, offset) for every group of Philox blocks.
template <int rounds, class F>
inline __attribute__((always_inline)) void for_each_group(const Field& field, uint64_t block, int64_t blocks,
                                                          F f) {
  const Keys<rounds> keys{field.seed};
  for_each_stretch(block, blocks, [&](uint64_t first, int64_t done, int64_t count) __attribute__((always_inline)) {
    const Counters high(static_cast<uint32_t>(first >> 32)), key(field.key), stream(field.stream);
    const auto group = [&](int64_t i) __attribute__((always_inline)) {
      const Counters low = consecutive_blocks(static_cast<uint32_t>(first + static_cast<uint64_t>(i)));
      return pair_up(philox4x32<rounds>(Words<Counters>{{low, high, key, stream}}, keys));
    };
    // One group ahead: the words of the next group fill the waits of what `f` does with this one.
    Pairs current = group(0);
    int64_t i = 0;
    for (; i + blocks_per_group < count; i += blocks_per_group) {
      const Pairs next = group(i + blocks_per_group);
      f(current, (done + i) * 4);
      current = next;
    }
    f(current, (done + i) * 4);
  });
}

template <int rounds>
void words(const Field& field, uint64_t block, int64_t blocks, uint32_t* out) {
  const NarrowKeys<rounds> keys{field.seed};
  for_each_stretch(block, blocks, [&](uint64_t first, int64_t done, int64_t count) __attribute__((always_inline)) {
    const Counters high(static_cast<uint32_t>(first >> 32)), key(field.key), stream(field.stream);
    Counters low = consecutive_blocks(static_cast<uint32_t>(first));
    for (int64_t i = 0; i < count; i += blocks_per_group, advance(low)) {
      store_words<rounds>(out + (done + i) * 4, Words<Counters>{{low, high, key, stream}}, keys);
    }
  });
}

// Words of stretches that end within a group: they are written whole, over what a stretch after them writes again.
void rounding_bits(const Field& field, uint64_t index, int64_t count, uint16_t* out) {
  using Block = uint32_t __attribute__((vector_size(16)));
  alignas(64) uint32_t blocks[4 * tile_elements / roundings_per_block + words_per_group];
  words<least_rounds>(field, index / roundings_per_block, count / roundings_per_block, blocks);
  for (int64_t i = 0; i < count; i += roundings_per_block) {
    Block block;
    std::memcpy(&block, blocks + i / 4, sizeof block);
    const Block turned = block << 8 | block >> 24;
    std::memcpy(out + i, &block, sizeof block);
    std::memcpy(out + i + 8, &turned, sizeof turned);
  }
}

inline __attribute__((always_inline)) void normals_of(const Pairs& pairs, Floats (&z)[packs_per_group]) {
  Floats sine[pairs_per_group], cosine[pairs_per_group];
  for (int j = 0; j < pairs_per_group; ++j) box_muller(pairs.first[j], pairs.second[j], sine[j], cosine[j]);
  in_order(sine, cosine, z);
}

// Calls f(z, packs, offset) for consecutive packs of normals.
template <class F>
inline __attribute__((always_inline)) void for_each_normals(const Field& field, uint64_t index, int64_t count,
                                                            Upcoming upcoming, F f) {
  for_each_group<most_rounds>(field, index / 4, count / 4, [&](const Pairs& pairs, int64_t offset) {
    upcoming.prefetch(offset, words_per_group);
    Floats z[packs_per_group];
    normals_of(pairs, z);
    f(z, packs_per_group, offset);
  });
}

// Calls f(z, packs, offset) for consecutive packs of signs.
template <class F>
inline __attribute__((always_inline)) void for_each_signs(const Field& field, uint64_t index, int64_t count,
                                                          Upcoming upcoming, F f) {
  constexpr int word_bits = 32;
  uint32_t bits[tile_elements / word_bits + 2 * words_per_group];
  const uint64_t first_block = index / signs_per_block / blocks_per_group * blocks_per_group;
  const uint64_t end_block = (index + static_cast<uint64_t>(count) + signs_per_block - 1) / signs_per_block;
  const uint64_t groups = (end_block - first_block + blocks_per_group - 1) / blocks_per_group;
  words<most_rounds>(field, first_block, static_cast<int64_t>(groups * blocks_per_group), bits);
  const uint32_t* word = bits + (index - first_block * signs_per_block) / word_bits;
  for (int64_t i = 0; i < count; i += word_bits, ++word) {
    upcoming.prefetch(i, word_bits);
    Floats z[word_bits / lanes];
    for (int j = 0; j < word_bits / lanes; ++j) z[j] = signs(*word, static_cast<unsigned>(j * lanes));
    f(z, word_bits / lanes, i);
  }
}

// sum = coefficient * z, or sum += coefficient * z
template <class Number, bool first>
inline __attribute__((always_inline)) auto add_to(Number* sum, Number coefficient) {
  const auto c = fill(coefficient), empty = fill(Number{empty_sum});
  return [=](const Floats* z, int packs, int64_t offset) __attribute__((always_inline)) {
    Number* to = sum + offset;
    for (int j = 0; j < packs; ++j, to += lanes)
      store(to, add_term(c, pack_of<Number>(z[j]), first ? empty : load(to)));
  };
}

template <class Number, bool first>
void add_normals(const Field& field, Number coefficient, uint64_t index, int64_t count, Number* sum,
                 Upcoming upcoming) {
  for_each_normals(field, index, count, upcoming, add_to<Number, first>(sum, coefficient));
}

template <class Number, bool first>
void add_signs(const Field& field, Number coefficient, uint64_t index, int64_t count, Number* sum,
               Upcoming upcoming) {
  for_each_signs(field, index, count, upcoming, add_to<Number, first>(sum, coefficient));
}

template <class Number, bool first>
void add_drawn(const Number* z, Number coefficient, int64_t count, Number* sum, Upcoming upcoming) {
  constexpr int packs = 4;
  static_assert(tile_alignment % (packs * lanes) == 0);
  const auto c = fill(coefficient), empty = fill(Number{empty_sum});
  for (int64_t i = 0; i < count; i += packs * lanes) {
    upcoming.prefetch(i, packs * lanes);
    for (int64_t j = i; j < i + packs * lanes; j += lanes)
      store(sum + j, add_term(c, load(z + j), first ? empty : load(sum + j)));
  }
}
