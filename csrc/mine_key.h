// A score and a bank row as one integer whose order is the order of mining: higher score first, on
// ties the lower row.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyreid {

// `bits` of a float, such that unsigned order is the order of the floats. -0 must have been made
// +0.
PYREID_HOST_DEVICE uint32_t ordered_bits(uint32_t bits) {
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

PYREID_HOST_DEVICE uint32_t float_bits_of(uint32_t ordered) {
  return ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
}

PYREID_HOST_DEVICE uint64_t mine_key(uint32_t bits, uint32_t row) {
  return uint64_t(ordered_bits(bits)) << 32 | uint32_t(~row);
}

PYREID_HOST_DEVICE uint32_t key_score_bits(uint64_t key) {
  return float_bits_of(uint32_t(key >> 32));
}

PYREID_HOST_DEVICE int64_t key_row(uint64_t key) { return uint32_t(~uint32_t(key)); }

}  // namespace pyreid
