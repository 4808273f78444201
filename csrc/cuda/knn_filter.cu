// The half-precision filter of knn. Let x be a query and y a row, times their powers of two; x', y'
// the same rounded to float16; d = x - x', t = y - y'. Then
//
//   |<x, y> - product of x' and y'| <= |d| |y| + |x| |t| + |d| |t| + accumulation
//                                   <= e := |d| n + |x| r + |d| r + c |x| n
//
// by Cauchy-Schwarz, with n and r the largest |y| and |t|. Products of float16 are exact in
// float32; for their sum, c takes each of D additions to lose up to 2^-22 of |x| |y|, more than
// tensor cores, which align and truncate, and twice what rounding loses; float32 products are in c
// too. If K is the k-th largest product of a query, k rows are at K - e or above, and a row whose
// product is below K - 2 e is none of the best k. The query is certain if the last one of its list
// is: all that may count are listed, and only these are multiplied again. The others fail, and meet
// all rows.

#include "cuda/best_keys.cuh"
#include "cuda/by_dtype.cuh"
#include "cuda/portable.cuh"
#include "cuda/reduce.cuh"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "knn";
constexpr int kThreads = kBestThreads, kWarps = kBestWarps;
constexpr int kGroup = 8;  // queries that share the reading of a row, where they meet all of them

// The power of two for rows of which the longest has this squared norm, or 0.
__device__ float scale_for(float largest) {
  if (!(largest >= 0x1p-60f && largest <= 0x1p60f)) return 0.f;
  const int exponent = int(__float_as_uint(largest) >> 23) - 127;
  const int half = (exponent + 2) >> 1;  // the norm is below 2^half
  return __uint_as_float(uint32_t(14 - half + 127) << 23);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    half_rows_kernel(const T* __restrict__ rows,  // [N, dim]
                     int64_t dim, const float* __restrict__ largest,
                     Half* __restrict__ values,    // [N, dim]
                     float* __restrict__ lengths,  // [N]
                     float* __restrict__ rests) {  // [N]
  PYREID_SHARED(float, partials, kWarps);
  const int64_t row = blockIdx.x;
  const float scale = scale_for(*largest);
  float squares = 0.f, rest_squares = 0.f;
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) {
    const float value = __fmul_rn(to_float(rows[row * dim + i]), scale);
    const Half rounded = from_float<Half>(value);
    const float rest = __fadd_rn(value, -to_float(rounded));
    values[row * dim + i] = rounded;
    squares = __fadd_rn(squares, __fmul_rn(value, value));
    rest_squares = __fadd_rn(rest_squares, __fmul_rn(rest, rest));
  }
  squares = block_sum(squares, partials);
  rest_squares = block_sum(rest_squares, partials);
  if (threadIdx.x != 0) return;
  constexpr float kMore = 1.001f;  // what sums of squares may lack
  lengths[row] = scale == 0.f ? INFINITY : __fmul_rn(kMore, sqrtf(squares));
  rests[row] = __fmul_rn(kMore, sqrtf(rest_squares));
}

// Twice e of a query; infinity or NaN where nothing is certain.
__device__ float slack_of(const Refinement& found, int64_t query) {
  const float n = *found.longest, r = *found.largest_rest;
  const float x = found.lengths[query], d = found.rests[query];
  const float c = float(found.features.cols + 64) * 0x1p-22f;
  return 2.01f * (d * n + x * r + d * r + c * x * n + 1e-6f);
}

// Every lane gets the dot product; its bits depend on the two rows alone.
template <class T>
__device__ float warp_dot(const float* query, const T* row, int64_t dim) {
  float sum = 0.f;
  for (int64_t i = threadIdx.x % 32; i < dim; i += 32)
    sum = __fadd_rn(sum, __fmul_rn(query[i], to_float(row[i])));
  return warp_sum(sum);
}

__device__ uint64_t key_of(float score, int64_t row) {
  return mine_key(__float_as_uint(__fadd_rn(score, 0.f)), uint32_t(row));  // + 0: -0 and 0 tie
}

// A block per query.
template <class T>
__global__ void __launch_bounds__(kThreads)
    refine_kernel(const Refinement found, const T* __restrict__ features,  // [N, dim]
                  int64_t k, int size, float* __restrict__ scores,         // [B, k]
                  int64_t* __restrict__ rows,                              // [B, k]
                  int32_t* __restrict__ failed) {                          // [B]
  PYREID_SHARED(int, candidates, 1);
  PYREID_DYNAMIC_SHARED(uint64_t, keys);
  const int64_t query = blockIdx.x, listed = found.listed, dim = found.features.cols;
  const float* const products = found.products + query * listed;
  const int64_t* const near = found.near + query * listed;
  const float slack = slack_of(found, query);
  const float bound = near[k - 1] < 0 ? -INFINITY : __fadd_rn(products[k - 1], -slack);
  const bool certain = slack < INFINITY && (near[listed - 1] < 0 || products[listed - 1] < bound);
  if (threadIdx.x == 0) {
    failed[query] = certain ? 0 : 1;
    candidates[0] = 0;
  }
  if (!certain) return;
  for (int i = threadIdx.x; i < size; i += kThreads) keys[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x / 32; i < listed; i += kWarps) {
    if (near[i] < 0 || !(products[i] >= bound)) break;  // so are all that follow
    const float score = warp_dot(static_cast<const float*>(found.queries.data) + query * dim,
                                 features + near[i] * dim, dim);
    if (threadIdx.x % 32 != 0) continue;
    keys[int(i)] = key_of(score, near[i]);
    atomicAdd(&candidates[0], 1);
  }
  __syncthreads();
  const int count = candidates[0];
  bitonic_sort(keys, size);
  write_ranks(keys, count, 0, k, scores + query * k, rows + query * k);
}

// A block for kGroup queries in a row; it has something to do where some of them have failed.
// Two blocks a multiprocessor: left alone, the compiler spills to fit four.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    meet_all_kernel(const float* __restrict__ queries,  // [B, dim]
                    const T* __restrict__ features,     // [N, dim]
                    int64_t batch, int64_t size, int64_t dim,
                    const int32_t* __restrict__ failed,  // [B]
                    const MineState state, int sort_size,
                    float* __restrict__ scores,    // [B, keep]
                    int64_t* __restrict__ rows) {  // [B, keep]
  PYREID_SHARED(uint32_t, histogram, 256);
  PYREID_SHARED(uint32_t, warp_totals, kWarps);
  PYREID_SHARED(uint32_t, found, 3);
  PYREID_SHARED(float, tile, kGroup* kThreads);
  PYREID_DYNAMIC_SHARED(uint64_t, sorted);
  const int64_t first = int64_t(blockIdx.x) * kGroup;
  const int count = int(batch - first < kGroup ? batch - first : kGroup);
  int64_t last = -1;  // of those that have failed
  for (int q = 0; q < count; ++q)
    if (failed[first + q]) last = first + q;
  if (last < 0) return;
  const auto best_of = [&](int64_t query, bool fresh) {
    return Best{state.candidates + query * state.capacity,
                state.keep,
                fresh ? 0 : state.counts[query],
                fresh ? 0 : state.thresholds[query],
                &histogram[0],
                &warp_totals[0],
                &found[0]};
  };

  for (int64_t begin = 0; begin < size; begin += kThreads) {
    for (int step = 0; step < 32; ++step) {
      const int column = int(threadIdx.x) / 32 * 32 + step;
      if (begin + column >= size) break;
      const T* const row = features + (begin + column) * dim;
      float sums[kGroup] = {};
      for (int64_t i = threadIdx.x % 32; i < dim; i += 32) {
        const float value = to_float(row[i]);
#pragma unroll
        for (int q = 0; q < kGroup; ++q) {
          const int64_t query = first + q < last ? first + q : last;
          sums[q] = __fadd_rn(sums[q], __fmul_rn(queries[query * dim + i], value));
        }
      }
#pragma unroll
      for (int q = 0; q < kGroup; ++q) {
        const float score = warp_sum(sums[q]);
        if (threadIdx.x % 32 == 0) tile[q * kThreads + column] = score;
      }
    }
    __syncthreads();
    for (int q = 0; q < count; ++q) {
      const int64_t query = first + q, row = begin + threadIdx.x;
      if (!failed[query]) continue;  // the same in every thread, as is all that decides below
      Best best = best_of(query, begin == 0);
      const float score = row < size ? float(tile[q * kThreads + int(threadIdx.x)]) : -INFINITY;
      uint64_t key = score > -INFINITY ? key_of(score, row) : 0;
      if (key <= best.threshold) key = 0;
      if (__syncthreads_or(key != 0)) {
        if (best.count + kThreads > state.capacity) best.compact();
        if (threadIdx.x == 0) found[2] = uint32_t(best.count);
        __syncthreads();
        best.append(key, key > best.threshold);
        __syncthreads();
        best.count = int(uint32_t(found[2]));
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        state.counts[query] = best.count;
        state.thresholds[query] = best.threshold;
      }
    }
    __syncthreads();
  }
  for (int q = 0; q < count; ++q) {
    const int64_t query = first + q;
    if (!failed[query]) continue;
    Best best = best_of(query, size == 0);
    if (best.count > state.keep) best.compact();
    __syncthreads();
    for (int i = threadIdx.x; i < sort_size; i += kThreads)
      sorted[i] = i < best.count ? best.keys[i] : 0;
    bitonic_sort(sorted, sort_size);
    write_ranks(sorted, best.count, 0, state.keep, scores + query * state.keep,
                rows + query * state.keep);
    __syncthreads();
  }
}

int power_of_two(int64_t least) {
  int size = 1;
  while (size < least) size *= 2;
  return size;
}

template <class T>
void launch_half_rows(const T* rows, int64_t dim, const float* largest, const HalfRows& half,
                      Stream stream) {
  launch(kOp, half_rows_kernel<T>, half.values.rows, kThreads, 0, stream, rows, dim, largest,
         static_cast<Half*>(half.values.data), half.lengths, half.rests);
}

template <class T>
void launch_refine(const Refinement& found, const T* features, int64_t k, float* scores,
                   int64_t* rows, int32_t* failed, const MineState& state, Stream stream) {
  const int64_t batch = found.queries.rows, dim = found.queries.cols;
  const int listed = power_of_two(found.listed), ranks = power_of_two(k);
  launch(kOp, refine_kernel<T>, batch, kThreads, listed * sizeof(uint64_t), stream, found, features,
         k, listed, scores, rows, failed);
  launch(kOp, meet_all_kernel<T>, (batch + kGroup - 1) / kGroup, kThreads, ranks * sizeof(uint64_t),
         stream, static_cast<const float*>(found.queries.data), features, batch,
         found.features.rows, dim, failed, state, ranks, scores, rows);
}

}  // namespace

bool has_half_filter() { return true; }

void half_rows(const ConstMatrix& rows, const float* largest, const HalfRows& half, Stream stream) {
  by_dtype(rows, [&](auto* data) { launch_half_rows(data, rows.cols, largest, half, stream); });
}

void refine(const Refinement& found, int64_t k, float* scores, int64_t* rows, int32_t* failed,
            const MineState& state, Stream stream) {
  by_dtype(found.features,
           [&](auto* data) { launch_refine(found, data, k, scores, rows, failed, state, stream); });
}

}  // namespace pyreid
