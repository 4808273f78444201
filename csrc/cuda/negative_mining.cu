// Streaming top-k over a panel of scores, a block per query. Nearly every column fails one
// comparison, with the worst of the k best so far; what passes is appended to a buffer of
// candidates. When the buffer might overflow, a radix selection finds the k-th best key in it,
// eight bits a pass, and the rest is dropped. One method for every k: its cost is that of reading
// the panel, plus a few selections.
//
// Candidates are appended in whatever order the warps arrive; their set, all that is ever used of
// them, is the same in every run, and keys are distinct, so the sorted result is too.

#include <algorithm>

#include "cuda/ids.cuh"
#include "cuda/portable.cuh"
#include "mine_key.h"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "mine_negatives";
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kColumns = 4;        // per thread and step: loads in flight
constexpr int kSharedSort = 4096;  // keys that are sorted in shared memory: 32 KiB

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
  SharedPointer<uint32_t> warp_totals;  // [kWarps]
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
      for (int i = threadIdx.x; i < count; i += kThreads)
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
    for (int begin = 0; begin < count; begin += kThreads) {
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

// Four blocks a multiprocessor: left alone, the compiler spills to fit six.
__global__ void __launch_bounds__(kThreads, 4)
    mine_panel_kernel(const float* __restrict__ scores,  // [B, columns]
                      int64_t columns, int64_t first_row, const MineRules rules,
                      const MineState state) {
  PYREID_SHARED(uint32_t, histogram, 256);
  PYREID_SHARED(uint32_t, warp_totals, kWarps);
  PYREID_SHARED(uint32_t, found, 3);
  const int64_t query = blockIdx.x;
  const bool fresh = first_row == 0;
  Best best{state.candidates + query * state.capacity,
            state.keep,
            fresh ? 0 : state.counts[query],
            fresh ? 0 : state.thresholds[query],
            &histogram[0],
            &warp_totals[0],
            &found[0]};
  const int64_t self_row = rules.self_rows.data ? id_at(rules.self_rows, query) : -1;
  const int64_t group = rules.query_groups.data ? id_at(rules.query_groups, query) : -1;
  const int64_t camera = rules.query_cameras.data ? id_at(rules.query_cameras, query) : 0;
  const float* const row_scores = scores + query * columns;
  // A penalty below zero is a bonus: then the bare score says nothing about the bound.
  const bool filter = !(rules.camera_penalty < 0.f);
  float bound = best.bound();

  for (int64_t begin = 0; begin < columns; begin += kThreads * kColumns) {
    float value[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int64_t i = begin + j * kThreads + threadIdx.x;
      value[j] = i < columns ? row_scores[i] : -INFINITY;
    }
    uint64_t key[kColumns];
    bool any = false;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int64_t row = first_row + begin + j * kThreads + threadIdx.x;
      key[j] = 0;
      if (filter ? !(value[j] > bound) : !(value[j] > -INFINITY)) continue;
      float score = value[j];
      if (rules.query_cameras.data && id_at(rules.bank_cameras, row) == camera)
        score = __fsub_rn(score, rules.camera_penalty);
      const uint64_t candidate =
          mine_key(__float_as_uint(__fadd_rn(score, 0.f)), uint32_t(row));  // + 0: -0 and 0 tie
      if (score > -INFINITY && candidate > best.threshold && row != self_row &&
          !(group >= 0 && id_at(rules.bank_groups, row) == group))
        key[j] = candidate;
      any |= key[j] != 0;
    }
    if (!__syncthreads_or(any)) continue;
    if (best.count + kThreads * kColumns > state.capacity) {
      best.compact();
      bound = best.bound();
    }
    if (threadIdx.x == 0) found[2] = uint32_t(best.count);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kColumns; ++j) best.append(key[j], key[j] > best.threshold);
    __syncthreads();
    best.count = int(uint32_t(found[2]));
  }
  if (threadIdx.x == 0) {
    state.counts[query] = best.count;
    state.thresholds[query] = best.threshold;
  }
}

// Largest first, in place; `size` is a power of two.
template <class Keys>
__device__ void bitonic_sort(Keys keys, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
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
  for (int64_t i = threadIdx.x; i < k; i += kThreads) {
    const int64_t rank = skip + i;
    const uint64_t key = rank < count ? uint64_t(keys[int(rank)]) : 0;
    scores[i] = rank < count ? key_score(key) : -INFINITY;
    rows[i] = rank < count ? key_row(key) : -1;
  }
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads)
    mine_finish_kernel(const MineState state, int64_t skip, int size,
                       float* __restrict__ scores,    // [B, keep - skip]
                       int64_t* __restrict__ rows) {  // [B, keep - skip]
  PYREID_SHARED(uint32_t, histogram, 256);
  PYREID_SHARED(uint32_t, warp_totals, kWarps);
  PYREID_SHARED(uint32_t, found, 3);
  PYREID_DYNAMIC_SHARED(uint64_t, sorted);
  const int64_t query = blockIdx.x, k = state.keep - skip;
  Best best{state.candidates + query * state.capacity,
            state.keep,
            state.counts[query],
            state.thresholds[query],
            &histogram[0],
            &warp_totals[0],
            &found[0]};
  if (best.count > state.keep) best.compact();
  __syncthreads();
  if (kShared) {
    for (int i = threadIdx.x; i < size; i += kThreads)
      sorted[i] = i < best.count ? best.keys[i] : 0;
    bitonic_sort(sorted, size);
    write_ranks(sorted, best.count, skip, k, scores + query * k, rows + query * k);
  } else {
    for (int i = best.count + int(threadIdx.x); i < size; i += kThreads) best.keys[i] = 0;
    bitonic_sort(best.keys, size);
    write_ranks(best.keys, best.count, skip, k, scores + query * k, rows + query * k);
  }
}

}  // namespace

void mine_panel(const float* scores, int64_t columns, int64_t first_row, const MineRules& rules,
                const MineState& state, Stream stream) {
  launch(kOp, mine_panel_kernel, state.queries, kThreads, 0, stream, scores, columns, first_row,
         rules, state);
}

void mine_finish(const MineState& state, int64_t skip, float* scores, int64_t* rows,
                 Stream stream) {
  int size = 1;
  while (size < state.keep) size *= 2;
  if (size <= kSharedSort) {
    launch(kOp, mine_finish_kernel<true>, state.queries, kThreads, size * sizeof(uint64_t), stream,
           state, skip, size, scores, rows);
  } else {
    launch(kOp, mine_finish_kernel<false>, state.queries, kThreads, 0, stream, state, skip, size,
           scores, rows);
  }
}

}  // namespace pyreid
