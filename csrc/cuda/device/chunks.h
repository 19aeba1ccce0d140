// The work of a launch: a list of tensors, divided into chunks of one thread block each.
#pragma once

#include "../../core/divisor.h"
#include "../../core/span.h"
#include "../../core/storage.h"
#include "../../core/stream.h"

namespace zoext::cuda {

constexpr int threads_per_chunk = 256;

// How threads divide a run of consecutive indices. A unit, aligned to its own length, is made of
// whole Philox blocks; `lanes` neighbouring threads divide it. The share of a thread is `groups`
// groups of `vector` consecutive elements, `step` apart, so that the accesses of neighbours adjoin.
template <int vector_elements, int groups_per_share, int lanes_per_unit, int shares>
struct Tiling {
  static constexpr int vector = vector_elements, groups = groups_per_share, lanes = lanes_per_unit;
  static constexpr int step = lanes * vector, unit = groups * step, extent = unit - step + vector;
  static constexpr int shares_per_thread = shares, shares_per_chunk = shares * threads_per_chunk;
  static constexpr int64_t stride = int64_t{threads_per_chunk / lanes} * unit;  // to a thread's next share
};

// Whole Philox blocks of normals and of rounding bits, and whole 16-byte accesses.
template <class Storage>
constexpr int vector_elements = can_round<Storage> ? 8 : 4;

// A share has two Philox blocks of normals, for any storage; eight neighbours fill a 128-byte line.
template <class Storage>
using NormalTiling = Tiling<vector_elements<Storage>, 8 / vector_elements<Storage>, 8, 4>;

// A Philox block holds 128 signs, too many for one thread. A share has the same bits of two neighbouring
// words of its four, the first two or the last two.
template <class Storage>
using SignTiling = Tiling<vector_elements<Storage>, 2, 32 / vector_elements<Storage>, 2>;

struct Slot {
  // One tensor.
  void* out;
  const void* theta;
  int64_t count;
  Span span;
  uint32_t key;
  // Its part of the grid.
  uint32_t first_chunk;
  Divisor shares_per_run;

  ZOEXT_HD bool is_one_run() const { return span.run >= count; }

  // Whether shares that are all there can be treated alike.
  template <class Tiling>
  ZOEXT_HD bool is_regular() const {
    return true;
  }
};

// A tensor that is updated in place, and the residuals of its weights, or null. Only launches of such tensors have
// smaller tables.
template <class TensorSlot>
struct InPlace : TensorSlot {
  int8_t* residuals;
};

// How many tensors fit into the parameters of a kernel. Every launch sends all of them, so that the few tensors of
// a module should not cost as much as the many of a model.
enum class Room { few, many };

// Passed by value, so that a launch neither allocates nor copies. Parameters may take 32,764 bytes; more than
// 4,096 need a driver for CUDA 12.1 and sm_70 or newer.
template <class TensorSlot, Room room>
struct Table {
  static constexpr int bytes = room == Room::few ? 1024 : 30 * 1024;
  static constexpr int capacity = bytes / sizeof(TensorSlot);

  TensorSlot slots[capacity];
  int count = 0;
  uint32_t chunks = 0;

  // Adds a tensor that is not empty.
  template <class Tiling>
  void add(TensorSlot slot) {
    Span& span = slot.span;
    if (span.run >= slot.count || span.run == span.stride) span = {span.base, slot.count, 0};
    const int64_t runs = (slot.count + span.run - 1) / span.run;
    const bool leads_are_equal = runs == 1 || span.stride % Tiling::unit == 0;
    const int64_t lead = leads_are_equal ? span.base % Tiling::unit : Tiling::unit - 1;
    slot.shares_per_run = Divisor((lead + span.run + Tiling::unit - 1) / Tiling::unit * Tiling::lanes);
    const int64_t shares = runs * slot.shares_per_run.value();
    slot.first_chunk = chunks;
    slots[count++] = slot;
    chunks += static_cast<uint32_t>((shares + Tiling::shares_per_chunk - 1) / Tiling::shares_per_chunk);
  }

  // The slot that a chunk belongs to: the last one that begins at or before it.
  ZOEXT_HD const TensorSlot& slot_of(uint32_t chunk) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (slots[middle].first_chunk <= chunk ? low : high) = middle;
    }
    return slots[low];
  }
};

// Where a group lies in its local tensor, and which of its elements are there: [first, last).
struct Part {
  int64_t local;
  int first, last;
};

// The share of a thread: its first element lies at `index` of the unsharded parameter, and at `local`
// of the local tensor if that is in the run [begin, end).
template <class Tiling>
struct Share {
  uint64_t index;
  int64_t local, begin, end;

  // The thread's next one in the same run.
  ZOEXT_HD Share next() const { return {index + Tiling::stride, local + Tiling::stride, begin, end}; }

  ZOEXT_HD bool is_empty() const { return begin >= local + Tiling::extent || end <= local; }

  ZOEXT_HD const void* theta(const Slot& slot) const { return slot.theta; }
  ZOEXT_HD void* out(const Slot& slot) const { return slot.out; }
  template <class TensorSlot>
  ZOEXT_HD int8_t* residuals(const InPlace<TensorSlot>& slot) const {
    return slot.residuals;
  }

  ZOEXT_HD Part group(int g) const {
    const int64_t start = local + g * Tiling::step;
    const int64_t first = begin - start, last = end - start;
    return {start, first > 0 ? static_cast<int>(first < Tiling::vector ? first : Tiling::vector) : 0,
            last < Tiling::vector ? static_cast<int>(last > 0 ? last : 0) : Tiling::vector};
  }
};

template <class Tiling>
ZOEXT_HD Share<Tiling> share_of(const Slot& slot, int64_t number) {
  const int64_t run = slot.is_one_run() ? 0 : slot.shares_per_run.quotient(number);
  const int64_t in_run = number - run * slot.shares_per_run.value();
  const int64_t begin = run * slot.span.run, end = begin + slot.span.run;
  const uint64_t first = static_cast<uint64_t>(slot.span.base + run * slot.span.stride);
  const uint64_t lead = first % Tiling::unit;
  const int64_t offset = in_run / Tiling::lanes * Tiling::unit + in_run % Tiling::lanes * Tiling::vector;
  return {first - lead + static_cast<uint64_t>(offset), begin - static_cast<int64_t>(lead) + offset, begin,
          end < slot.count ? end : slot.count};
}

// A group that is all there, at an address for 16-byte accesses: so many elements after that of its share.
struct WholePart {
  int offset;
};

// The share of a thread in a chunk whose shares are all whole.
template <class StorageType, class Tiling>
struct WholeShare {
  using Storage = StorageType;

  uint64_t index;
  const Storage* from;
  Storage* to;

  // Share `number` of a tensor that is one run, in a whole chunk.
  ZOEXT_HD WholeShare(const Slot& slot, int64_t number) {
    const int64_t local = local_of(slot, number);
    index = static_cast<uint64_t>(slot.span.base + local);
    from = static_cast<const Storage*>(slot.theta) + local;
    to = static_cast<Storage*>(slot.out) + local;
  }

  // Whether the shares of the chunk that begins with share `number` are whole.
  template <class TensorSlot>
  static ZOEXT_HD bool is_whole_chunk(const TensorSlot& slot, int64_t number) {
    constexpr int64_t elements = int64_t{Tiling::shares_per_chunk} * Tiling::vector * Tiling::groups;
    const int64_t local = local_of(slot, number);
    const uintptr_t offset = static_cast<uintptr_t>(local) * sizeof(Storage);
    const auto is_aligned = [&](const void* tensor) {
      return (reinterpret_cast<uintptr_t>(tensor) + offset) % sizeof(Access) == 0;
    };
    const bool is_inside = local >= 0 && local + elements <= slot.count;
    return slot.is_one_run() && slot.template is_regular<Tiling>() && is_inside && is_aligned(slot.theta) &&
           is_aligned(slot.out);
  }

  // Each is kept, since computing an address from the index of every share would take more instructions.
  ZOEXT_HD void advance() { index += Tiling::stride, from += Tiling::stride, to += Tiling::stride; }

  ZOEXT_HD const Storage* theta(const Slot&) const { return from; }
  ZOEXT_HD Storage* out(const Slot&) const { return to; }
  ZOEXT_HD WholePart group(int g) const { return {g * Tiling::step}; }

 protected:
  struct Access {
    uint32_t words[4];
  };

  static ZOEXT_HD int64_t local_of(const Slot& slot, int64_t number) {
    const int64_t lead = static_cast<int64_t>(static_cast<uint64_t>(slot.span.base) % Tiling::unit);
    return number / Tiling::lanes * Tiling::unit + number % Tiling::lanes * Tiling::vector - lead;
  }
};

// The same of a tensor that is moved where it lies.
template <class Storage, class Tiling, class TensorSlot>
struct WholeShareInPlace : WholeShare<Storage, Tiling> {
  using Base = WholeShare<Storage, Tiling>;
  using Base::to;

  int8_t* beside;

  ZOEXT_HD WholeShareInPlace(const InPlace<TensorSlot>& slot, int64_t number)
      : Base(slot, number), beside(slot.residuals + (to - static_cast<Storage*>(slot.out))) {}

  static ZOEXT_HD bool is_whole_chunk(const InPlace<TensorSlot>& slot, int64_t number) {
    const auto address = reinterpret_cast<uintptr_t>(slot.residuals + Base::local_of(slot, number));
    const bool is_aligned = slot.residuals == nullptr || address % Tiling::vector == 0;
    return Base::is_whole_chunk(slot, number) && is_aligned;
  }

  ZOEXT_HD void advance() {
    Base::advance(), beside += Tiling::stride;
#if defined(__CUDA_ARCH__)
    // Or nvcc keeps each twice, to read and to write. Where there is just one it does not.
    if constexpr (can_round<Storage>) asm("" : "+l"(to), "+l"(beside));
#endif
  }

  ZOEXT_HD const Storage* theta(const Slot&) const { return to; }
  ZOEXT_HD int8_t* residuals(const Slot&) const { return beside; }
};

}  // namespace zoext::cuda
