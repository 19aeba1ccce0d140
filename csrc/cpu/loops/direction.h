// Dense directions on a tile.
#pragma once

#include <algorithm>

#include "../../core/stream.h"
#include "tile.h"

namespace zoext::cpu {

class DenseDirection {
 public:
  DenseDirection(const InstructionSet& set, Distribution distribution)
      : set_(set), is_sign_(distribution == Distribution::sign) {}

  // sum = sum_k c_k D(s_k) on the tile's aligned stretch.
  template <class Number>
  void combine(const Term* terms, int64_t count, const Tile& tile, uint32_t key, Upcoming upcoming,
               Number* sum) const {
    if (count == 0) std::fill_n(sum, tile.aligned_count(), Number{empty_sum});
    for (int64_t k = 0; k < count; ++k)
      (k == 0 ? loops<Number>().start : loops<Number>().add)(field(terms[k], key), terms[k].coefficient,
                                                             tile.aligned_index(), tile.aligned_count(), sum,
                                                             k == 0 ? upcoming : nothing);
  }

  // z = D(s) of a term on the tile's aligned stretch.
  template <class Number>
  void draw(const Term& term, const Tile& tile, uint32_t key, Upcoming upcoming, Number* z) const {
    loops<Number>().start(field(term, key), Number{1}, tile.aligned_index(), tile.aligned_count(), z, upcoming);
  }

  // m and v take in a step. Its only term goes straight there; several are summed up in the cache.
  template <class Number>
  void add_to_moments(const RuleLoops<Number>& rule, const Step& step, const Tile& tile, uint32_t key,
                      Upcoming upcoming, Number* m, Number* v) const {
    if (step.count == 1)
      return (is_sign_ ? rule.add_signs : rule.add_normals)(
          field(*step.terms, key), step.terms->coefficient, step.first_weight, step.second_weight,
          tile.aligned_index(), tile.aligned_count(), m, v, upcoming);
    alignas(64) Number g[tile_elements];
    combine(step.terms, step.count, tile, key, upcoming, g);
    rule.add_estimate({g, Number{step.first_weight}, Number{step.second_weight}}, tile.aligned_count(), m, v);
  }

 private:
  template <class Number>
  const DirectionLoops<Number>& loops() const {
    return is_sign_ ? set_.arithmetic<Number>().signs : set_.arithmetic<Number>().normals;
  }

  Field field(const Term& term, uint32_t key) const {
    return {term.seed, key, static_cast<uint32_t>(is_sign_ ? Stream::sign : Stream::dense)};
  }

  const InstructionSet& set_;
  const bool is_sign_;
};

}  // namespace zoext::cpu
