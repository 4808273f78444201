// Random numbers that are functions of a seed and a counter, the same bits on every floor: the
// generator Philox4x32-10 (Salmon et al., SC 2011), and a random order of [0, size) made from it.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyreid {

struct Random4 {
  uint32_t v[4];
};

PYREID_BOTH Random4 philox(uint64_t seed, Random4 counter) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t(0xD2511F53u) * counter.v[0];
    const uint64_t q = uint64_t(0xCD9E8D57u) * counter.v[2];
    counter = {{uint32_t(q >> 32) ^ counter.v[1] ^ key0, uint32_t(q),
                uint32_t(p >> 32) ^ counter.v[3] ^ key1, uint32_t(p)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// A bijection of [0, size), evaluated at one place at a time: a Feistel network on the next power
// of two, keyed by Philox, applied again wherever it leaves [0, size).
//
// Two places are within 2^-(rounds / 2 * bits of the smaller half) of an independent draw. With at
// least four bits a half and twelve rounds that is 2^-24; fewer bits would mix too slowly, so that
// a small size walks further instead.
struct RandomOrder {
  static constexpr int kRounds = 12;

  uint32_t size;  // at least 1
  int high_bits, low_bits;
  uint32_t keys[kRounds];

  // `stream` and `purpose` tell apart the orders of one seed.
  PYREID_BOTH RandomOrder(uint64_t seed, uint32_t stream, uint32_t purpose, uint32_t size)
      : size(size) {
    int bits = 8;
    while (bits < 32 && (size - 1) >> bits > 0) ++bits;
    high_bits = bits / 2;
    low_bits = bits - high_bits;
    PYREID_UNROLL
    for (int i = 0; i < kRounds / 4; ++i) {
      const Random4 random = philox(seed, {{uint32_t(i), stream, purpose, 0}});
      for (int j = 0; j < 4; ++j) keys[4 * i + j] = random.v[j];
    }
  }

  // The finaliser of MurmurHash3: every bit of the input stirs every bit of the output.
  PYREID_BOTH static uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
  }

  // The network itself; may leave [0, size).
  PYREID_BOTH uint32_t once(uint32_t x) const {
    uint32_t high = x >> low_bits, low = x & ((1u << low_bits) - 1);
    PYREID_UNROLL
    for (int round = 0; round < kRounds; round += 2) {
      high ^= mixed(low + keys[round]) >> (32 - high_bits);
      low ^= mixed(high + keys[round + 1]) >> (32 - low_bits);
    }
    return high << low_bits | low;
  }

  PYREID_BOTH uint32_t operator()(uint32_t x) const {
    do x = once(x);
    while (x >= size);
    return x;
  }
};

}  // namespace pyreid
