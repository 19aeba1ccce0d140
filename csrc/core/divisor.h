// Division by a number that is known before the launch: Granlund and Montgomery, "Division by invariant
// integers using multiplication", PLDI 1994. A processor's own takes tens of instructions, and on CUDA a
// call.
#pragma once

#include "platform.h"

namespace zoext {

class Divisor {
 public:
  Divisor() = default;  // of nothing: a table of thousands of tensors begins without them

  // `divisor` from 1 to 2^63.
  explicit Divisor(int64_t divisor) : divisor_(static_cast<uint64_t>(divisor)), shift_(0) {
    while (shift_ < 63 && (uint64_t{1} << shift_) < divisor_) ++shift_;
    // ceil(2^(63 + shift) / divisor): too large by less than 2^-63 of itself, and below 2^64.
    const unsigned __int128 power = static_cast<unsigned __int128>(1) << (63 + shift_);
    reciprocal_ = static_cast<uint64_t>((power + divisor_ - 1) / divisor_);
  }

  ZOEXT_HD int64_t value() const { return static_cast<int64_t>(divisor_); }

  // number / divisor, for numbers that are not negative.
  ZOEXT_HD int64_t quotient(int64_t number) const {
    const uint64_t twice = static_cast<uint64_t>(number) << 1;
#if defined(__CUDA_ARCH__)
    return static_cast<int64_t>(__umul64hi(twice, reciprocal_) >> shift_);
#else
    return static_cast<int64_t>(static_cast<uint64_t>(static_cast<unsigned __int128>(twice) * reciprocal_ >> 64) >>
                                shift_);
#endif
  }

 private:
  uint64_t divisor_, reciprocal_;
  uint32_t shift_;
};

}  // namespace zoext
