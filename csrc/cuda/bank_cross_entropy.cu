// Softmax cross entropy over panels of dot products, which the caller's matrix product has just
// left in L2. A block takes one query's row of the panel: its maximum, then exponentials in place
// and their sum, in a fixed order. The gradient is (sum of exp(z - max) * column) / sum, less the
// target: its sums, which the caller's product adds to, are shrunk by the same block where a larger
// maximum comes up. So backward makes no product again: two in all, as where the logits are kept.
//
// cluster_mean: the mean dot product with the rows of a label is the dot product with their mean,
// so the bank is sorted by label, and a block sums up the rows of one label. How many labels there
// are is data on the device; asking would stop the queue, and a captured graph cannot ask. So there
// are as many columns as rows: the first row of a label, in sorted order, stands for the label, and
// the columns of the others are masked. The product is as large as with every row, but no array is
// larger than a panel, and nothing is added atomically.

#include <float.h>

#include <algorithm>

#include "cuda/portable.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sort.cuh"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "bank_cross_entropy";
constexpr int kMaxWarps = 16;
constexpr int kPack = 4;       // values that a thread takes at once
constexpr int kThreads = 128;  // of all kernels but the fold
// Blocks per multiprocessor that the compiler makes room for: left alone, it spills to fit more.
constexpr int kFoldBlocks = 2, kGradientBlocks = 8;
constexpr int64_t kNoLabel = INT32_MAX;  // sorts last

// The layout of `groups`: labels in ascending order, and which row of the bank has each; both end
// with a label that is none.
struct LabelGroups {
  uint32_t* labels;  // [N + 1]
  uint32_t* order;   // [N + 1]
  int64_t rows;

  __host__ __device__ explicit LabelGroups(const BankCrossEntropy& loss)
      : labels(reinterpret_cast<uint32_t*>(loss.groups)),
        order(labels + loss.bank.rows + 1),
        rows(loss.bank.rows) {}

  // Whether a label's rows begin at this position.
  __device__ bool begins(int64_t position) const {
    const uint32_t label = labels[position];
    return label != kNoLabel && (position == 0 || labels[position - 1] != label);
  }
};

__global__ void __launch_bounds__(kThreads)
    label_groups_kernel(BankCrossEntropy loss, LabelGroups groups, Sorted sorted) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i <= groups.rows) {
    groups.labels[i] = i < groups.rows ? sorted.keys[i] : uint32_t(kNoLabel);
    groups.order[i] = i < groups.rows ? sorted.order[i] : 0u;
  }
  if (i >= loss.targets.size) return;
  const int64_t label = id_at(loss.targets, i);
  int64_t low = 0, high = groups.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(sorted.keys[middle]) < label) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const bool found = label < kNoLabel && low < groups.rows && int64_t(sorted.keys[low]) == label;
  loss.target_columns[i] = found ? int32_t(low) : -1;
}

template <int kWidth, class Row>
__device__ __forceinline__ Pack<float, kWidth> widened(const Row* row) {
  const Pack<Row, kWidth> values = load_pack<kWidth>(row);
  Pack<float, kWidth> wide;
  for (int k = 0; k < kWidth; ++k) wide.v[k] = to_float(values.v[k]);
  return wide;
}

// Part of the mean row of the label whose rows begin at `start`: columns d, ..., d + kWidth - 1.
template <class Row, int kWidth>
__device__ Pack<float, kWidth> mean_row(const Row* __restrict__ bank,  // [N, dim]
                                        const LabelGroups& groups, int64_t dim, int64_t start,
                                        int64_t d) {
  constexpr int kPart = 32, kAhead = 4;
  const uint32_t label = groups.labels[start];
  Pack<float, kWidth> mean{};
  float count = 0.f;
  bool more = true;
  for (int64_t begin = start; more; begin += kPart) {
    float part[kWidth] = {};
    for (int64_t i = begin; more && i < begin + kPart; i += kAhead) {
      Pack<float, kWidth> rows[kAhead]{};
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        more = i + j < groups.rows && groups.labels[i + j] == label;
        if (more) rows[j] = widened<kWidth>(bank + groups.order[i + j] * dim + d);
        count += more ? 1.f : 0.f;
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        for (int k = 0; k < kWidth; ++k) part[k] = __fadd_rn(part[k], rows[j].v[k]);
    }
    for (int k = 0; k < kWidth; ++k) mean.v[k] = __fadd_rn(mean.v[k], part[k]);
  }
  for (int k = 0; k < kWidth; ++k) mean.v[k] = __fdiv_rn(mean.v[k], count);
  return mean;
}

// A block per label and slice of its mean.
template <class Row, int kWidth>
__global__ void __launch_bounds__(kThreads)
    label_means_kernel(const Row* __restrict__ bank,  // [N, dim]
                       LabelGroups groups, int64_t dim, int64_t first, int slices,
                       float* __restrict__ means) {  // [gridDim / slices, dim]
  const int64_t column = blockIdx.x / slices;
  const int64_t d = (int64_t(blockIdx.x % slices) * kThreads + threadIdx.x) * kWidth;
  if (d >= dim) return;
  Pack<float, kWidth> mean{};
  if (groups.begins(first + column))
    mean = mean_row<Row, kWidth>(bank, groups, dim, first + column, d);
  store_pack(means + column * dim + d, mean);
}

// Place of the target of a query: a row of the bank, or of its label; -1 where it has none.
__device__ __forceinline__ int64_t target_column(const BankCrossEntropy& loss, int64_t query) {
  if (query >= loss.targets.size) return -1;
  if (loss.reduce != Reduce::row) return loss.target_columns[query];
  const int64_t row = id_at(loss.targets, query);
  return row < loss.bank.rows ? row : -1;
}

// Values i, ..., i + kPack - 1 of a row; those from `size` on are left.
__device__ __forceinline__ Pack<float, kPack> load_values(const float* row, int64_t i, int64_t size,
                                                          bool packs) {
  if (packs) return load_pack<kPack>(row + i);
  Pack<float, kPack> values{};
  for (int k = 0; k < kPack; ++k)
    if (i + k < size) values.v[k] = row[i + k];
  return values;
}

__device__ __forceinline__ void store_values(float* row, int64_t i, int64_t size, bool packs,
                                             const Pack<float, kPack>& values) {
  if (packs) return store_pack(row + i, values);
  for (int k = 0; k < kPack; ++k)
    if (i + k < size) row[i + k] = values.v[k];
}

template <Reduce kReduce>
__global__ void __launch_bounds__(32 * kMaxWarps, kFoldBlocks)
    fold_scores_kernel(BankCrossEntropy loss, ScorePanel panel, bool packs,
                       RunningSoftmax* __restrict__ running,  // [queries]
                       float* __restrict__ sums) {            // [queries, dim], or null
  PYREID_SHARED(float, partials, kMaxWarps);
  const int64_t query = blockIdx.x;
  const LabelGroups groups(loss);
  const int64_t target = target_column(loss, query);
  const int64_t label =
      kReduce == Reduce::label_uniform && target >= 0 ? id_at(loss.targets, query) : -1;
  float* const row = panel.scores + query * panel.size;
  const int64_t stride = int64_t(blockDim.x) * kPack;
  const auto exists = [&](int64_t i) {
    return i < panel.size && (kReduce != Reduce::cluster_mean || groups.begins(panel.first + i));
  };

  // A finite start: nothing less nothing is then no NaN.
  const float before = panel.first == 0 ? -FLT_MAX : running[query].max;
  float max = before;
  for (int64_t i = int64_t(threadIdx.x) * kPack; i < panel.size; i += stride) {
    const Pack<float, kPack> scores = load_values(row, i, panel.size, packs);
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      if (exists(i + k)) max = fmaxf(max, __fmul_rn(loss.scale, scores.v[k]));
  }
  max = block_max(max, partials);

  float sum = 0.f, total = 0.f, hits = 0.f, matched = 0.f, columns = 0.f;
  for (int64_t i = int64_t(threadIdx.x) * kPack; i < panel.size; i += stride) {
    Pack<float, kPack> values = load_values(row, i, panel.size, packs);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const int64_t column = panel.first + i + k;
      const bool mine = exists(i + k);
      const bool hit = kReduce == Reduce::label_uniform
                           ? mine && label >= 0 && id_at(loss.labels, column) == label
                           : mine && column == target;
      const float score = mine ? values.v[k] : 0.f;
      total = __fadd_rn(total, score);
      columns += mine ? 1.f : 0.f;
      hits = __fadd_rn(hits, hit ? score : 0.f);
      matched += hit ? 1.f : 0.f;
      const bool weighs = mine && (kReduce == Reduce::label_uniform || !hit);
      values.v[k] = weighs ? expf(__fsub_rn(__fmul_rn(loss.scale, score), max)) : 0.f;
      sum = __fadd_rn(sum, values.v[k]);
    }
    store_values(row, i, panel.size, packs, values);
  }
  const float shrink = panel.first == 0 ? 0.f : expf(__fsub_rn(before, max));
  const RunningSoftmax added{max,
                             block_sum(sum, partials),
                             block_sum(total, partials),
                             block_sum(hits, partials),
                             block_sum(matched, partials),
                             block_sum(columns, partials)};
  if (threadIdx.x == 0) {
    const RunningSoftmax old = panel.first == 0 ? RunningSoftmax{} : running[query];
    running[query] = {max,
                      __fadd_rn(__fmul_rn(old.sum, shrink), added.sum),
                      __fadd_rn(old.total, added.total),
                      __fadd_rn(old.target, added.target),
                      old.matched + added.matched,
                      old.columns + added.columns};
  }
  if (sums == nullptr || shrink == 1.f) return;
  float* const mine_sums = sums + query * loss.bank.cols;
  for (int64_t d = threadIdx.x; d < loss.bank.cols; d += blockDim.x)
    mine_sums[d] = panel.first == 0 ? 0.f : __fmul_rn(mine_sums[d], shrink);
}

// Of exp(z - max), over all columns.
__device__ __forceinline__ float softmax_sum(const BankCrossEntropy& loss,
                                             const RunningSoftmax& running) {
  if (loss.reduce == Reduce::label_uniform) return running.sum;
  const float target = __fmul_rn(loss.scale, running.target);
  return __fadd_rn(running.sum, expf(__fsub_rn(target, running.max)));
}

__global__ void __launch_bounds__(kThreads)
    finish_losses_kernel(BankCrossEntropy loss,
                         const RunningSoftmax* __restrict__ running,  // [B]
                         float* __restrict__ losses) {                // [B]
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= loss.targets.size) return;
  const RunningSoftmax mine = running[i];
  if (mine.matched == 0.f) {
    losses[i] = 0.f;
    return;
  }
  const float target = __fmul_rn(loss.scale, __fdiv_rn(mine.target, mine.matched));
  const float mean = __fmul_rn(loss.scale, __fdiv_rn(mine.total, mine.columns));
  const float above =
      __fsub_rn(__fsub_rn(mine.max, __fmul_rn(__fsub_rn(1.f, loss.smoothing), target)),
                __fmul_rn(loss.smoothing, mean));
  const bool is_largest = loss.reduce != Reduce::label_uniform && target == mine.max;
  losses[i] = __fadd_rn(above, is_largest ? log1pf(mine.sum) : logf(softmax_sum(loss, mine)));
}

// A block per query and slice of its gradient; the first query of a target does those of them all,
// which share its row.
template <class Row, int kWidth>
__global__ void __launch_bounds__(kThreads, kGradientBlocks)
    finish_gradients_kernel(BankCrossEntropy loss, int slices,
                            const RunningSoftmax* __restrict__ running,  // [B]
                            float* __restrict__ sums) {                  // [B or B + 1, dim]
  const int64_t query = blockIdx.x / slices, dim = loss.bank.cols, batch = loss.targets.size;
  const int64_t place = target_column(loss, query);
  const int64_t d = (int64_t(blockIdx.x % slices) * kThreads + threadIdx.x) * kWidth;
  bool first = true;
  for (int64_t i = threadIdx.x; place >= 0 && i < query; i += kThreads)
    first &= target_column(loss, i) != place;
  if (!__syncthreads_and(first) || d >= dim) return;
  if (place < 0) return store_pack(sums + query * dim + d, Pack<float, kWidth>{});

  const Row* const bank = static_cast<const Row*>(loss.bank.data);
  Pack<float, kWidth> target, everywhere{};
  if (loss.reduce == Reduce::row) {
    target = widened<kWidth>(bank + place * dim + d);
  } else {
    target = mean_row<Row, kWidth>(bank, LabelGroups(loss), dim, place, d);
  }
  if (loss.smoothing > 0.f) everywhere = load_pack<kWidth>(sums + batch * dim + d);
  for (int64_t i = query; i < batch; ++i) {
    if (target_column(loss, i) != place) continue;
    const RunningSoftmax mine = running[i];
    const float sum = softmax_sum(loss, mine);
    const float share = __fdiv_rn(loss.scale, sum);
    const float others = loss.reduce == Reduce::label_uniform ? 1.f : __fdiv_rn(mine.sum, sum);
    const float on_target = __fmul_rn(loss.scale, __fsub_rn(loss.smoothing, others));
    const float on_all = __fdiv_rn(__fmul_rn(loss.scale, loss.smoothing), mine.columns);
    Pack<float, kWidth> gradient = load_pack<kWidth>(sums + i * dim + d);
    for (int k = 0; k < kWidth; ++k) {
      const float pulled =
          __fadd_rn(__fmul_rn(share, gradient.v[k]), __fmul_rn(on_target, target.v[k]));
      gradient.v[k] = __fsub_rn(pulled, __fmul_rn(on_all, everywhere.v[k]));
    }
    store_pack(sums + i * dim + d, gradient);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool packs(const ScorePanel& panel) { return panel.size % kPack == 0 && aligned(panel.scores); }

int64_t blocks(int64_t items, int64_t each) { return (items + each - 1) / each; }

// Calls body(kind of row, width), the latter a number of elements that may be read at once.
template <class Body>
void with_rows(const BankCrossEntropy& loss, const void* others, Body body) {
  const auto with_width = [&](auto row) {
    const bool packs = loss.bank.cols % kPack == 0 && aligned(loss.bank.data) && aligned(others);
    if (packs) return body(row, std::integral_constant<int, kPack>{});
    body(row, std::integral_constant<int, 1>{});
  };
  switch (loss.bank.dtype) {
    case Dtype::float32:
      return with_width(float{});
    case Dtype::float16:
      return with_width(Half{});
    default:
      return with_width(BFloat16{});
  }
}

template <Reduce kReduce>
void launch_fold(const BankCrossEntropy& loss, const ScorePanel& panel, RunningSoftmax* running,
                 float* sums, Stream stream) {
  const int64_t warps = std::min<int64_t>(kMaxWarps, blocks(panel.size, 32 * 2 * kPack));
  launch(kOp, fold_scores_kernel<kReduce>, panel.queries, int(32 * warps), 0, stream, loss, panel,
         packs(panel), running, sums);
}

}  // namespace

size_t group_labels_workspace(const BankCrossEntropy& loss) {
  return sort_workspace(loss.bank.rows);
}

void group_labels(const BankCrossEntropy& loss, void* workspace, Stream stream) {
  const Sorted sorted = sort_ids(kOp, loss.labels, kNoLabel, workspace, stream);
  launch(kOp, label_groups_kernel,
         blocks(std::max(loss.bank.rows + 1, loss.targets.size), kThreads), kThreads, 0, stream,
         loss, LabelGroups(loss), sorted);
}

int64_t label_columns(const BankCrossEntropy& loss) { return loss.bank.rows; }

void label_means(const BankCrossEntropy& loss, int64_t first, Matrix means, Stream stream) {
  const int64_t dim = loss.bank.cols;
  with_rows(loss, means.data, [&](auto row, auto width) {
    using Row = decltype(row);
    const int64_t slices = blocks(dim, kThreads * width);
    launch(kOp, label_means_kernel<Row, width>, means.rows * slices, kThreads, 0, stream,
           static_cast<const Row*>(loss.bank.data), LabelGroups(loss), dim, first, int(slices),
           static_cast<float*>(means.data));
  });
}

void fold_scores(const BankCrossEntropy& loss, const ScorePanel& panel, RunningSoftmax* running,
                 float* sums, Stream stream) {
  switch (loss.reduce) {
    case Reduce::row:
      return launch_fold<Reduce::row>(loss, panel, running, sums, stream);
    case Reduce::cluster_mean:
      return launch_fold<Reduce::cluster_mean>(loss, panel, running, sums, stream);
    case Reduce::label_uniform:
      return launch_fold<Reduce::label_uniform>(loss, panel, running, sums, stream);
  }
}

void finish_losses(const BankCrossEntropy& loss, const RunningSoftmax* running, float* losses,
                   float* sums, Stream stream) {
  launch(kOp, finish_losses_kernel, blocks(loss.targets.size, kThreads), kThreads, 0, stream, loss,
         running, losses);
  if (sums == nullptr) return;
  with_rows(loss, sums, [&](auto row, auto width) {
    const int64_t slices = blocks(loss.bank.cols, kThreads * width);
    launch(kOp, finish_gradients_kernel<decltype(row), width>, loss.targets.size * slices, kThreads,
           0, stream, loss, int(slices), running, sums);
  });
}

}  // namespace pyreid
