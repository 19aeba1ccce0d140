#include "weights.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "core/normal.h"

namespace zoext::benchmarks {
namespace {

constexpr int64_t page = 4096;

// The caches of level `level`, or of every level where it is 0; `otherwise` where the system names none.
int64_t largest_cache(int level, int64_t otherwise) {
  int64_t largest = 0;
  for (const auto& cache : benchmark::CPUInfo::Get().caches)
    if (level == 0 || cache.level == level) largest = std::max<int64_t>(largest, cache.size);
  return largest > 0 ? largest : otherwise;
}

// What all passes at a place take their pieces from. It is filled when the dtype changes, and goes on where
// the last pass ended; after it was filled at the start, the part that was longest out of use.
class Memory {
 public:
  template <class Storage>
  void hold() {
    static const char kind = 0;
    if (kind_ == &kind) return;
    kind_ = &kind;
    Storage row[columns];
    for (int64_t i = 0; i < columns; i += 2) {
      const Words<uint32_t> words = Field{3, 0, 0}.words(static_cast<uint64_t>(i));
      float sine, cosine;
      box_muller(words.w[0], words.w[1], sine, cosine);
      row[i] = round_to_nearest<Storage>(0.02f * sine);
      row[i + 1] = round_to_nearest<Storage>(0.02f * cosine);
    }
    for (int64_t at = 0; at < bytes_; at += sizeof(row)) std::memcpy(begin_ + at, row, sizeof(row));
    at_ = 0;
  }

  // Those of the narrowest storage, two bytes an element: none of another pass, which may not fit its weights.
  void hold_residuals() { residuals_.assign(static_cast<size_t>(bytes_ / 2), 0); }

  template <class Storage>
  Piece<Storage> next(bool has_residuals) {
    const int64_t at = at_;
    at_ = (at_ + piece_bytes()) % bytes_;
    return {reinterpret_cast<Storage*>(begin_ + at), has_residuals ? residuals_.data() + at / 2 : nullptr};
  }

  explicit Memory(int64_t bytes)
      : bytes_(bytes), begin_(static_cast<char*>(std::aligned_alloc(page, static_cast<size_t>(bytes)))) {
    if (!begin_) throw std::bad_alloc();
  }

 private:
  const int64_t bytes_;
  char* const begin_;
  std::vector<int8_t> residuals_;
  const void* kind_ = nullptr;
  int64_t at_ = 0;
};

Memory& memory_of(Where where) {
  if (where == Where::cache) {
    static Memory cached(piece_bytes());
    return cached;
  }
  static Memory memory(memory_bytes());
  return memory;
}

}  // namespace

int64_t piece_bytes() {
  constexpr int64_t widest_row = columns * sizeof(double);
  return std::max<int64_t>(1, largest_cache(2, 1 << 20) / 4 / widest_row) * widest_row;
}

int64_t memory_bytes() {
  const int64_t piece = piece_bytes();
  return (4 * largest_cache(0, 64 << 20) + piece - 1) / piece * piece;
}

template <class Storage>
Weights<Storage>::Weights(Where where, Rounding rounding)
    : where_(where), has_residuals_(keeps_residuals(rounding)) {
  memory_of(where).hold<Storage>();
  if (has_residuals_) memory_of(where).hold_residuals();
}

template <class Storage>
Piece<Storage> Weights<Storage>::next() {
  return memory_of(where_).next<Storage>(has_residuals_);
}

template class Weights<float>;
template class Weights<double>;
template class Weights<BFloat16>;
template class Weights<Half>;

}  // namespace zoext::benchmarks
