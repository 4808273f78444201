// Labels in a hash table: where to look for a key, and two labels as one key.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyreid {

// Every bit of the result depends on every bit of the key (the finaliser of MurmurHash3).
PYREID_BOTH uint64_t mixed(uint64_t key) {
  key = (key ^ key >> 33) * 0xff51afd7ed558ccdull;
  key = (key ^ key >> 33) * 0xc4ceb9fe1a85ec53ull;
  return key ^ key >> 33;
}

// Two places in tables of at most 2^31, never negative.
PYREID_BOTH int64_t pair_key(uint32_t first, uint32_t second) {
  return int64_t(first) << 32 | second;
}

// A power of two that leaves at least half of the table empty.
PYREID_BOTH int64_t table_capacity(int64_t keys) {
  int64_t capacity = 2;
  while (capacity < 2 * keys) capacity *= 2;
  return capacity;
}

}  // namespace pyreid
