// Stable sort of ids of any value, by one key or by two: tiles are ranked by comparing all pairs,
// then runs are merged, twice as long each time, every element finding its place by a search of the
// other run. Where ids have a small bound, sort.cuh takes fewer passes over many of them.
#pragma once

#include <cstdint>

#include "cuda/portable.cuh"
#include "cuda/sort.cuh"
#include "tensor.h"

namespace pyreid {

struct SortKey {
  int64_t major, minor;

  __device__ bool operator<(const SortKey& other) const {
    return major < other.major || (major == other.major && minor < other.minor);
  }
  __device__ bool operator!=(const SortKey& other) const {
    return major != other.major || minor != other.minor;
  }
};

struct MergeSorted {
  const SortKey* keys;    // [count] ascending
  const uint32_t* order;  // [count] the position of each in the input
};

size_t merge_sort_workspace(int64_t count);

// By `major` (0 for all where its data is null), then by `minor`.
MergeSorted merge_sort(const char* op, Ids major, Ids minor, void* workspace, Stream stream);

// Where merge_sort has left its result in the workspace.
MergeSorted merge_sorted(int64_t count, void* workspace);

// The first place in keys[begin, end) whose key is not less than `key`; or is greater, if `after`.
template <class Keys>
__device__ __forceinline__ int64_t find_place(Keys keys, int64_t begin, int64_t end,
                                              const SortKey& key, bool after) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    const SortKey at = keys[middle];
    if (after ? !(key < at) : at < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

}  // namespace pyreid
