// Rows are sorted by group, so that a sample's group is a block of them and all others are what
// lies before and behind it. Then every draw is computed on its own: where a random order of the
// rows that may be drawn has its j-th. Blocks share out the draws of a sample; three threads find
// its group and its excluded row.

#include <algorithm>

#include "candidates.h"
#include "cuda/merge_sort.cuh"
#include "cuda/portable.cuh"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "sample_rows";
constexpr int kThreads = 256;
constexpr int kDraws = 4 * kThreads;  // of one block

__global__ void __launch_bounds__(kThreads)
    row_sampling_kernel(const RowSampling sampling, const MergeSorted sorted, int tiles) {
  PYREID_SHARED(int64_t, places, 3);
  const int64_t rows = sampling.groups.size, sample = blockIdx.x / tiles;
  const int64_t target = id_at(sampling.targets, sample);
  if (threadIdx.x < 2) {
    const bool last = threadIdx.x == 1;
    places[threadIdx.x] = target < 0 ? 0 : find_place(sorted.keys, 0, rows, {0, target}, last);
  } else if (threadIdx.x == 2) {
    int64_t self = sampling.exclude.data != nullptr ? id_at(sampling.exclude, sample) : int64_t(-1);
    if (self < 0 || self >= rows) {
      self = -1;
    } else {
      const SortKey group{0, id_at(sampling.groups, self)};
      int64_t begin = find_place(sorted.keys, 0, rows, group, false);
      int64_t end = find_place(sorted.keys, begin, rows, group, true);
      while (begin < end) {  // rows of a group ascend
        const int64_t middle = (begin + end) / 2;
        if (sorted.order[middle] < self) {
          begin = middle + 1;
        } else {
          end = middle;
        }
      }
      self = begin;
    }
    places[2] = self;
  }
  __syncthreads();
  const Candidates candidates{places[0], places[1], rows, places[2]};

  const int64_t first = int64_t(blockIdx.x % tiles) * kDraws;
  const auto draw = [&](Draw purpose, int64_t size, int64_t from, int64_t to, int64_t* drawn,
                        auto place) {
    if (from >= to) return;
    if (size == 0) {
      for (int64_t j = from + threadIdx.x; j < to; j += kThreads) drawn[j] = -1;
      return;
    }
    const RandomOrder order(sampling.seed, uint32_t(sample), uint32_t(purpose), uint32_t(size));
    for (int64_t j = from + threadIdx.x; j < to; j += kThreads) {
      const uint32_t turn = uint32_t(j) % uint32_t(size);
      drawn[j] = sorted.order[place(order(turn))];
    }
  };
  // Draws count on from the positives to the negatives.
  const int64_t positives = sampling.positives, negatives = sampling.negatives;
  draw(Draw::positives, candidates.positives(), first, min(first + kDraws, positives),
       sampling.positive_rows + sample * positives,
       [&](int64_t i) { return candidates.positive(i); });
  draw(Draw::negatives, candidates.negatives(), max(first - positives, int64_t(0)),
       min(first + kDraws - positives, negatives), sampling.negative_rows + sample * negatives,
       [&](int64_t i) { return candidates.negative(i); });
}

}  // namespace

size_t row_sampling_workspace(const RowSampling& sampling) {
  return merge_sort_workspace(sampling.groups.size);
}

void row_sampling(const RowSampling& sampling, void* workspace, Stream stream) {
  const int64_t draws = sampling.positives + sampling.negatives;
  if (sampling.targets.size == 0 || draws == 0) return;
  const MergeSorted sorted = merge_sort(kOp, Ids{}, sampling.groups, workspace, stream);
  const int tiles = int((draws + kDraws - 1) / kDraws);
  launch(kOp, row_sampling_kernel, sampling.targets.size * tiles, kThreads, 0, stream, sampling,
         sorted, tiles);
}

}  // namespace pyreid
