// The device functions of CUDA that need no other thread: bits, rounding, minima, atomics.
//
// Overloads are CUDA's own, so that an ambiguous call is ambiguous here too. Atomics are plain
// operations, as fibers only change at barriers and warp operations.
#pragma once

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <cstring>

#include "emulated/shared_memory.h"

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __brev(unsigned x) {
  x = (x >> 16) | (x << 16);
  x = ((x & 0xff00ff00u) >> 8) | ((x & 0x00ff00ffu) << 8);
  x = ((x & 0xf0f0f0f0u) >> 4) | ((x & 0x0f0f0f0fu) << 4);
  x = ((x & 0xccccccccu) >> 2) | ((x & 0x33333333u) << 2);
  return ((x & 0xaaaaaaaau) >> 1) | ((x & 0x55555555u) << 1);
}
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((uint64_t(x) * y) >> 32); }
inline int __mulhi(int x, int y) { return int((int64_t(x) * y) >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<unsigned long long>((Wide(x) * y) >> 64);
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

namespace pyreid::emulated {

// A value that the compiler cannot see through: it may not fuse its product with a later sum.
inline float rounded(float x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#else
  asm("" : "+w"(x));
#endif
  return x;
}

}  // namespace pyreid::emulated

inline float __fmul_rn(float x, float y) { return pyreid::emulated::rounded(x * y); }
inline float __fadd_rn(float x, float y) { return pyreid::emulated::rounded(x + y); }
inline float __fsub_rn(float x, float y) { return pyreid::emulated::rounded(x - y); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fdiv_rn(float x, float y) { return pyreid::emulated::rounded(x / y); }
inline float __frcp_rn(float x) { return pyreid::emulated::rounded(1.f / x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
// The device functions below are within a few units in the last place, not equal to these.
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }

#define PYREID_MIN_MAX(T, A, B)                                                        \
  inline T min(A a, B b) { return std::min<T>(static_cast<T>(a), static_cast<T>(b)); } \
  inline T max(A a, B b) { return std::max<T>(static_cast<T>(a), static_cast<T>(b)); }
PYREID_MIN_MAX(int, int, int)
PYREID_MIN_MAX(unsigned, unsigned, unsigned)
PYREID_MIN_MAX(unsigned, int, unsigned)
PYREID_MIN_MAX(unsigned, unsigned, int)
PYREID_MIN_MAX(long, long, long)
PYREID_MIN_MAX(unsigned long, unsigned long, unsigned long)
PYREID_MIN_MAX(unsigned long, long, unsigned long)
PYREID_MIN_MAX(unsigned long, unsigned long, long)
PYREID_MIN_MAX(long long, long long, long long)
PYREID_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
PYREID_MIN_MAX(unsigned long long, long long, unsigned long long)
PYREID_MIN_MAX(unsigned long long, unsigned long long, long long)
#undef PYREID_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(double(a), b); }
inline double max(float a, double b) { return fmax(double(a), b); }
inline double min(double a, float b) { return fmin(a, double(b)); }
inline double max(double a, float b) { return fmax(a, double(b)); }

inline void __threadfence() {}
inline void __threadfence_block() {}

[[noreturn]] inline void __trap(pyreid::emulated::Site site = pyreid::emulated::Site::here()) {
  pyreid::emulated::machine.fault(site, "__trap");
}

namespace pyreid::emulated {

[[noreturn]] inline void assertion_failed(const char* condition, Site site = Site::here()) {
  machine.fault(site, "assertion failed: ", condition);
}

}  // namespace pyreid::emulated

// In kernels it always holds or faults; abort() would take the tests with it.
#undef assert
#define assert(condition) ((condition) ? void(0) : ::pyreid::emulated::assertion_failed(#condition))

// An atomic operation on global memory for each type that CUDA has it for, and on shared memory.
#define PYREID_ATOMIC(name, T, next)                                                \
  inline T name(T* pointer, T operand) {                                            \
    const T old = *pointer;                                                         \
    *pointer = next;                                                                \
    return old;                                                                     \
  }                                                                                 \
  inline T name(pyreid::emulated::SharedPointer<T> pointer, T operand,              \
                pyreid::emulated::Site site = pyreid::emulated::Site::here()) {     \
    pyreid::emulated::Toucher toucher = pointer.touch(sizeof(T), alignof(T), site); \
    toucher.update_atomically();                                                    \
    return name(reinterpret_cast<T*>(toucher.data()), operand);                     \
  }
#define PYREID_WORDS(name, next)      \
  PYREID_ATOMIC(name, int, next)      \
  PYREID_ATOMIC(name, unsigned, next) \
  PYREID_ATOMIC(name, unsigned long long, next)
PYREID_ATOMIC(atomicAdd, int, int(unsigned(old) + unsigned(operand)))
PYREID_ATOMIC(atomicAdd, unsigned, old + operand)
PYREID_ATOMIC(atomicAdd, unsigned long long, old + operand)
PYREID_ATOMIC(atomicAdd, float, old + operand)
PYREID_WORDS(atomicMin, std::min(old, operand))
PYREID_ATOMIC(atomicMin, long long, std::min(old, operand))
PYREID_WORDS(atomicMax, std::max(old, operand))
PYREID_ATOMIC(atomicMax, long long, std::max(old, operand))
PYREID_WORDS(atomicExch, operand)
PYREID_ATOMIC(atomicExch, float, operand)
PYREID_WORDS(atomicOr, old | operand)
PYREID_WORDS(atomicAnd, old& operand)
#undef PYREID_WORDS
#undef PYREID_ATOMIC

#define PYREID_COMPARE_AND_SWAP(T)                                                   \
  inline T atomicCAS(T* pointer, T compare, T value) {                               \
    const T old = *pointer;                                                          \
    if (old == compare) *pointer = value;                                            \
    return old;                                                                      \
  }                                                                                  \
  inline T atomicCAS(pyreid::emulated::SharedPointer<T> pointer, T compare, T value, \
                     pyreid::emulated::Site site = pyreid::emulated::Site::here()) { \
    pyreid::emulated::Toucher toucher = pointer.touch(sizeof(T), alignof(T), site);  \
    toucher.update_atomically();                                                     \
    return atomicCAS(reinterpret_cast<T*>(toucher.data()), compare, value);          \
  }
PYREID_COMPARE_AND_SWAP(int)
PYREID_COMPARE_AND_SWAP(unsigned)
PYREID_COMPARE_AND_SWAP(unsigned long long)
#undef PYREID_COMPARE_AND_SWAP
