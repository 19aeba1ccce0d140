// Noise, dense directions and Adam's moments of them.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/combine.h"
#include "core/moments.h"
#include "core/storage.h"
#include "loops.h"

namespace zoext {
namespace {

using cpu::InstructionSet;
using cpu::tile_alignment;
using cpu::tile_elements;

// Aligned starts from which a tile crosses each carry of the counter: normals, rounding bits, signs.
const std::vector<uint64_t> starts = {0,
                                      tile_alignment,
                                      (1ull << 34) - tile_alignment,
                                      (1ull << 34) - 5 * tile_alignment,
                                      (1ull << 36) - tile_alignment,
                                      (1ull << 36) - 2 * tile_alignment,
                                      (1ull << 39) - 3 * tile_alignment,
                                      (1ull << 62) - tile_alignment};

void rounding_bits_are_the_cores(const InstructionSet& set) {
  const Field field{0xfedcba9876543210ull, 9, 3};
  for (uint64_t start : starts)
    for (int64_t count : {tile_alignment, 3 * tile_alignment, tile_elements}) {
      std::vector<uint16_t> out(count + 64, 0xabcd);
      set.rounding_bits(field, start, count, out.data());
      for (int64_t i = 0; i < count; ++i)
        CHECK(out[i] == rounding_bits(field, start + i), "%s: element %d from %llu", set.name, int(i),
              static_cast<unsigned long long>(start));
      for (size_t i = count; i < out.size(); ++i)
        CHECK(out[i] == 0xabcd, "%s writes beyond %d elements", set.name, int(count));
    }
}

float core_sign(const Field& field, uint64_t index) {
  return sign_of_bit(sign_word(field, index), static_cast<unsigned>(index % 32));
}

template <class Number, class Core>
void terms_are_the_cores(const InstructionSet& set, const cpu::DirectionLoops<Number>& loops, Core core) {
  const Field one{11, 2, 6}, other{~0ull, 2, 6};
  const Number guard = 77;
  for (uint64_t start : starts)
    for (int64_t count : {tile_alignment, 5 * tile_alignment, tile_elements}) {
      std::vector<Number> buffer(count + 32, guard);
      Number* sum = buffer.data() + 16;
      loops.start(one, Number(0.3f), start, count, sum, cpu::nothing);
      loops.add(other, Number(-1.7f), start, count, sum, cpu::nothing);
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t index = start + static_cast<uint64_t>(i);
        const Number first = add_term<Number>(0.3f, core(one, index), Number{empty_sum});
        const Number expected = add_term<Number>(-1.7f, core(other, index), first);
        CHECK(same(sum[i], expected), "%s: element %llu is %a, not %a", set.name,
              static_cast<unsigned long long>(index), double(sum[i]), double(expected));
      }
      for (int i = 0; i < 16; ++i)
        CHECK(buffer[i] == guard && sum[count + i] == guard, "%s writes beyond the tile", set.name);
    }
}

template <class Number, class Core>
void moments_are_the_cores(const InstructionSet& set, const cpu::DirectionLoops<Number>& loops, Core core) {
  const Field older{11, 2, 6}, newer{~0ull, 2, 6};
  const cpu::WindowLoops<Number>& window = set.arithmetic<Number>().window;
  const Number guard = 77, minus_lr = -0.1f, eps = 1e-3f;
  for (uint64_t start : starts)
    for (int64_t count : {tile_alignment, 5 * tile_alignment}) {
      std::vector<Number> m(count + 16, guard), v(count + 16, guard), g(count), change(count + 16, guard);
      std::fill_n(m.data(), count, Number{empty_sum});
      std::fill_n(v.data(), count, Number{0});
      loops.add_moments(older, Number(0.3f), Number(0.2f), Number(0.4f), start, count, m.data(), v.data(),
                        cpu::nothing);
      loops.start(newer, Number(-1.7f), start, count, g.data(), cpu::nothing);
      loops.add(older, Number(0.9f), start, count, g.data(), cpu::nothing);
      window.add_moments(Number(0.5f), Number(0.1f), g.data(), count, m.data(), v.data());
      window.step(minus_lr, eps, m.data(), v.data(), count, change.data());
      std::vector<Number> first_g(count), both(count + 16, guard);
      loops.start(older, Number(0.3f), start, count, first_g.data(), cpu::nothing);
      const cpu::Estimate<Number> estimates[] = {{first_g.data(), Number(0.2f), Number(0.4f)},
                                                 {g.data(), Number(0.5f), Number(0.1f)}};
      window.step_of(estimates, 2, minus_lr, eps, count, both.data());
      CHECK(both == change, "%s: a step of estimates in memory", set.name);
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t index = start + static_cast<uint64_t>(i);
        const Number old_z = core(older, index), new_z = core(newer, index);
        Number mean{empty_sum}, square{0};
        add_moments<Number>(0.2f, 0.4f, add_term<Number>(0.3f, old_z, Number{empty_sum}), mean, square);
        const Number first = add_term<Number>(-1.7f, new_z, Number{empty_sum});
        add_moments<Number>(0.5f, 0.1f, add_term<Number>(0.9f, old_z, first), mean, square);
        CHECK(same(m[i], mean) && same(v[i], square), "%s: moments of element %llu are %a and %a", set.name,
              static_cast<unsigned long long>(index), double(m[i]), double(v[i]));
        CHECK(same(change[i], moments_step(minus_lr, eps, mean, square)), "%s: step of element %llu is %a",
              set.name, static_cast<unsigned long long>(index), double(change[i]));
      }
      for (int i = 0; i < 16; ++i)
        CHECK(m[count + i] == guard && v[count + i] == guard && change[count + i] == guard,
              "%s writes beyond the stretch", set.name);
    }
}

}  // namespace

void directions_are_the_cores(const InstructionSet& set) {
  rounding_bits_are_the_cores(set);
  terms_are_the_cores(set, set.single.normals, core_normal);
  terms_are_the_cores(set, set.single.signs, core_sign);
  terms_are_the_cores(set, set.twice.normals, core_normal);
  terms_are_the_cores(set, set.twice.signs, core_sign);
  moments_are_the_cores(set, set.single.normals, core_normal);
  moments_are_the_cores(set, set.single.signs, core_sign);
  moments_are_the_cores(set, set.twice.normals, core_normal);
  moments_are_the_cores(set, set.twice.signs, core_sign);
}

}  // namespace zoext
