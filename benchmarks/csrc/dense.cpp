// theta += sum_k c_k z_k for dense directions.
#include "cpu/loops/direction.h"
#include "passes.h"

namespace zoext::benchmarks {
namespace {

template <class Storage>
void register_axpy(const std::string& name, Distribution distribution, Rounding rounding, int64_t terms_count) {
  for_each_place(name + "/" + dtype<Storage> + "/K:" + std::to_string(terms_count),
                 [=](benchmark::State& state, Where where, const cpu::InstructionSet& set) {
                   std::vector<cpu::Term> terms = some_terms(terms_count);
                   cpu::Ending ending{0.0f, std::nullopt};
                   if (rounding == Rounding::stochastic) ending.rounding_seed = terms[0].seed;
                   const cpu::DenseDirection direction(set, distribution);
                   time_pass<Storage>(state, where, rounding, [&](const Piece<Storage>& piece) {
                     for_each_weight_tile(set, piece, cpu::tile_elements, [&](auto& weights) {
                       direction.combine(terms.data(), terms_count, weights.tile(), key, weights.take_upcoming(),
                                         weights.change());
                       weights.move(ending);
                     });
                     // There and back: the weights stay of one size however long it takes.
                     for (cpu::Term& term : terms) term.coefficient = -term.coefficient;
                   });
                 });
}

template <class Storage>
void register_dtype() {
  for (const int64_t terms : {1, 4})
    register_axpy<Storage>("dense/axpy", Distribution::normal, Rounding::nearest, terms);
  register_axpy<Storage>("dense/signs", Distribution::sign, Rounding::nearest, 1);
  if constexpr (can_round<Storage>) {
    register_axpy<Storage>("dense/stochastic", Distribution::normal, Rounding::stochastic, 1);
    register_axpy<Storage>("dense/residual", Distribution::normal, Rounding::residual, 1);
  }
}

}  // namespace

void register_dense() {
  register_dtype<float>();
  register_dtype<double>();
  register_dtype<BFloat16>();
  register_dtype<Half>();
}

}  // namespace zoext::benchmarks
