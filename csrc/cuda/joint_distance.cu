// A cluster's images in a camera are a cell: their number, the sum of their frames, the first of
// them. Cells and counts are whole numbers, added atomically: the order does not show. Then a block
// smooths the counts of a pair of cameras, each thread the bins that are its own.
//
// Of the distances, a block does a stretch of a row; what a pair costs is reading its score and the
// sighting of its column, and writing the distance.

#include <algorithm>

#include "cuda/ids.cuh"
#include "cuda/portable.cuh"
#include "cuda/reduce.cuh"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "time_histogram";
constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // columns of a row of distances
constexpr int kWarps = kThreads / 32;

using Count = unsigned long long;

struct Cells {
  Count *images, *frames;  // [clusters, cameras]
  long long* first;        // [clusters, cameras]
  Count* counts;           // [cameras, cameras, bins]
  double* taps;            // [reach + 1]

  Cells(const TimeHistogram& task, void* workspace) {
    const int64_t cells = task.count * task.cameras;
    images = static_cast<Count*>(workspace);
    frames = images + cells;
    first = reinterpret_cast<long long*>(frames + cells);
    counts = reinterpret_cast<Count*>(first + cells);
    taps = reinterpret_cast<double*>(counts + task.cameras * task.cameras * task.bins);
  }
};

__global__ void __launch_bounds__(kThreads)
    joint_distance_clear_kernel(const TimeHistogram task, const Cells cells) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < task.count * task.cameras) {
    cells.images[i] = cells.frames[i] = 0;
    cells.first[i] = INT64_MAX;
  }
  if (i < task.cameras * task.cameras * task.bins) cells.counts[i] = 0;
  if (i <= task.reach)
    cells.taps[i] = i == 0 ? 1. : exp(-0.5 * double(i) * double(i) / (task.sigma * task.sigma));
}

// The cell of image i, or -1.
__device__ __forceinline__ int64_t cell_of(const TimeHistogram& task, int64_t i) {
  const int64_t cluster = id_at(task.clusters, i), camera = id_at(task.seen.cameras, i);
  const bool counts = cluster >= 0 && cluster < task.count && camera >= 0 && camera < task.cameras;
  return counts && id_at(task.seen.frames, i) >= 0 ? cluster * task.cameras + camera : -1;
}

// One more image at `time` in [later][earlier], or `more`.
__device__ __forceinline__ void count(const TimeHistogram& task, const Cells& cells, int64_t later,
                                      int64_t earlier, double time, Count more) {
  const double bin = floor(time / double(task.bin));
  if (bin < double(task.bins))
    atomicAdd(&cells.counts[(later * task.cameras + earlier) * task.bins + int64_t(bin)], more);
}

__global__ void __launch_bounds__(kThreads)
    joint_distance_cells_kernel(const TimeHistogram task, const Cells cells) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t cell = i < task.clusters.size ? cell_of(task, i) : -1;
  if (cell < 0) return;
  const int64_t frame = id_at(task.seen.frames, i);
  atomicAdd(&cells.images[cell], Count(1));
  atomicAdd(&cells.frames[cell], Count(frame));
  atomicMin(&cells.first[cell], static_cast<long long>(frame));
}

__global__ void __launch_bounds__(kThreads)
    joint_distance_count_kernel(const TimeHistogram task, const Cells cells) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < task.count * task.cameras && cells.images[i] > 0) {
    const int64_t a = i % task.cameras;
    const double mean = double(cells.frames[i]) / double(cells.images[i]);
    for (int64_t b = a + 1; b < task.cameras; ++b) {
      const int64_t other = i - a + b;
      if (cells.images[other] == 0) continue;
      const double time = mean - double(cells.frames[other]) / double(cells.images[other]);
      const bool later = time > 0;
      count(task, cells, later ? a : b, later ? b : a, later ? time : -time, 1);
    }
  }
  const int64_t cell = i < task.clusters.size ? cell_of(task, i) : -1;
  if (cell < 0) return;
  const int64_t camera = cell % task.cameras;
  const int64_t time = id_at(task.seen.frames, i) - int64_t(cells.first[cell]);
  count(task, cells, camera, camera, double(time), cells.images[cell]);
}

__device__ __forceinline__ double smoothed(const TimeHistogram& task, const Count* counts,
                                           const double* taps, int64_t i) {
  double sum = 0.;
  const int64_t last = min(task.bins - 1, i + task.reach);
  for (int64_t j = max(int64_t(0), i - task.reach); j <= last; ++j)
    if (counts[j] > 0) sum += double(counts[j]) * taps[j < i ? i - j : j - i];
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    joint_distance_smooth_kernel(const TimeHistogram task, const Cells cells,
                                 float* __restrict__ histogram) {  // [cameras, cameras, bins]
  PYREID_SHARED(double, partials, kWarps);
  const Count* const counts = cells.counts + int64_t(blockIdx.x) * task.bins;
  float* const out = histogram + int64_t(blockIdx.x) * task.bins;
  double total = 0.;
  for (int64_t i = threadIdx.x; i < task.bins; i += kThreads)
    total += smoothed(task, counts, cells.taps, i);
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = total;
  __syncthreads();
  total = 0.;
  for (int warp = 0; warp < kWarps; ++warp) total += partials[warp];
  for (int64_t i = threadIdx.x; i < task.bins; i += kThreads)
    out[i] = total > 0. ? float(smoothed(task, counts, cells.taps, i) / total) : 0.f;
}

struct Block {
  const float* scores;  // [queries, size]
  Sightings queries, gallery;
  JointTerms terms;
  float* distances;  // [queries, stride]
  int64_t stride, column;
  int64_t size;
  int tiles;  // of a row
};

__device__ __forceinline__ float likelihood(float weight, float exponent) {
  const float odds = __fmul_rn(weight, expf(fminf(exponent, 88.f)));
  return __fdiv_rn(1.f, __fadd_rn(1.f, odds));
}

__device__ __forceinline__ float time_term(const JointTerms& terms, int64_t own, int64_t frame,
                                           int64_t other, int64_t seen) {
  const bool later = frame > seen || (frame == seen && own > other);
  const int64_t time = later ? frame - seen : seen - frame;
  const bool known = frame >= 0 && seen >= 0 && time < terms.bin * terms.bins && own >= 0 &&
                     own < terms.cameras && other >= 0 && other < terms.cameras;
  if (!known) return 0.f;
  const int64_t pair = later ? own * terms.cameras + other : other * terms.cameras + own;
  return terms.histogram[pair * terms.bins + time / terms.bin];
}

__global__ void __launch_bounds__(kThreads) joint_distance_kernel(const Block task) {
  const int64_t i = blockIdx.x / task.tiles;
  const int64_t first = int64_t(blockIdx.x % task.tiles) * kThreads * kPerThread + threadIdx.x;
  const int64_t own = id_at(task.queries.cameras, i), frame = id_at(task.queries.frames, i);
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t j = first + k * kThreads;
    if (j >= task.size) return;
    const float time = time_term(task.terms, own, frame, id_at(task.gallery.cameras, j),
                                 id_at(task.gallery.frames, j));
    const float score = task.scores[i * task.size + j];
    const float looks = likelihood(task.terms.visual, __fmul_rn(-task.terms.gamma, score));
    const float times = likelihood(task.terms.temporal, __fmul_rn(-task.terms.gamma, time));
    task.distances[i * task.stride + task.column + j] = __fsub_rn(1.f, __fmul_rn(looks, times));
  }
}

}  // namespace

size_t time_histogram_workspace(const TimeHistogram& task) {
  return size_t(8) * size_t(3 * task.count * task.cameras +
                            task.cameras * task.cameras * task.bins + task.reach + 1);
}

void time_histogram(const TimeHistogram& task, float* histogram, void* workspace, Stream stream) {
  const Cells cells(task, workspace);
  const int64_t cell_count = task.count * task.cameras, pairs = task.cameras * task.cameras;
  const auto blocks = [](int64_t items) { return (items + kThreads - 1) / kThreads; };
  const int64_t cleared = std::max({cell_count, pairs * task.bins, task.reach + 1});
  launch(kOp, joint_distance_clear_kernel, blocks(cleared), kThreads, 0, stream, task, cells);
  launch(kOp, joint_distance_cells_kernel, blocks(task.clusters.size), kThreads, 0, stream, task,
         cells);
  launch(kOp, joint_distance_count_kernel, blocks(std::max(cell_count, task.clusters.size)),
         kThreads, 0, stream, task, cells);
  launch(kOp, joint_distance_smooth_kernel, pairs, kThreads, 0, stream, task, cells, histogram);
}

void joint_block(const char* op, const float* scores, const Sightings& queries,
                 const Sightings& gallery, const JointTerms& terms, float* distances,
                 int64_t stride, int64_t column, Stream stream) {
  const int64_t size = gallery.cameras.size, wide = kThreads * kPerThread;
  const int tiles = int((size + wide - 1) / wide);
  const Block task{scores, queries, gallery, terms, distances, stride, column, size, tiles};
  launch(op, joint_distance_kernel, queries.cameras.size * tiles, kThreads, 0, stream, task);
}

}  // namespace pyreid
