// Rows are sorted by class; where a class begins and ends follows from comparing neighbours, and a
// scan numbers the classes. That much is counted before anybody can know how large the result is.
//
// Then one block sums a tile of columns of one class. A thread owns one pack of columns and reads
// several rows ahead; sums run down the rows, 32 at a time, and need no other thread. Where classes
// are too few to fill the device, tiles are a warp wide, and the warps of a block take 32 rows
// each, turn by turn; the first adds up what all have found, in the order of the rows. So both ways
// give the same bits.

#include <algorithm>

#include "cuda/merge_sort.cuh"
#include "cuda/portable.cuh"
#include "cuda/reduce.cuh"
#include "cuda/scan.cuh"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "class_means";
constexpr int kThreads = 512;
constexpr int kRun = 32;             // rows that are summed plainly
constexpr int kAhead = 4;            // rows in flight per thread
constexpr int64_t kFewBlocks = 512;  // fewer do not fill a device: use narrow tiles
constexpr int kNormThreads = 256;

// Rows are counted in tiles of kThreads, and a last, empty one.
int64_t count_tiles(int64_t rows) { return (rows + kThreads - 1) / kThreads + 1; }

// What class_means_count leaves in the workspace, behind the sorted rows.
struct Layout {
  uint32_t* begins;   // [M] first place of each class in the sorted rows
  uint32_t* ends;     // [M]
  uint32_t* numbers;  // [count_tiles] classes that begin before each tile

  Layout(int64_t rows, void* workspace)
      : begins(reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) +
                                           merge_sort_workspace(rows))),
        ends(begins + rows),
        numbers(ends + rows) {}
};

__device__ __forceinline__ bool begins_class(const SortKey* keys, int64_t i) {
  return keys[i].minor >= 0 && (i == 0 || keys[i] != keys[i - 1]);
}

__global__ void __launch_bounds__(kThreads)
    class_means_count_kernel(const SortKey* __restrict__ keys,  // [rows]
                             int64_t rows,
                             uint32_t* __restrict__ numbers) {  // [gridDim]
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int count = __syncthreads_count(i < rows && begins_class(keys, i));
  if (threadIdx.x == 0) numbers[blockIdx.x] = uint32_t(count);
}

__global__ void __launch_bounds__(kThreads)
    class_means_number_kernel(const SortKey* __restrict__ keys,  // [rows]
                              int64_t rows,
                              const uint32_t* __restrict__ numbers,  // [gridDim]
                              uint32_t* __restrict__ begins,         // [M]
                              uint32_t* __restrict__ ends,           // [M]
                              int64_t* __restrict__ count) {         // []
  PYREID_SHARED(uint32_t, warp_counts, kThreads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool first = i < rows && begins_class(keys, i);
  const uint32_t firsts = __ballot_sync(0xffffffffu, first);
  if (lane == 0) warp_counts[warp] = __popc(firsts);
  __syncthreads();
  uint32_t before = numbers[blockIdx.x];
  for (int w = 0; w < warp; ++w) before += warp_counts[w];
  const uint32_t number =
      before + __popc(firsts & ((2u << lane) - 1)) - 1;  // of the class of row i
  if (first) begins[number] = uint32_t(i);
  if (i < rows && keys[i].minor >= 0 && (i + 1 == rows || keys[i] != keys[i + 1]))
    ends[number] = uint32_t(i + 1);
  if (i == 0) *count = numbers[gridDim.x - 1];
}

struct Task {
  const void* features;    // [rows, dim]
  const uint32_t* order;   // [rows] sorted by class
  const SortKey* keys;     // [rows]
  const uint32_t* begins;  // [M]
  const uint32_t* ends;    // [M]
  Means means;
  int dim;
  int width;   // threads across a tile
  int tiles;   // per class
  bool packs;  // whole packs, all aligned
};

template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T>
__device__ __forceinline__ void read(Pack<T, kPack<T>>& to, const Task& task, int64_t row,
                                     int column) {
  const T* const source = static_cast<const T*>(task.features) + row * task.dim + column;
  if (task.packs) {
    if (column < task.dim) to = load_pack<kPack<T>>(source);
  } else {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j)
      if (column + j < task.dim) to.v[j] = source[j];
  }
}

// Kahan's sum: what a rounding loses is taken off the next term.
__device__ __forceinline__ void add(float& total, float& lost, float value) {
  const float term = __fsub_rn(value, lost), next = __fadd_rn(total, term);
  lost = __fsub_rn(__fsub_rn(next, total), term);
  total = next;
}

template <class T>
__global__ void __launch_bounds__(kThreads) class_means_kernel(const Task task) {
  constexpr int kCount = kPack<T>;
  PYREID_SHARED(float, sums, kCount* kThreads);
  const int64_t index = blockIdx.x / task.tiles;
  const int tile = blockIdx.x % task.tiles, lane = int(threadIdx.x) % task.width;
  const int team = int(threadIdx.x) / task.width, teams = int(blockDim.x) / task.width;
  const int column = (tile * task.width + lane) * kCount;
  const int64_t begin = task.begins[index], end = task.ends[index];

  float total[kCount] = {}, lost[kCount] = {};
  for (int64_t round = begin; round < end; round += teams * kRun) {
    const int64_t first = min(round + team * kRun, end), last = min(first + kRun, end);
    float sum[kCount] = {};
    for (int64_t i = first; i < last; i += kAhead) {
      Pack<T, kCount> rows[kAhead] = {};
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (i + a < last) read(rows[a], task, task.order[i + a], column);
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
#pragma unroll
        for (int j = 0; j < kCount; ++j)
          if (i + a < last) sum[j] = __fadd_rn(sum[j], to_float(rows[a].v[j]));
    }
    if (teams == 1) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) add(total[j], lost[j], sum[j]);
      continue;
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums[j * kThreads + threadIdx.x] = sum[j];
    __syncthreads();
    if (team == 0) {
      const int found = int(min(int64_t(teams), (end - round + kRun - 1) / kRun));
      for (int t = 0; t < found; ++t) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const float value = sums[j * kThreads + t * task.width + lane];
          add(total[j], lost[j], value);
        }
      }
    }
    __syncthreads();
  }
  if (team != 0) return;
  float* const mean = task.means.means + index * task.dim + column;
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    if (column + j < task.dim) mean[j] = __fdiv_rn(total[j], float(end - begin));
  if (tile == 0 && threadIdx.x == 0) {
    task.means.labels[index] = task.keys[begin].minor;
    if (task.means.cameras != nullptr) task.means.cameras[index] = task.keys[begin].major;
    task.means.counts[index] = end - begin;
  }
}

__global__ void __launch_bounds__(kNormThreads)
    class_means_norm_kernel(float* __restrict__ means,  // [M, dim]
                            int dim) {
  PYREID_SHARED(float, partials, kNormThreads / 32);
  float* const mean = means + int64_t(blockIdx.x) * dim;
  float squares = 0.f;
  for (int d = threadIdx.x; d < dim; d += kNormThreads)
    squares = __fadd_rn(squares, __fmul_rn(mean[d], mean[d]));
  const float norm = __fsqrt_rn(block_sum(squares, &partials[0]));
  const float scale = __fdiv_rn(1.f, fmaxf(norm, 1e-12f));
  for (int d = threadIdx.x; d < dim; d += kNormThreads) mean[d] = __fmul_rn(mean[d], scale);
}

template <class T>
void launch_means(Task task, Stream stream) {
  const int packs = std::max(1, (task.dim + kPack<T> - 1) / kPack<T>);
  task.packs = reinterpret_cast<uintptr_t>(task.features) % 16 == 0 && task.dim % kPack<T> == 0;
  task.width = std::min(kThreads, (packs + 31) / 32 * 32);
  task.tiles = (packs + task.width - 1) / task.width;
  int threads = task.width;
  if (task.means.classes * task.tiles < kFewBlocks) {
    threads = kThreads;
    task.width = 32;
    task.tiles = (packs + 31) / 32;
  }
  launch(kOp, class_means_kernel<T>, task.means.classes * task.tiles, threads, 0, stream, task);
  if (task.means.normalize)
    launch(kOp, class_means_norm_kernel, task.means.classes, kNormThreads, 0, stream,
           task.means.means, task.dim);
}

}  // namespace

size_t class_means_workspace(const Classes& classes) {
  const int64_t rows = classes.labels.size;
  return merge_sort_workspace(rows) + sizeof(uint32_t) * size_t(2 * rows + count_tiles(rows));
}

void class_means_count(const Classes& classes, int64_t* count, void* workspace, Stream stream) {
  const int64_t rows = classes.labels.size, blocks = count_tiles(rows);
  const Layout layout(rows, workspace);
  const SortKey* const keys =
      merge_sort(kOp, classes.cameras, classes.labels, workspace, stream).keys;
  launch(kOp, class_means_count_kernel, blocks, kThreads, 0, stream, keys, rows, layout.numbers);
  exclusive_scan(kOp, layout.numbers, blocks, stream);
  launch(kOp, class_means_number_kernel, blocks, kThreads, 0, stream, keys, rows,
         static_cast<const uint32_t*>(layout.numbers), layout.begins, layout.ends, count);
}

void class_means_fill(const Classes& classes, const Means& means, void* workspace, Stream stream) {
  const int64_t rows = classes.labels.size;
  const Layout layout(rows, workspace);
  const MergeSorted sorted = merge_sorted(rows, workspace);
  const Task task{classes.features.data,
                  sorted.order,
                  sorted.keys,
                  layout.begins,
                  layout.ends,
                  means,
                  int(classes.features.cols),
                  0,
                  0,
                  false};
  switch (classes.features.dtype) {
    case Dtype::float32:
      return launch_means<float>(task, stream);
    case Dtype::float16:
      return launch_means<Half>(task, stream);
    default:
      return launch_means<BFloat16>(task, stream);
  }
}

}  // namespace pyreid
