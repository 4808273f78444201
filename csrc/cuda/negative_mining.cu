// Streaming top-k over a panel of scores, a block per query. Nearly every column fails one
// comparison, with the worst of the k best so far; what passes is appended to a buffer of
// candidates. When the buffer might overflow, a radix selection finds the k-th best key in it,
// eight bits a pass, and the rest is dropped. One method for every k: its cost is that of reading
// the panel, plus a few selections.

#include <algorithm>

#include "cuda/best_keys.cuh"
#include "cuda/ids.cuh"
#include "cuda/portable.cuh"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "mine_negatives";
constexpr int kThreads = kBestThreads, kWarps = kBestWarps;
constexpr int kColumns = 4;        // per thread and step: loads in flight
constexpr int kSharedSort = 4096;  // keys that are sorted in shared memory: 32 KiB

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
