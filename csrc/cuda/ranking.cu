// A block per query: the keys of its matches, sorted, lie in shared memory; every other row of the
// gallery that is ahead of the last match is placed among them by bisection and counted there; the
// running sum of the counts gives the positions. Where matches are too many for shared memory they
// are taken a stretch of the gallery at a time. That works because all that is needed of a match
// can be counted: the rows ahead of it, and the matches among those.
//
// Counters are integers, and floating-point sums are left to one warp, in the order of the matches:
// nothing depends on which thread came first.

#include "cuda/ids.cuh"
#include "cuda/portable.cuh"
#include "cuda/reduce.cuh"
#include "mine_key.h"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "evaluate_ranking";
constexpr int kThreads = 256;
constexpr int kMatches = 512;    // at once; a stretch ends when the next rows might not fit
constexpr int kCounters = 1024;  // shared by matches, so that few of them have several each

// The larger, the earlier; never equal.
__device__ __forceinline__ uint64_t key_of(const RankInput& input, const float* scores,
                                           int64_t row) {
  float score = scores[row];
  if (input.are_distances) score = -score;
  if (!(score == score)) score = -INFINITY;
  return mine_key(__float_as_uint(__fadd_rn(score, 0.f)), uint32_t(row));  // + 0: -0 and 0 tie
}

__global__ void __launch_bounds__(kThreads)
    rank_kernel(const RankInput input, const RankOutput output) {
  PYREID_SHARED(uint64_t, unsorted, kMatches);
  PYREID_SHARED(uint64_t, matches, kMatches);
  PYREID_SHARED(uint32_t, ahead, kCounters);
  PYREID_SHARED(uint32_t, matches_ahead, kMatches);
  PYREID_SHARED(uint32_t, next, 1);
  const int64_t query = blockIdx.x, size = input.gallery_ids.size;
  const int lane = threadIdx.x % 32;
  const float* const scores = input.scores + query * size;
  const int64_t id = id_at(input.query_ids, query), camera = id_at(input.query_cameras, query);
  int64_t total = 0;
  double sum = 0;
  uint32_t first = 0xffffffffu, last = 0;

  int64_t begin = id < 0 ? size : 0;
  while (begin < size) {
    if (threadIdx.x == 0) next[0] = 0;
    __syncthreads();
    int count = 0;
    for (; begin < size && count <= kMatches - kThreads; begin += kThreads) {
      const int64_t row = begin + threadIdx.x;
      const bool is_match = row < size && id_at(input.gallery_ids, row) == id &&
                            id_at(input.gallery_cameras, row) != camera;
      if (is_match) unsorted[int(atomicAdd(&next[0], 1u))] = key_of(input, scores, row);
      count += __syncthreads_count(is_match);
    }
    if (count == 0) break;
    total += count;

    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint64_t key = unsorted[i];
      int place = 0;
      for (int j = 0; j < count; ++j) place += unsorted[j] > key ? 1 : 0;
      matches[place] = key;
      matches_ahead[i] = 0;
    }
    // A counter per match and lane, where there are enough: then lanes never wait for each other.
    int copies = 32;
    while (copies * count > kCounters) copies /= 2;
    for (int i = threadIdx.x; i < copies * count; i += kThreads) ahead[i] = 0;
    __syncthreads();

    const uint64_t least = matches[count - 1];
    for (int64_t row = threadIdx.x; row < size; row += kThreads) {
      const uint64_t key = key_of(input, scores, row);
      if (key <= least) continue;
      const int64_t row_id = id_at(input.gallery_ids, row);
      const bool same = row_id == id;
      if (row_id < 0 || (same && id_at(input.gallery_cameras, row) == camera)) continue;
      int low = 0, high = count - 1;  // the first match that this row is ahead of
      while (low < high) {
        const int middle = (low + high) / 2;
        if (key > matches[middle]) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      atomicAdd(&ahead[low * copies + (lane & (copies - 1))], 1u);
      if (same) atomicAdd(&matches_ahead[low], 1u);
    }
    __syncthreads();

    if (threadIdx.x < 32) {
      uint64_t carry = 0;
      for (int start = 0; start < count; start += 32) {
        const int i = start + lane;
        uint64_t both = 0;  // matches ahead above, rows ahead below
        if (i < count) {
          for (int copy = 0; copy < copies; ++copy) both += ahead[i * copies + copy];
          both |= uint64_t(uint32_t(matches_ahead[i])) << 32;
        }
        for (int step = 1; step < 32; step *= 2) {
          const uint64_t before = __shfl_up_sync(0xffffffffu, both, step);
          if (lane >= step) both += before;
        }
        both += carry;
        carry = __shfl_sync(0xffffffffu, both, 31);
        if (i >= count) continue;
        const uint32_t position = uint32_t(both) + 1, rank = uint32_t(both >> 32) + 1;
        sum += double(__fdiv_rn(float(rank), float(position)));
        first = min(first, position);
        last = max(last, position);
      }
    }
  }

  if (threadIdx.x >= 32) return;
  sum = warp_sum(sum);
  for (int step = 16; step > 0; step /= 2) {
    first = min(first, __shfl_xor_sync(0xffffffffu, first, step));
    last = max(last, __shfl_xor_sync(0xffffffffu, last, step));
  }
  if (threadIdx.x != 0) return;
  output.first[query] = total > 0 ? int64_t(first) : 0;
  output.ap[query] = total > 0 ? float(sum / double(total)) : 0.f;
  output.inp[query] = total > 0 ? __fdiv_rn(float(total), float(last)) : 0.f;
}

}  // namespace

void rank_matches(const RankInput& input, const RankOutput& output, Stream stream) {
  launch(kOp, rank_kernel, input.query_ids.size, kThreads, 0, stream, input, output);
}

}  // namespace pyreid
