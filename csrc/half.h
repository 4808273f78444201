// float16 and bfloat16 as 16-bit patterns on the host: round to nearest even, without branches, so
// that a compiler turns loops over them into vector code.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyreid {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct HostHalf {
  uint16_t bits;
};

struct HostBFloat16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(HostHalf half) {
  const uint32_t sign = uint32_t(half.bits & 0x8000) << 16;
  const uint32_t magnitude = half.bits & 0x7fff;
  constexpr uint32_t kRebias = uint32_t(127 - 15) << 23;
  const uint32_t normal = (magnitude << 13) + kRebias;
  const uint32_t special = normal + kRebias;  // exponent 31 becomes 255: infinity and NaN
  const uint32_t subnormal = float_bits(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x400 ? subnormal : normal;
  return bits_float(sign | (magnitude < 0x7c00 ? finite : special));
}

inline float widen(HostBFloat16 half) { return bits_float(uint32_t(half.bits) << 16); }

template <class T>
T narrow(float value);

template <>
inline float narrow<float>(float value) {
  return value;
}

template <>
inline HostHalf narrow<HostHalf>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // Adding 0.5 leaves 24 bits below it: the unit of a float16 subnormal, rounded by the adder
  // itself.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t normal =
      (magnitude + 0xfff + ((magnitude >> 13) & 1) - (uint32_t(112) << 23)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  return {uint16_t(sign | (magnitude < 0x47800000 ? finite : special))};
}

template <>
inline HostBFloat16 narrow<HostBFloat16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded)};
}

}  // namespace pyreid
