// The best rows so far of one query, as keys in global memory, kept by a block.
//
// Candidates are appended in whatever order the warps arrive; their set, all that is ever used of
// them, is the same in every run, and keys are distinct, so the sorted result is too.
#pragma once

#include "cuda/portable.cuh"
#include "mine_key.h"

namespace pyreid {

constexpr int kBestThreads = 256, kBestWarps = kBestThreads / 32;

__device__ __forceinline__ float key_score(uint64_t key) {
  return __uint_as_float(key_score_bits(key));
}

// The candidates of one query, and what the block shares about them.
struct Best {
  uint64_t* keys;  // [capacity]
  int64_t keep;
  int count;
  uint64_t threshold;
  SharedPointer<uint32_t> histogram;    // [256]
  SharedPointer<uint32_t> warp_totals;  // [kBestWarps]
  SharedPointer<uint32_t> found;        // [3]: digit, rank left, next free place

  // Scores at or below this one cannot count any more: rows come in ascending order.
  __device__ float bound() const { return threshold == 0 ? -INFINITY : key_score(threshold); }

  // The rank-th largest key (from 1), by its digits from the top.
  __device__ uint64_t select(uint32_t rank) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t prefix = 0, mask = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
      histogram[threadIdx.x] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kBestThreads)
        if ((keys[i] & mask) == prefix) atomicAdd(&histogram[int((keys[i] >> shift) & 255)], 1u);
      __syncthreads();
      const int digit = 255 - int(threadIdx.x);
      const uint32_t amount = histogram[digit];
      uint32_t at_least = amount;  // keys with this digit or a larger one
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t above = __shfl_up_sync(0xffffffffu, at_least, step);
        if (lane >= step) at_least += above;
      }
      if (lane == 31) warp_totals[warp] = at_least;
      __syncthreads();
      for (int w = 0; w < warp; ++w) at_least += warp_totals[w];
      if (at_least >= rank && at_least - amount < rank) {
        found[0] = uint32_t(digit);
        found[1] = rank - (at_least - amount);
      }
      __syncthreads();
      prefix |= uint64_t(uint32_t(found[0])) << shift;
      mask |= uint64_t(255) << shift;
      rank = found[1];
    }
    return prefix;
  }

  __device__ void compact() {
    if (count < keep) return;
    threshold = select(uint32_t(keep));
    if (threadIdx.x == 0) found[2] = 0;
    __syncthreads();
    for (int begin = 0; begin < count; begin += kBestThreads) {
      const int i = begin + int(threadIdx.x);
      const uint64_t key = i < count ? keys[i] : 0;
      __syncthreads();  // all of a stretch is read before any of it is written over
      append(key, key >= threshold);
    }
    __syncthreads();
    count = int(keep);
  }

  // Puts the keys of the threads that have one at the next free places. Warps come as they come.
  __device__ void append(uint64_t key, bool mine) {
    const uint32_t takers = __ballot_sync(0xffffffffu, mine);
    const int lane = threadIdx.x % 32;
    uint32_t place = 0;
    if (lane == 0 && takers != 0) place = atomicAdd(&found[2], uint32_t(__popc(takers)));
    place = __shfl_sync(0xffffffffu, place, 0);
    if (mine) keys[place + __popc(takers & ((1u << lane) - 1))] = key;
  }
};

// Largest first, in place; `size` is a power of two.
template <class Keys>
__device__ void bitonic_sort(Keys keys, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < size / 2; pair += kBestThreads) {
        const int low = pair / stride * 2 * stride + pair % stride, high = low + stride;
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

template <class Keys>
__device__ void write_ranks(Keys keys, int count, int64_t skip, int64_t k, float* scores,
                            int64_t* rows) {
  for (int64_t i = threadIdx.x; i < k; i += kBestThreads) {
    const int64_t rank = skip + i;
    const uint64_t key = rank < count ? uint64_t(keys[int(rank)]) : 0;
    scores[i] = rank < count ? key_score(key) : -INFINITY;
    rows[i] = rank < count ? key_row(key) : -1;
  }
}

}  // namespace pyreid
