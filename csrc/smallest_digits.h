// Distances as integers of the same order, and their digits, for selection from the top.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "mine_key.h"

namespace pyreid {

constexpr int kDigits = 2048, kPasses = 3;
constexpr uint32_t kOneKey = 0xbf800000u;  // of 1, the distance of a pair that is not stored

// Bits that a digit starts at. The last two digits share one bit, which does no harm.
PYREID_BOTH int digit_shift(int pass) { return pass == 0 ? 21 : pass == 1 ? 10 : 0; }

// NaN comes last, whatever its sign.
PYREID_BOTH uint32_t distance_key(uint32_t bits) {
  return (bits & 0x7fffffffu) > 0x7f800000u ? UINT32_MAX : ordered_bits(bits);
}

PYREID_BOTH int digit_of(uint32_t key, int pass) {
  return int(key >> digit_shift(pass)) & (kDigits - 1);
}

// Whether the digits of earlier passes are those of `prefix`, which is zero below them.
PYREID_BOTH bool begins_with(uint32_t key, uint32_t prefix, int pass) {
  return pass == 0 || (key ^ prefix) >> digit_shift(pass - 1) == 0;
}

PYREID_BOTH int64_t pairs_of(int64_t samples) { return samples * (samples - 1) / 2; }

}  // namespace pyreid
