// Sums in a fixed order that vector units like: 16 lanes, added up at the end. Every instruction
// level gives the same bits.
#pragma once

#include <cstdint>

namespace pyreid {

constexpr int kLanes = 16;

// term(0) + ... + term(count - 1)
template <class Term>
float lane_sum(int64_t count, Term term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  for (int lane = 0; i + lane < count; ++lane) lanes[lane] += term(i + lane);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

}  // namespace pyreid
