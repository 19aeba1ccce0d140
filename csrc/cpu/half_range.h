// Numbers of float16 that are found by a few operations on lanes of 16 bits.
#pragma once

#include <cstdint>

namespace zoext::cpu {

// Where one of these bits is set in a pattern plus this offset, the magnitude is above the smallest normal
// number, 0x0400, and not above 0x7400, which is 2^14: so far from both ends that no number rounded to such a
// pattern was subnormal or too large for float16.
constexpr int16_t half_range_offset = 0x0bff, half_range_bits = 0x7000;

}  // namespace zoext::cpu
