// AdaMeZO's step of a window of dense estimates.
#include "cpu/noise_step.h"
#include "passes.h"

namespace zoext::benchmarks {
namespace {

template <class Storage>
void register_window(int64_t window) {
  for_each_place(std::string("adam/") + dtype<Storage> + "/window:" + std::to_string(window),
                 [=](benchmark::State& state, Where where, const cpu::InstructionSet& set) {
                   const std::vector<cpu::Term> terms = some_terms(window);
                   const std::vector<cpu::Step> steps = some_window(terms);
                   const cpu::DenseDirection direction(set, Distribution::normal);
                   float minus_lr = -1e-3f;
                   time_pass<Storage>(state, where, Rounding::nearest, [&](const Piece<Storage>& piece) {
                     for_each_weight_tile(set, piece, cpu::tile_elements, [&](auto& weights) {
                       cpu::write_step(set, direction, steps.data(), window, minus_lr, 1e-8f, weights.tile(), key,
                                       weights.take_upcoming(), weights.change());
                       weights.move({0.0f, std::nullopt});
                     });
                     minus_lr = -minus_lr;  // there and back
                   });
                 });
}

}  // namespace

void register_adam() {
  for (const int64_t window : {1, 10}) {
    register_window<float>(window);
    register_window<BFloat16>(window);
  }
}

}  // namespace zoext::benchmarks
