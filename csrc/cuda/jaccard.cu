// The sparse stages after the neighbour lists.
//
// Sets: a warp per row, ids in shared memory, or, where a set may exceed kSharedIds, in a piece of
// scratch memory that the warp keeps for all its rows.
//
// Sums by id (query expansion, sums of minima): a block per row, an accumulator per id in shared
// memory. Lists are added one after another with a barrier between, and inside a list every id is
// another one: each sum has the order of the lists, without atomics. Where there are more rows than
// accumulators, the ids are taken in windows, and each list, sorted as it is, is entered by binary
// search.

#include <climits>
#include <stdexcept>

#include "cuda/by_dtype.cuh"
#include "cuda/ids.cuh"
#include "cuda/portable.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sort.cuh"
#include "ops.h"

namespace pyreid {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kBlocks = 8;  // of an SM, at least: leaves 64 registers to kernels that need over 40
constexpr int kSharedIds = 1024;     // of a warp: 16 KiB a block
constexpr int kScratchWarps = 2048;  // warps that share out the rows where sets are in scratch
#ifdef PYREID_EMULATED
constexpr int kWindow = 160;  // tests are small, and need several
#else
constexpr int kWindow = 15360;  // 60 KiB: what every architecture has
#endif

__device__ __forceinline__ bool bit(const uint32_t* mask, int column) {
  return mask[column / 32] >> (column % 32) & 1;
}

__device__ __forceinline__ bool is_row(int32_t id, int64_t rows) { return id >= 0 && id < rows; }

template <bool kHalf>
__device__ __forceinline__ float rounded(float value) {
  return kHalf ? to_float(from_float<Half>(value)) : value;
}

// The first place in sorted [begin, end) whose value is not below `value`.
template <class T>
__device__ int64_t lower_bound(const T* sorted, int64_t begin, int64_t end, T value) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (sorted[middle] < value) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

template <class T>
__device__ float warp_dot(const T* a, const T* b, int64_t dim) {  // [dim], [dim]
  float sum = 0.f;
  for (int64_t d = threadIdx.x % 32; d < dim; d += 32)
    sum = __fadd_rn(sum, __fmul_rn(to_float(a[d]), to_float(b[d])));
  return warp_sum(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    squared_norms_kernel(const T* __restrict__ features,  // [rows, dim]
                         int64_t rows, int64_t dim,
                         float* __restrict__ norms) {  // [rows]
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const float norm = warp_dot(features + row * dim, features + row * dim, dim);
  if (threadIdx.x % 32 == 0) norms[row] = norm;
}

__global__ void __launch_bounds__(kThreads)
    reciprocal_kernel(const RankLists lists, const Reciprocity rule,
                      uint32_t* __restrict__ masks) {  // [rows, words]
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= lists.rows) return;
  const int lane = threadIdx.x % 32, r_words = (rule.columns + 31) / 32;
  const int words = r_words + (rule.half + 31) / 32;
  const int32_t* const list = lists.ids + row * lists.stride;
  for (int word = 0; word < words; ++word) {
    const bool half = word >= r_words;
    const int first_column = (half ? word - r_words : word) * 32;
    uint32_t mask = 0;
    for (int b = 0; b < 32; ++b) {
      const int column = first_column + b;
      if (column >= (half ? rule.half : rule.columns)) break;
      const int32_t other = list[column];
      if (!is_row(other, lists.rows)) continue;
      const bool second = !half && column >= rule.split;
      const int begin = second ? rule.split : 0;
      const int end = half ? rule.half : (second ? rule.columns : rule.split);
      bool found = false;
      for (int o = begin + lane; o < end; o += 32)
        found |= lists.ids[other * lists.stride + o] == row;
      if (__ballot_sync(0xffffffffu, found) != 0) mask |= 1u << b;
    }
    if (lane == 0) masks[row * words + word] = mask;
  }
}

// Ascending, in place, by one warp; `size` is a power of two.
template <class Ids>
__device__ void sort_by_warp(Ids ids, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      __syncwarp();
      for (int pair = threadIdx.x % 32; pair < size / 2; pair += 32) {
        const int low = pair / stride * 2 * stride + pair % stride, high = low + stride;
        const int32_t a = ids[low], b = ids[high];
        if ((a > b) == ((low & run) == 0)) {
          ids[low] = b;
          ids[high] = a;
        }
      }
    }
  }
  __syncwarp();
}

template <class Ids>
__device__ void expand_row(const RankLists& lists, const Reciprocity& rule, const uint32_t* masks,
                           int64_t row, int64_t place, Ids ids, const SparseSink& sets) {
  const int lane = threadIdx.x % 32, r_words = (rule.columns + 31) / 32;
  const int words = r_words + (rule.half + 31) / 32;
  const uint32_t below = (1u << lane) - 1;
  int count = 0;
  const auto append = [&](bool mine, int32_t id) {
    const uint32_t takers = __ballot_sync(0xffffffffu, mine);
    if (mine) ids[count + __popc(takers & below)] = id;
    count += __popc(takers);
  };
  for (int first = 0; first < rule.columns; first += 32) {
    const int c = first + lane;
    const bool mine = c < rule.columns && bit(masks + row * words, c);
    append(mine, mine ? lists.ids[row * lists.stride + c] : 0);
  }
  __syncwarp();
  const int members = count;
  for (int n = 0; rule.half > 0 && n < members; ++n) {
    const int32_t j = ids[n];
    const int32_t* const other = lists.ids + j * lists.stride;
    const uint32_t* const other_mask = masks + j * words + r_words;
    const auto in_row = [&](int32_t id) {
      bool found = false;
      for (int p = 0; p < members; ++p) {
        const int32_t member = ids[p];
        found |= member == id;
      }
      return found;
    };
    int shared = 0, size = 0;
    for (int first = 0; first < rule.half; first += 32) {
      const int h = first + lane;
      const bool mine = h < rule.half && bit(other_mask, h);
      size += __popc(__ballot_sync(0xffffffffu, mine));
      shared += __popc(__ballot_sync(0xffffffffu, mine && in_row(other[h])));
    }
    if (3 * shared <= 2 * size) continue;
    for (int first = 0; first < rule.half; first += 32) {
      const int h = first + lane;
      const bool mine = h < rule.half && bit(other_mask, h) && !in_row(other[h]);
      append(mine, mine ? other[h] : 0);
    }
  }
  int size = 1;
  while (size < count) size *= 2;
  for (int p = count + lane; p < size; p += 32) ids[p] = INT_MAX;
  sort_by_warp(ids, size);
  int kept = 0;
  for (int first = 0; first < count; first += 32) {
    const int p = first + lane;
    const int32_t id = p < count ? int32_t(ids[p]) : 0;
    const int32_t before = p > 0 && p < count ? int32_t(ids[p - 1]) : -1;
    const bool mine = p < count && id != before;
    const uint32_t takers = __ballot_sync(0xffffffffu, mine);
    if (mine && sets.counts == nullptr)
      sets.ids[sets.starts[place] + kept + __popc(takers & below)] = id;
    kept += __popc(takers);
  }
  if (lane == 0 && sets.counts != nullptr) sets.counts[place] = kept;
  __syncwarp();
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads)
    expand_kernel(const RankLists lists, const Reciprocity rule,
                  const uint32_t* __restrict__ masks,  // [rows, words]
                  const RowRange rows, const SparseSink sets, int64_t capacity,
                  int32_t* __restrict__ scratch) {  // [warps, capacity]
  PYREID_DYNAMIC_SHARED(int32_t, shared_ids);
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  for (int64_t place = warp; place < rows.count; place += warps) {
    const int64_t row = rows.first + place;
    if (kShared) {
      expand_row(lists, rule, masks, row, place, shared_ids + threadIdx.x / 32 * capacity, sets);
    } else {
      expand_row(lists, rule, masks, row, place, scratch + warp * capacity, sets);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    weights_kernel(const T* __restrict__ features,  // [rows, dim]
                   int64_t dim, const DistanceTerms distances, bool half, const SparseRows sets,
                   int64_t first_row,
                   float* __restrict__ values) {  // [entries]
  const int64_t place = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (place >= sets.rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = first_row + place;
  const int64_t first = sets.starts[place], last = sets.starts[place + 1];
  const float low = distances.low ? distances.low[place] : 0.f;
  const float span = distances.high ? __fsub_rn(distances.high[place], low) : 1.f;
  float nearest = INFINITY;
  for (int64_t e = first; e < last; ++e) {
    const int64_t other = sets.ids[e];
    const float dot = warp_dot(features + row * dim, features + other * dim, dim);
    const float norms =
        distances.norms ? __fadd_rn(distances.norms[row], distances.norms[other]) : 2.f;
    const float apart = __fsub_rn(__fsub_rn(norms, __fmul_rn(2.f, dot)), low);
    const float distance = span > 0.f ? __fdiv_rn(apart, span) : 0.f;
    nearest = fminf(nearest, distance);
    if (lane == 0) values[e] = distance;
  }
  __syncwarp();
  float total = 0.f;
  for (int64_t e = first + lane; e < last; e += 32) {
    values[e] = expf(__fsub_rn(nearest, values[e]));
    total = __fadd_rn(total, values[e]);
  }
  total = warp_sum(total);
  for (int64_t e = first + lane; e < last; e += 32) {
    const float weight = __fdiv_rn(values[e], total);
    values[e] = half ? rounded<true>(weight) : weight;
  }
}

// --- sums by id
// -----------------------------------------------------------------------------------

// What is added to the row of a block: lists, in this order; a term for each entry; and what
// becomes of a sum in the end.
template <bool kHalf>
struct Mean {
  const int32_t* ids;  // [columns]
  int64_t columns, rows;
  float members;

  __device__ Mean(const RankLists& lists, int64_t columns, int64_t row)
      : ids(lists.ids + row * lists.stride), columns(columns), rows(lists.rows), members(0.f) {
    for (int64_t c = 0; c < columns; ++c) members += is_row(ids[c], rows) ? 1.f : 0.f;
  }
  __device__ int64_t lists() const { return columns; }
  __device__ int64_t list(int64_t n) const { return is_row(ids[n], rows) ? ids[n] : -1; }
  __device__ float add(float sum, int64_t, float value) const { return __fadd_rn(sum, value); }
  __device__ float result(float sum) const { return rounded<kHalf>(__fdiv_rn(sum, members)); }
  __device__ bool keeps(float sum, float) const { return sum > 0.f; }
};

template <bool kHalf>
struct SharedWeight {
  const int32_t* ids;   // [entries of the row]
  const float* values;  // [entries of the row]
  int64_t entries;
  MinSum rule;

  __device__ SharedWeight(const SparseRows& weights, const MinSum& rule, int64_t row)
      : ids(weights.ids + weights.starts[row]),
        values(weights.values + weights.starts[row]),
        entries(weights.starts[row + 1] - weights.starts[row]),
        rule(rule) {}
  __device__ int64_t lists() const { return entries; }
  __device__ int64_t list(int64_t n) const { return ids[n]; }
  __device__ float add(float sum, int64_t n, float value) const {
    return rounded<kHalf>(__fadd_rn(sum, fminf(values[n], value)));
  }
  __device__ float result(float sum) const {
    const float ratio = rounded<kHalf>(__fdiv_rn(sum, rounded<kHalf>(__fsub_rn(2.f, sum))));
    const float distance = rounded<kHalf>(__fsub_rn(1.f, ratio));
    return rule.clip && distance < 0.f ? 0.f : distance;
  }
  __device__ bool keeps(float, float distance) const {
    return distance <= rule.max_distance && distance < 1.f;
  }
};

// sums[id - begin] for ids [begin, begin + size); all of the block, barriers included.
template <class Row>
__device__ void add_lists(const Row& row, const SparseRows& lists, SharedPointer<float> sums,
                          int64_t begin, int size) {
  __syncthreads();
  for (int p = threadIdx.x; p < size; p += kThreads) sums[p] = 0.f;
  __syncthreads();
  for (int64_t n = 0; n < row.lists(); ++n) {
    const int64_t list = row.list(n);
    if (list < 0) continue;  // for all threads alike
    int64_t first = lists.starts[list], last = lists.starts[list + 1];
    if (begin > 0) first = lower_bound(lists.ids, first, last, int32_t(begin));
    if (begin + size < lists.rows)
      last = lower_bound(lists.ids, first, last, int32_t(begin + size));
    for (int64_t e = first + threadIdx.x; e < last; e += kThreads) {
      const int p = int(lists.ids[e] - begin);
      const float before = sums[p];
      sums[p] = row.add(before, n, lists.values[e]);
    }
    __syncthreads();
  }
}

// The sums that are kept, by id: each warp counts a stretch of the window, then writes it behind
// those of the warps before.
template <class Row>
__device__ void emit(const Row& row, const SparseRows& lists, int64_t index,
                     const SparseSink& sink) {
  PYREID_SHARED(int32_t, totals, kWarps);
  PYREID_DYNAMIC_SHARED(float, sums);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t* ids = sink.slot_ids + index * sink.slots;
  float* values = sink.slot_values + index * sink.slots;
  int64_t room = sink.slots;
  if (sink.counts == nullptr) {
    const int64_t first = sink.starts[index], size = sink.starts[index + 1] - first;
    if (size <= room) {  // for all threads alike
      for (int64_t p = threadIdx.x; p < size; p += kThreads) {
        sink.ids[first + p] = ids[p];
        sink.values[first + p] = values[p];
      }
      return;
    }
    ids = sink.ids + first;
    values = sink.values + first;
    room = size;
  }
  int written = 0;
  for (int64_t begin = 0; begin < lists.rows; begin += kWindow) {
    const int size = int(lists.rows - begin < kWindow ? lists.rows - begin : kWindow);
    add_lists(row, lists, &sums[0], begin, size);
    const int stretch = (size + kThreads - 1) / kThreads * 32;
    const int end = (warp + 1) * stretch < size ? (warp + 1) * stretch : size;
    int count = 0;
    for (int first = warp * stretch; first < end; first += 32) {
      const float sum = first + lane < end ? float(sums[first + lane]) : 0.f;
      count += __popc(__ballot_sync(0xffffffffu, row.keeps(sum, row.result(sum))));
    }
    if (lane == 0) totals[warp] = count;
    __syncthreads();
    int place = written;
    for (int w = 0; w < kWarps; ++w) {
      const int32_t amount = totals[w];
      place += w < warp ? amount : 0;
      written += amount;
    }
    if (place >= room || count == 0) continue;
    for (int first = warp * stretch; first < end; first += 32) {
      const float sum = first + lane < end ? float(sums[first + lane]) : 0.f;
      const float result = row.result(sum);
      const bool mine = row.keeps(sum, result);
      const uint32_t takers = __ballot_sync(0xffffffffu, mine);
      const int to = place + __popc(takers & ((1u << lane) - 1));
      if (mine && to < room) {
        ids[to] = int32_t(begin + first + lane);
        values[to] = result;
      }
      place += __popc(takers);
    }
  }
  if (sink.counts != nullptr && threadIdx.x == 0) sink.counts[index] = written;
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, kBlocks)
    average_kernel(const RankLists lists, int64_t columns, const SparseRows weights, int64_t first,
                   const SparseSink means) {
  const Mean<kHalf> row(lists, columns, first + blockIdx.x);
  emit(row, weights, blockIdx.x, means);
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, kBlocks)
    jaccard_rows_kernel(const SparseRows weights, const SparseRows transposed, const MinSum rule,
                        int64_t first, const SparseSink graph) {
  const SharedWeight<kHalf> row(weights, rule, first + blockIdx.x);
  emit(row, transposed, blockIdx.x, graph);
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, kBlocks)
    jaccard_block_kernel(const SparseRows weights, const SparseRows transposed, const MinSum rule,
                         int64_t first, int64_t column, int64_t columns,
                         float* __restrict__ distances) {  // [rows, columns]
  PYREID_DYNAMIC_SHARED(float, sums);
  const SharedWeight<kHalf> row(weights, rule, first + blockIdx.x);
  for (int64_t begin = 0; begin < columns; begin += kWindow) {
    const int size = int(columns - begin < kWindow ? columns - begin : kWindow);
    add_lists(row, transposed, &sums[0], column + begin, size);
    for (int p = threadIdx.x; p < size; p += kThreads)
      distances[blockIdx.x * columns + begin + p] = row.result(sums[p]);
  }
}

size_t window_bytes(int64_t ids) { return sizeof(float) * size_t(ids < kWindow ? ids : kWindow); }

// --- transpose
// ------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    transpose_starts_kernel(const uint32_t* __restrict__ columns,  // [entries], ascending
                            int64_t entries, int64_t rows,
                            int64_t* __restrict__ starts) {  // [rows + 1]
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row <= rows) starts[row] = lower_bound(columns, 0, entries, uint32_t(row));
}

__global__ void __launch_bounds__(kThreads)
    transpose_entries_kernel(const SparseRows weights,
                             const uint32_t* __restrict__ order,  // [entries]
                             int64_t entries,
                             int32_t* __restrict__ ids,     // [entries]
                             float* __restrict__ values) {  // [entries]
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= entries) return;
  const int64_t source = order[e];
  ids[e] = int32_t(lower_bound(weights.starts, 0, weights.rows + 1, source + 1) - 1);
  values[e] = weights.values[source];
}

int64_t blocks_of(int64_t items, int per_block) { return (items + per_block - 1) / per_block; }

int64_t set_capacity(const Reciprocity& rule) {
  int64_t capacity = 32;
  while (capacity < int64_t(rule.columns) * (1 + rule.half)) capacity *= 2;
  return capacity;
}

int64_t scratch_blocks(int64_t rows) {
  return blocks_of(rows < kScratchWarps ? rows : kScratchWarps, kWarps);
}

template <class T>
void launch_norms(const char* op, const T* features, int64_t rows, int64_t dim, float* norms,
                  Stream stream) {
  launch(op, squared_norms_kernel<T>, blocks_of(rows, kWarps), kThreads, 0, stream, features, rows,
         dim, norms);
}

template <class T>
void launch_weights(const char* op, const T* features, int64_t dim, const DistanceTerms& distances,
                    bool half, const SparseRows& sets, int64_t first, float* values,
                    Stream stream) {
  launch(op, weights_kernel<T>, blocks_of(sets.rows, kWarps), kThreads, 0, stream, features, dim,
         distances, half, sets, first, values);
}

}  // namespace

bool has_knn() { return false; }

void knn(const ConstMatrix&, const float*, int64_t, float*, int64_t*, float*,
         const std::function<void(int64_t)>&, Stream) {
  throw std::logic_error("knn: this floor searches panel by panel");
}

void squared_norms(const char* op, const char*, const ConstMatrix& features, int64_t, float* norms,
                   Stream stream) {
  by_dtype(features, [&](auto* data) {
    launch_norms(op, data, features.rows, features.cols, norms, stream);
  });
}

void reciprocal(const char* op, const RankLists& lists, const Reciprocity& rule, uint32_t* masks,
                Stream stream) {
  launch(op, reciprocal_kernel, blocks_of(lists.rows, kWarps), kThreads, 0, stream, lists, rule,
         masks);
}

size_t expand_workspace(const RankLists& lists, const Reciprocity& rule) {
  const int64_t capacity = set_capacity(rule);
  if (capacity <= kSharedIds) return 0;
  return sizeof(int32_t) * size_t(scratch_blocks(lists.rows) * kWarps * capacity);
}

void expand(const char* op, const RankLists& lists, const Reciprocity& rule, const uint32_t* masks,
            const RowRange& rows, const SparseSink& sets, void* workspace, Stream stream) {
  const int64_t capacity = set_capacity(rule);
  int32_t* const scratch = static_cast<int32_t*>(workspace);
  if (capacity <= kSharedIds) {
    launch(op, expand_kernel<true>, blocks_of(rows.count, kWarps), kThreads,
           sizeof(int32_t) * size_t(kWarps * capacity), stream, lists, rule, masks, rows, sets,
           capacity, scratch);
  } else {
    launch(op, expand_kernel<false>, scratch_blocks(rows.count), kThreads, 0, stream, lists, rule,
           masks, rows, sets, capacity, scratch);
  }
}

void jaccard_weights(const char* op, const ConstMatrix& features, const DistanceTerms& distances,
                     bool half, const SparseRows& sets, int64_t first, float* values,
                     Stream stream) {
  by_dtype(features, [&](auto* data) {
    launch_weights(op, data, features.cols, distances, half, sets, first, values, stream);
  });
}

void average(const char* op, const RankLists& lists, int64_t columns, const SparseRows& weights,
             bool half, const RowRange& rows, const SparseSink& means, Stream stream) {
  launch(op, half ? average_kernel<true> : average_kernel<false>, rows.count, kThreads,
         window_bytes(weights.rows), stream, lists, columns, weights, rows.first, means);
}

size_t transpose_workspace(int64_t entries) { return sort_workspace(entries); }

void transpose(const char* op, const SparseRows& weights, int64_t entries, int64_t* starts,
               int32_t* ids, float* values, void* workspace, Stream stream) {
  if (entries > int64_t(UINT32_MAX))
    throw std::runtime_error(std::string(op) + ": " + std::to_string(entries) +
                             " weights; there may be 2^32 - 1. Take a smaller k1 or k2");
  const Sorted sorted =
      sort_ids(op, {weights.ids, Dtype::int32, entries}, weights.rows, workspace, stream);
  launch(op, transpose_starts_kernel, blocks_of(weights.rows + 1, kThreads), kThreads, 0, stream,
         sorted.keys, entries, weights.rows, starts);
  launch(op, transpose_entries_kernel, blocks_of(entries, kThreads), kThreads, 0, stream, weights,
         sorted.order, entries, ids, values);
}

void jaccard_rows(const char* op, const SparseRows& weights, const SparseRows& transposed,
                  const MinSum& rule, const RowRange& rows, const SparseSink& graph,
                  Stream stream) {
  launch(op, rule.half ? jaccard_rows_kernel<true> : jaccard_rows_kernel<false>, rows.count,
         kThreads, window_bytes(weights.rows), stream, weights, transposed, rule, rows.first,
         graph);
}

void jaccard_block(const char* op, const SparseRows& weights, const SparseRows& transposed,
                   const MinSum& rule, const RowRange& rows, int64_t column, int64_t columns,
                   float* distances, Stream stream) {
  launch(op, rule.half ? jaccard_block_kernel<true> : jaccard_block_kernel<false>, rows.count,
         kThreads, window_bytes(columns), stream, weights, transposed, rule, rows.first, column,
         columns, distances);
}

}  // namespace pyreid
