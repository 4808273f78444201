// Sums, norms and maxima in a fixed order that vector units like: 16 lanes, added up at the end.
// Every instruction level gives the same bits.
#pragma once

#include <cmath>
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

// Divides by the L2 norm, or by 1e-12 if that is more.
inline void scale_to_unit(float* values, int64_t count) {
  const float squares = lane_sum(count, [=](int64_t i) { return values[i] * values[i]; });
  const float scale = 1.f / std::fmax(std::sqrt(squares), 1e-12f);
  for (int64_t i = 0; i < count; ++i) values[i] *= scale;
}

// The largest of values[0], ..., values[count - 1] that are numbers; minus infinity where there is
// none.
inline float lane_max(int64_t count, const float* values) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = -INFINITY;
  const auto take = [](float& largest, float value) {
    largest = value > largest ? value : largest;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) take(lanes[lane], values[i + lane]);
  for (int lane = 0; i + lane < count; ++lane) take(lanes[lane], values[i + lane]);
  for (int lane = 1; lane < kLanes; ++lane) take(lanes[0], lanes[lane]);
  return lanes[0];
}

}  // namespace pyreid
