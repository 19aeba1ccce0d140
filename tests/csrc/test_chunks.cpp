// How a launch on CUDA divides tensors, run on the host: every element is in one share of one thread, at
// the index that its span says, also beyond 2^32 elements. test_core_in_cpp.py builds and runs it.
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "core/divisor.h"
#include "core/storage.h"
#include "cuda/device/chunks.h"

using namespace zoext;
using namespace zoext::cuda;

namespace {

// A tensor at an address that is never used, a multiple of 256.
template <class Storage>
Slot slot_with(int64_t count, const Span& span, int64_t offset = 0) {
  Storage* const theta = reinterpret_cast<Storage*>(uintptr_t{1} << 46) + offset;
  Slot slot{};
  slot.out = theta;
  slot.theta = theta;
  slot.count = count;
  slot.span = span;
  return slot;
}

// f(local, index) for all elements of a chunk, as a kernel walks them; whether their shares are whole.
template <class Storage, class Tiling, class F>
bool walk(const Table<Slot, Room::many>& table, uint32_t chunk, F f) {
  const Slot& slot = table.slot_of(chunk);
  const int64_t first = int64_t{chunk - slot.first_chunk} * Tiling::shares_per_chunk;
  const bool whole = WholeShare<Storage, Tiling>::is_whole_chunk(slot, first);
  for (int thread = 0; thread < threads_per_chunk; ++thread) {
    WholeShare<Storage, Tiling> in_whole(slot, whole ? first + thread : Tiling::unit);
    Share<Tiling> share = share_of<Tiling>(slot, first + thread);
    for (int i = 0; i < Tiling::shares_per_thread; ++i) {
      if (i > 0) {
        share = slot.is_one_run() ? share.next() : share_of<Tiling>(slot, first + thread + i * threads_per_chunk);
        in_whole.advance();
      }
      if (whole) {
        CHECK(in_whole.index == share.index, "chunk %u", chunk);
        for (int g = 0; g < Tiling::groups; ++g) {
          const Part part = share.group(g);
          const auto address = reinterpret_cast<uintptr_t>(static_cast<const Storage*>(slot.theta) + part.local);
          CHECK(part.first == 0 && part.last == Tiling::vector && address % 16 == 0, "chunk %u", chunk);
          CHECK(reinterpret_cast<uintptr_t>(in_whole.theta(slot) + in_whole.group(g).offset) == address,
                "chunk %u", chunk);
        }
      }
      if (share.is_empty()) continue;
      for (int g = 0; g < Tiling::groups; ++g) {
        const Part part = share.group(g);
        for (int e = part.first; e < part.last; ++e) f(part.local + e, share.index + g * Tiling::step + e);
      }
    }
  }
  return whole;
}

template <class Storage, class Tiling>
void every_element_has_one_thread(int64_t count, const Span& span, int64_t offset) {
  Table<Slot, Room::many> table;
  table.add<Tiling>(slot_with<Storage>(100, {0, 100, 0}));
  table.add<Tiling>(slot_with<Storage>(count, span, offset));
  table.add<Tiling>(slot_with<Storage>(1, {0, 1, 0}));
  std::vector<int> times(count);
  const uint32_t last = table.slots[2].first_chunk;
  for (uint32_t chunk = table.slots[1].first_chunk; chunk < last; ++chunk)
    walk<Storage, Tiling>(table, chunk, [&](int64_t local, uint64_t index) {
      if (local < 0 || local >= count || index != span.index(local)) {
        CHECK(false, "element %ld of %ld at index %lu", long(local), long(count), (unsigned long)(index));
        return;
      }
      ++times[local];
    });
  for (int64_t i = 0; i < count; ++i)
    CHECK(times[i] == 1, "element %ld of %ld is taken %d times", long(i), long(count), times[i]);
}

// Chunks of a tensor that no machine need hold, around 2^31, 2^32 and its end.
template <class Storage, class Tiling>
void huge_tensors_are_divided(int64_t base) {
  const int64_t count = (int64_t{5} << 32) + 8195;
  Table<Slot, Room::many> table;
  table.add<Tiling>(slot_with<Storage>(count, {base, count, 0}));
  constexpr int64_t elements = int64_t{Tiling::shares_per_chunk} * Tiling::vector * Tiling::groups;
  for (int64_t around : {int64_t{1} << 31, int64_t{1} << 32, int64_t{3} << 32, count - 1}) {
    std::vector<int> times(elements);
    int64_t begin = around / elements * elements;
    for (int64_t chunk = begin / elements; chunk <= begin / elements + 1 && chunk < table.chunks; ++chunk)
      walk<Storage, Tiling>(table, static_cast<uint32_t>(chunk), [&](int64_t local, uint64_t index) {
        CHECK(index == static_cast<uint64_t>(base + local), "element %ld", long(local));
        if (local >= begin && local < begin + elements) ++times[local - begin];
      });
    for (int64_t i = begin; i < begin + elements && i < count; ++i)
      CHECK(times[i - begin] == 1, "element %ld is taken %d times", long(i), times[i - begin]);
  }
}

template <class Storage, class Tiling>
void tensors_are_divided() {
  for (int64_t offset : {0, 3})
    for (int64_t base :
         {int64_t{0}, int64_t{8}, int64_t{61}, (int64_t{1} << 34) - 100, (int64_t{1} << 61) + 128}) {
      for (int64_t count : {1, 31, 8192, 8200, 25013})
        every_element_has_one_thread<Storage, Tiling>(count, {base, count, 0}, offset);
      every_element_has_one_thread<Storage, Tiling>(9000, {base, 96, 128}, offset);
      every_element_has_one_thread<Storage, Tiling>(3000, {base, 7, 11}, offset);
      every_element_has_one_thread<Storage, Tiling>(9000, {base, 8992, 9999}, offset);
    }
  for (int64_t base : {int64_t{0}, int64_t{1} << 33, int64_t{77}}) huge_tensors_are_divided<Storage, Tiling>(base);
  // Nearly all chunks of an ordinary tensor are whole.
  Table<Slot, Room::many> table;
  table.add<Tiling>(slot_with<Storage>(100000, {0, 100000, 0}));
  uint32_t whole = 0;
  for (uint32_t chunk = 0; chunk < table.chunks; ++chunk)
    whole += walk<Storage, Tiling>(table, chunk, [](int64_t, uint64_t) {});
  CHECK(whole + 1 == table.chunks, "%u of %u chunks are whole", whole, table.chunks);
}

// The shares of a chunk are whole only where residuals are aligned as well, and have those of their weights.
template <class Storage, class Tiling>
void residuals_lie_beside_weights() {
  using Whole = WholeShareInPlace<Storage, Tiling, Slot>;
  constexpr int64_t count = 30000, lead = 3;
  auto* const bytes = reinterpret_cast<int8_t*>(uintptr_t{1} << 40);
  // A tensor that begins within a unit, at an address that makes its units begin at one for wide accesses.
  const Slot slot = slot_with<Storage>(count, {lead, count, 0}, lead);
  for (int64_t shift = 0; shift < Tiling::vector; ++shift) {
    const InPlace<Slot> beside{slot, bytes + shift};
    Table<InPlace<Slot>, Room::many> table;
    table.add<Tiling>(beside);
    const InPlace<Slot>& added = table.slots[0];
    const int64_t second_chunk = Tiling::shares_per_chunk;
    CHECK((Whole::is_whole_chunk(added, second_chunk)) == (shift == lead), "bytes %ld further", long(shift));
    Whole share(added, second_chunk + 5);
    Share<Tiling> any = share_of<Tiling>(added, second_chunk + 5);
    for (int i = 0; i < Tiling::shares_per_thread; ++i, share.advance(), any = any.next())
      CHECK(share.residuals(added) == any.residuals(added) + any.local, "share %d", i);
  }
  const InPlace<Slot> alone{slot, nullptr};
  Table<InPlace<Slot>, Room::many> table;
  table.add<Tiling>(alone);
  CHECK((Whole::is_whole_chunk(table.slots[0], Tiling::shares_per_chunk)), "without residuals");
}

void divisors_divide() {
  std::mt19937_64 random(1);
  const int64_t most = INT64_MAX;
  std::vector<int64_t> divisors = {1,   2, 3, 5, 7, 64, 641, 50257, (1ll << 32) - 1, 1ll << 32, (1ll << 32) + 1,
                                   most};
  for (int i = 0; i < 2000; ++i) divisors.push_back(static_cast<int64_t>(random() >> (1 + i % 63)) | 1);
  for (int64_t d : divisors) {
    const Divisor divisor(d);
    std::vector<int64_t> numbers = {0, 1, d - 1, d, most, most - 1, most / d * d, most / d * d - 1};
    for (int i = 0; i < 50; ++i) numbers.push_back(static_cast<int64_t>(random() >> (1 + i)));
    for (int64_t n : numbers)
      CHECK(divisor.value() == d && divisor.quotient(n) == n / d, "%ld / %ld is not %ld", long(n), long(d),
            long(divisor.quotient(n)));
  }
}

}  // namespace

int main() {
  divisors_divide();
  tensors_are_divided<float, NormalTiling<float>>();
  tensors_are_divided<double, NormalTiling<double>>();
  tensors_are_divided<BFloat16, NormalTiling<BFloat16>>();
  tensors_are_divided<float, SignTiling<float>>();
  tensors_are_divided<BFloat16, SignTiling<BFloat16>>();
  residuals_lie_beside_weights<BFloat16, NormalTiling<BFloat16>>();
  residuals_lie_beside_weights<BFloat16, SignTiling<BFloat16>>();
  return finish("how launches divide tensors");
}
