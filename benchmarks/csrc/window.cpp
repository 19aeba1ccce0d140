// AdaMeZO's step of a window of dense estimates.
#include "cpu/loops/window.h"

#include "passes.h"

namespace zoext::benchmarks {
namespace {

template <class Storage>
void register_window(int64_t window) {
  for_each_place(std::string("adam/") + dtype<Storage> + "/window:" + std::to_string(window),
                 [=](benchmark::State& state, Where where, const cpu::InstructionSet& set) {
                   const std::vector<cpu::Term> terms = some_terms(window);
                   cpu::Window window_of_steps{some_window(terms), -1e-3f, {0.0f, std::nullopt}};
                   const cpu::DenseDirection direction(set, Distribution::normal);
                   const auto& rule = set.arithmetic<typename Arithmetic<Storage>::type>().rules[adam];
                   time_pass<Storage>(state, where, Rounding::nearest, [&](const Piece<Storage>& piece) {
                     for_each_weight_tile(set, piece, cpu::tile_elements, [&](auto& weights) {
                       cpu::write_move(rule, direction, window_of_steps, 1e-8f, weights.tile(), key,
                                       weights.take_upcoming(), weights.change());
                       weights.move(window_of_steps.ending);
                     });
                     window_of_steps.minus_lr = -window_of_steps.minus_lr;  // there and back
                   });
                 });
}

}  // namespace

void register_windows() {
  for (const int64_t window : {1, 10}) {
    register_window<float>(window);
    register_window<BFloat16>(window);
  }
}

}  // namespace zoext::benchmarks
