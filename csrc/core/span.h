// Where a local tensor lies in the whole, unsharded parameter.
#pragma once

#include "platform.h"

namespace zoext {

// Local element i has index base + (i / run) * stride + i % run: any one-dimensional shard
// (one run) and any two-dimensional block (a run per row).
struct Span {
  int64_t base, run, stride;

  ZOEXT_HD uint64_t index(int64_t i) const { return static_cast<uint64_t>(base + i / run * stride + i % run); }
};

}  // namespace zoext
