// Directions given by their factors, L^T R: a combination and an Adam step of a window of ten.
#include "passes.h"

namespace zoext::benchmarks {
namespace {

// Factors for each of `terms` terms of a piece, taken as a matrix.
class SomeFactors {
 public:
  SomeFactors(const cpu::InstructionSet& set, int64_t rows, int64_t rank, int64_t terms)
      : left_(normals(set, Stream::left_factor, terms * rank * rows)),
        right_(normals(set, Stream::right_factor, terms * rank * columns)),
        factors_{left_.data(), right_.data(), rows, columns, rank, rank * rows, rank * columns} {}

  const cpu::Factors& factors() const { return factors_; }

 private:
  static std::vector<float> normals(const cpu::InstructionSet& set, Stream stream, int64_t count) {
    const int64_t whole = (count + cpu::tile_alignment - 1) / cpu::tile_alignment * cpu::tile_alignment;
    std::vector<float> z(static_cast<size_t>(whole));
    set.fp32.normals.start({1, key, static_cast<uint32_t>(stream)}, 1.0f, 0, whole, z.data(), cpu::nothing);
    return z;
  }

  const std::vector<float> left_, right_;
  const cpu::Factors factors_;
};

template <class Storage>
const auto& loops(const cpu::InstructionSet& set) {
  return set.arithmetic<typename Arithmetic<Storage>::type>();
}

template <class Storage>
void register_axpy(int64_t rank) {
  for_each_place(std::string("factored/axpy/") + dtype<Storage> + "/rank:" + std::to_string(rank),
                 [=](benchmark::State& state, Where where, const cpu::InstructionSet& set) {
                   std::vector<cpu::Term> terms = some_terms(1);
                   const SomeFactors some(set, Weights<Storage>::count() / columns, rank, 1);
                   time_pass<Storage>(state, where, Rounding::nearest, [&](const Piece<Storage>& piece) {
                     for_each_weight_tile(set, piece, cpu::tile_elements, [&](auto& weights) {
                       const cpu::Tile& tile = weights.tile();
                       loops<Storage>(set).factored.combine(some.factors(), terms.data(), 1, tile.local,
                                                            tile.count, weights.change() + tile.lead(),
                                                            weights.take_upcoming());
                       weights.move({0.0f, std::nullopt});
                     });
                     terms[0].coefficient = -terms[0].coefficient;  // there and back
                   });
                 });
}

template <class Storage>
void register_adam(int64_t rank) {
  constexpr int64_t window = 10;
  for_each_place(std::string("factored/adam/") + dtype<Storage> + "/rank:" + std::to_string(rank),
                 [=](benchmark::State& state, Where where, const cpu::InstructionSet& set) {
                   const std::vector<cpu::Term> terms = some_terms(window);
                   const std::vector<cpu::Step> steps = some_window(terms);
                   const SomeFactors some(set, Weights<Storage>::count() / columns, rank, window);
                   cpu::Scale<typename Arithmetic<Storage>::type> scale{-1e-3f, 1e-8f, 0};
                   time_pass<Storage>(state, where, Rounding::nearest, [&](const Piece<Storage>& piece) {
                     for_each_weight_tile(set, piece, cpu::tile_elements, [&](auto& weights) {
                       const cpu::Tile& tile = weights.tile();
                       loops<Storage>(set).rules[adam].move_factored(
                           some.factors(), steps.data(), window, scale, tile.local, tile.count,
                           weights.change() + tile.lead(), weights.take_upcoming());
                       weights.move({0.0f, std::nullopt});
                     });
                     scale.minus_lr = -scale.minus_lr;  // there and back
                   });
                 });
}

}  // namespace

void register_factored() {
  for (const int64_t rank : {1, 4}) {
    register_axpy<float>(rank);
    register_axpy<BFloat16>(rank);
    register_adam<float>(rank);
    register_adam<BFloat16>(rank);
  }
}

}  // namespace zoext::benchmarks
