// Barriers, and the operations of a warp: 32 lanes, 32-bit masks, no __activemask.
//
// A shuffle says what CUDA says: `width` splits the warp into segments, only the low five bits of
// a lane or distance count, and who would read beyond its segment keeps its own value. What CUDA
// leaves undefined, the value of a lane outside the mask, is a fault.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "emulated/scheduler.h"

constexpr int warpSize = pyreid::emulated::kWarpSize;

inline void __syncthreads(pyreid::emulated::Site site = pyreid::emulated::Site::here()) {
  pyreid::emulated::machine.barrier("__syncthreads", false, site);
}

inline int __syncthreads_count(int predicate,
                               pyreid::emulated::Site site = pyreid::emulated::Site::here()) {
  return pyreid::emulated::machine.barrier("__syncthreads_count", predicate != 0, site);
}

inline int __syncthreads_or(int predicate,
                            pyreid::emulated::Site site = pyreid::emulated::Site::here()) {
  return pyreid::emulated::machine.barrier("__syncthreads_or", predicate != 0, site) > 0;
}

inline int __syncthreads_and(int predicate,
                             pyreid::emulated::Site site = pyreid::emulated::Site::here()) {
  return pyreid::emulated::machine.barrier("__syncthreads_and", predicate == 0, site) == 0;
}

namespace pyreid::emulated {

template <class T>
uint64_t to_word(T value) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

template <class Visit>
void for_each_lane(uint32_t lanes, Visit visit) {
  for (; lanes != 0; lanes &= lanes - 1) visit(__builtin_ctz(lanes));
}

template <class T>
T exchange(const char* name, uint32_t mask, T value, int source, Site site) {
  const int thread = Machine::this_thread();
  const int lane = thread % kWarpSize;
  const int block = int(blockDim.x);
  if (source != lane && (!(mask >> source & 1) || thread - lane + source >= block)) {
    machine.fault(site, name, ": lane ", lane, " reads lane ", source, ", which ",
                  mask >> source & 1 ? "does not exist" : "is outside the mask ",
                  mask >> source & 1 ? "" : Machine::hexadecimal(mask));
  }
  const auto complete = [](Rendezvous& meeting) {
    for_each_lane(meeting.needed,
                  [&](int i) { meeting.result[i] = meeting.value[meeting.argument[i]]; });
  };
  return from_word<T>(
      machine.collective(name, mask, to_word(value), uint64_t(source), complete, site));
}

// The first lane of the segment, `width` checked.
inline int segment_start(const char* name, int width, Site site) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    machine.fault(site, name, ": width ", width, " is not a power of two up to 32");
  }
  return (Machine::this_thread() % kWarpSize) & ~(width - 1);
}

template <class T>
T shuffle(uint32_t mask, T value, int source, int width, Site site) {
  const int start = segment_start("__shfl_sync", width, site);
  return exchange("__shfl_sync", mask, value, start | (source & (width - 1)), site);
}

template <class T>
T shuffle_up(uint32_t mask, T value, unsigned delta, int width, Site site) {
  const int start = segment_start("__shfl_up_sync", width, site);
  const int lane = Machine::this_thread() % kWarpSize;
  const int source = lane - int(delta % kWarpSize);
  return exchange("__shfl_up_sync", mask, value, source >= start ? source : lane, site);
}

template <class T>
T shuffle_down(uint32_t mask, T value, unsigned delta, int width, Site site) {
  const int start = segment_start("__shfl_down_sync", width, site);
  const int lane = Machine::this_thread() % kWarpSize;
  const int source = lane + int(delta % kWarpSize);
  return exchange("__shfl_down_sync", mask, value, source < start + width ? source : lane, site);
}

// Earlier segments may be read, later ones not.
template <class T>
T shuffle_xor(uint32_t mask, T value, int lane_mask, int width, Site site) {
  const int start = segment_start("__shfl_xor_sync", width, site);
  const int lane = Machine::this_thread() % kWarpSize;
  const int source = lane ^ (lane_mask & (kWarpSize - 1));
  return exchange("__shfl_xor_sync", mask, value, source < start + width ? source : lane, site);
}

inline uint32_t ballot(const char* name, uint32_t mask, bool predicate, Site site) {
  const auto complete = [](Rendezvous& meeting) {
    uint32_t lanes = 0;
    for_each_lane(meeting.needed, [&](int i) { lanes |= uint32_t(meeting.value[i]) << i; });
    for_each_lane(meeting.needed, [&](int i) { meeting.result[i] = lanes; });
  };
  return uint32_t(machine.collective(name, mask, predicate, 0, complete, site));
}

inline uint32_t match(uint32_t mask, uint64_t value, Site site) {
  const auto complete = [](Rendezvous& meeting) {
    for_each_lane(meeting.needed, [&](int i) {
      uint32_t lanes = 0;
      for_each_lane(meeting.needed,
                    [&](int j) { lanes |= uint32_t(meeting.value[i] == meeting.value[j]) << j; });
      meeting.result[i] = lanes;
    });
  };
  return uint32_t(machine.collective("__match_any_sync", mask, value, 0, complete, site));
}

template <class T, class Operation>
T reduce(const char* name, uint32_t mask, T value, Site site) {
  const auto complete = [](Rendezvous& meeting) {
    uint64_t sum = meeting.value[__builtin_ctz(meeting.needed)];
    for_each_lane(meeting.needed & (meeting.needed - 1), [&](int i) {
      sum = to_word(Operation()(from_word<T>(sum), from_word<T>(meeting.value[i])));
    });
    for_each_lane(meeting.needed, [&](int i) { meeting.result[i] = sum; });
  };
  return from_word<T>(machine.collective(name, mask, to_word(value), 0, complete, site));
}

struct Add {  // wraps around
  template <class T>
  T operator()(T a, T b) const {
    return T(unsigned(a) + unsigned(b));
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct Or {
  unsigned operator()(unsigned a, unsigned b) const { return a | b; }
};
struct And {
  unsigned operator()(unsigned a, unsigned b) const { return a & b; }
};

}  // namespace pyreid::emulated

// Overloads rather than templates, so that arguments convert as they do in CUDA.
#define PYREID_SHUFFLES(T)                                                                  \
  inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,            \
                       pyreid::emulated::Site site = pyreid::emulated::Site::here()) {      \
    return pyreid::emulated::shuffle(mask, value, source, width, site);                     \
  }                                                                                         \
  inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,     \
                          pyreid::emulated::Site site = pyreid::emulated::Site::here()) {   \
    return pyreid::emulated::shuffle_up(mask, value, delta, width, site);                   \
  }                                                                                         \
  inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,   \
                            pyreid::emulated::Site site = pyreid::emulated::Site::here()) { \
    return pyreid::emulated::shuffle_down(mask, value, delta, width, site);                 \
  }                                                                                         \
  inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,     \
                           pyreid::emulated::Site site = pyreid::emulated::Site::here()) {  \
    return pyreid::emulated::shuffle_xor(mask, value, lane_mask, width, site);              \
  }
PYREID_SHUFFLES(int)
PYREID_SHUFFLES(unsigned)
PYREID_SHUFFLES(long)
PYREID_SHUFFLES(unsigned long)
PYREID_SHUFFLES(long long)
PYREID_SHUFFLES(unsigned long long)
PYREID_SHUFFLES(float)
PYREID_SHUFFLES(double)
#undef PYREID_SHUFFLES

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       pyreid::emulated::Site site = pyreid::emulated::Site::here()) {
  pyreid::emulated::machine.collective(
      "__syncwarp", mask, 0, 0, [](pyreid::emulated::Rendezvous&) {}, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              pyreid::emulated::Site site = pyreid::emulated::Site::here()) {
  return pyreid::emulated::ballot("__ballot_sync", mask, predicate != 0, site);
}

inline int __any_sync(unsigned mask, int predicate,
                      pyreid::emulated::Site site = pyreid::emulated::Site::here()) {
  return pyreid::emulated::ballot("__any_sync", mask, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      pyreid::emulated::Site site = pyreid::emulated::Site::here()) {
  return pyreid::emulated::ballot("__all_sync", mask, predicate == 0, site) == 0;
}

#define PYREID_MATCH(T)                                                                            \
  inline unsigned __match_any_sync(unsigned mask, T value,                                         \
                                   pyreid::emulated::Site site = pyreid::emulated::Site::here()) { \
    return pyreid::emulated::match(mask, pyreid::emulated::to_word(value), site);                  \
  }
PYREID_MATCH(int)
PYREID_MATCH(unsigned)
PYREID_MATCH(long)
PYREID_MATCH(unsigned long)
PYREID_MATCH(long long)
PYREID_MATCH(unsigned long long)
PYREID_MATCH(float)
PYREID_MATCH(double)
#undef PYREID_MATCH

#define PYREID_REDUCE(name, T, Operation)                                                      \
  inline T name(unsigned mask, T value,                                                        \
                pyreid::emulated::Site site = pyreid::emulated::Site::here()) {                \
    return pyreid::emulated::reduce<T, pyreid::emulated::Operation>(#name, mask, value, site); \
  }
PYREID_REDUCE(__reduce_add_sync, int, Add)
PYREID_REDUCE(__reduce_add_sync, unsigned, Add)
PYREID_REDUCE(__reduce_min_sync, int, Min)
PYREID_REDUCE(__reduce_min_sync, unsigned, Min)
PYREID_REDUCE(__reduce_max_sync, int, Max)
PYREID_REDUCE(__reduce_max_sync, unsigned, Max)
PYREID_REDUCE(__reduce_or_sync, unsigned, Or)
PYREID_REDUCE(__reduce_and_sync, unsigned, And)
#undef PYREID_REDUCE
