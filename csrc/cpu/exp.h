// The exponential function in float32, without branches or tables, so that a compiler turns loops
// over it into vector code: std::exp, one call a value, would take longer than the matrix product
// before it.
#pragma once

#include "half.h"

namespace pyreid {

// Within 2 units in the last place for x in [-87, 88]; 0 below, exactly 1 at 0, NaN for NaN. exp(x)
// is 2^n * exp(r), with n the integer nearest to x / ln 2 and |r| <= ln 2 / 2.
inline float vector_exp(float x) {
  constexpr float kLowest = -87.f;          // 2^n stays a normal number
  constexpr float kRound = 12582912.f;      // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLn2High = 0.693359375f;  // 10 bits: n times it is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float power = bits_float((float_bits(shifted) - float_bits(kRound) + 127) << 23);
  const uint32_t bits = float_bits((p * (r * r) + r + 1.f) * power);
  const uint32_t keep = 0u - uint32_t(!(x < kLowest));  // a choice here would be a branch
  return bits_float(bits & keep);
}

}  // namespace pyreid
