// Softmax over chosen bank rows, in three kernels whose grids follow the work, not the number of
// queries:
//
//   scores     a warp per four candidates of a query row: every bank row is read once, for all
//              query sets, and the query once for four bank rows.
//   softmax    a block per query: maximum, sum, loss; scores become slopes, d loss / d dot product.
//   gradient   a thread per 16 bytes of columns: the sum of slopes times bank rows, in the order
//              of the candidates.
//
// Keeping the slopes, four bytes beside the eight of an index, halves what backward reads: no dot
// product is done twice. Gradient blocks own their columns, so nothing is added atomically. Where a
// batch is small and its lists are long, the candidates are split too, and a last kernel adds the
// parts in their order. How things are split depends on shapes alone.

#include <algorithm>

#include "cuda/ids.cuh"
#include "cuda/portable.cuh"
#include "cuda/reduce.cuh"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "set_contrast";
constexpr int kScoreThreads = 128;
constexpr int kPerWarp = 4;                               // candidates
constexpr int kPerBlock = kScoreThreads / 32 * kPerWarp;  // candidates of a score block
constexpr int kSoftmaxThreads = 256;
constexpr int kGradientThreads = 128;
// Blocks per multiprocessor that the compiler makes room for: left alone, it reads fewer rows at
// once, or spills, to fit more.
constexpr int kMinBlocks = 4;
constexpr int kTile = 64;  // candidates whose rows and slopes are brought to shared memory at once
constexpr int kInFlight = 8;        // bank rows that a thread reads at once
constexpr int kSplit = 512;         // candidates, at least, of a part
constexpr int kEnoughBlocks = 512;  // no splitting beyond

// Candidate c of query row b: its bank row, or -1 for a pad and what is out of range.
__device__ __forceinline__ int64_t row_of(const ContrastList& candidates, int64_t b, int c) {
  const int64_t positives = candidates.num_positives;
  const int64_t row =
      c < positives ? id_at(candidates.positives, b * positives + c)
                    : id_at(candidates.negatives, b * candidates.num_negatives + c - positives);
  return row < candidates.bank.rows ? row : -1;
}

template <class T>
constexpr int kFullPack = 16 / int(sizeof(T));

// kPack floats, by reads of up to 16 bytes.
template <int kPack>
__device__ __forceinline__ void read_floats(float (&to)[kPack], const float* from) {
  constexpr int kStep = kPack < 4 ? kPack : 4;
#pragma unroll
  for (int i = 0; i < kPack; i += kStep) {
    const Pack<float, kStep> pack = load_pack<kStep>(from + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) to[i + j] = pack.v[j];
  }
}

template <class Bank, int kPack, int kSets>
__global__ void __launch_bounds__(kScoreThreads, kMinBlocks)
    scores_kernel(const SetContrast contrast) {
  const ContrastList& candidates = contrast.candidates;
  const int count = int(candidates.count), dim = int(candidates.bank.cols);
  const int tiles = (count + kPerBlock - 1) / kPerBlock;
  const int64_t b = blockIdx.x / tiles;
  const int lane = threadIdx.x % 32;
  const int first = int(blockIdx.x % tiles) * kPerBlock + int(threadIdx.x) / 32 * kPerWarp;
  if (candidates.bank.rows == 0) return;
  const Bank* rows[kPerWarp];
  bool present[kPerWarp];  // not a pad, nor beyond the last candidate; else row 0 is read, in vain
#pragma unroll
  for (int c = 0; c < kPerWarp; ++c) {
    const int64_t row = first + c < count ? row_of(candidates, b, first + c) : -1;
    present[c] = row >= 0;
    rows[c] = static_cast<const Bank*>(candidates.bank.data) + max(row, int64_t(0)) * dim;
  }

  for (int64_t set = 0; set < contrast.sets; set += kSets) {
    const float* const query = contrast.queries + (set * candidates.batch + b) * dim;
    float sums[kSets][kPerWarp] = {};
#pragma unroll 2
    for (int d = lane * kPack; d < dim; d += 32 * kPack) {
      Pack<Bank, kPack> x[kPerWarp];
#pragma unroll
      for (int c = 0; c < kPerWarp; ++c) x[c] = load_pack<kPack>(rows[c] + d);
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        float q[kPack];
        read_floats(q, query + s * candidates.batch * dim + d);
#pragma unroll
        for (int c = 0; c < kPerWarp; ++c)
#pragma unroll
          for (int i = 0; i < kPack; ++i)
            sums[s][c] = __fmaf_rn(q[i], to_float(x[c].v[i]), sums[s][c]);
      }
    }
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int c = 0; c < kPerWarp; ++c) {
        const float sum = warp_sum(sums[s][c]);
        if (lane == 0 && present[c])
          contrast.slopes[((set + s) * candidates.batch + b) * count + first + c] =
              __fmul_rn(contrast.scale, sum);
      }
  }
}

__global__ void __launch_bounds__(kSoftmaxThreads) softmax_kernel(const SetContrast contrast) {
  PYREID_SHARED(float, partials, 32);
  const ContrastList& candidates = contrast.candidates;
  const int positives = int(candidates.num_positives), count = int(candidates.count);
  const int64_t b = blockIdx.x % candidates.batch;
  float* const scores = contrast.slopes + int64_t(blockIdx.x) * count;
  const auto present = [&](int c) { return row_of(candidates, b, c) >= 0; };
  const auto each = [&](int begin, int end, auto body) {
    for (int c = begin + int(threadIdx.x); c < end; c += int(blockDim.x))
      if (present(c)) body(c);
  };

  float uniform = 0.f;
  if (contrast.weights == nullptr) {
    each(0, positives, [&](int) { uniform += 1.f; });
    uniform = block_sum(uniform, &partials[0]);
    uniform = uniform > 0.f ? __fdiv_rn(1.f, uniform) : 0.f;
  }
  const auto weight = [&](int j) {
    if (contrast.weights == nullptr) return uniform;
    return contrast.weights[(contrast.weights_per_row ? b * positives : 0) + j];
  };

  const int begin = contrast.own ? positives : 0;
  float top = -INFINITY, sum = 0.f;
  each(begin, count, [&](int c) { top = fmaxf(top, scores[c]); });
  top = block_max(top, &partials[0]);
  if (top == -INFINITY) top = 0.f;
  each(begin, count, [&](int c) { sum = __fadd_rn(sum, expf(__fsub_rn(scores[c], top))); });
  sum = block_sum(sum, &partials[0]);
  const float log_sum = logf(sum);  // -infinity without any

  // How far the softmax is ahead of positive j alone, and the slope that follows from it.
  const auto behind = [&](int j) { return __fadd_rn(__fsub_rn(top, scores[j]), log_sum); };
  const auto own_slope = [&](int j) {
    return __fdiv_rn(weight(j), __fadd_rn(1.f, expf(-behind(j))));
  };
  float loss = 0.f, pull = 0.f;
  each(0, positives, [&](int j) {
    const float gap = behind(j);
    const float term = contrast.own ? fmaxf(gap, 0.f) + log1pf(expf(-fabsf(gap))) : gap;
    loss = __fadd_rn(loss, __fmul_rn(weight(j), term));
    pull = __fadd_rn(pull, contrast.own ? own_slope(j) : weight(j));
  });
  loss = block_sum(loss, &partials[0]);
  pull = block_sum(pull, &partials[0]);
  if (threadIdx.x == 0) contrast.loss[blockIdx.x] = loss;

  const float share = pull == 0.f ? 0.f : __fdiv_rn(pull, sum);
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    float slope = 0.f;
    if (present(c)) {
      if (c >= begin) slope = __fmul_rn(share, expf(__fsub_rn(scores[c], top)));
      if (c < positives) slope = __fsub_rn(slope, contrast.own ? own_slope(c) : weight(c));
    }
    scores[c] = __fmul_rn(contrast.scale, slope);
  }
}

struct GradientTask {
  SetContrastBackward backward;
  float* out;  // [splits, Q, B, D]
  int slices;  // blocks side by side over the columns
  int splits;  // parts of the candidates
  int part;    // candidates of a part
};

template <class Bank, int kPack, int kSets>
__global__ void __launch_bounds__(kGradientThreads, kMinBlocks)
    gradient_kernel(const GradientTask task) {
  PYREID_SHARED(int64_t, rows, kTile);
  PYREID_SHARED(float, slopes, kSets* kTile);
  const SetContrastBackward& backward = task.backward;
  const ContrastList& candidates = backward.candidates;
  const int count = int(candidates.count), dim = int(candidates.bank.cols);
  const int slice = int(blockIdx.x % task.slices);
  const int split = int(blockIdx.x / task.slices % task.splits);
  const int64_t b = blockIdx.x / (task.slices * task.splits);
  const int begin = split * task.part;
  const int end = candidates.bank.rows == 0 ? begin : min(begin + task.part, count);
  const int d = (slice * int(blockDim.x) + int(threadIdx.x)) * kPack;
  const Bank* const bank = static_cast<const Bank*>(candidates.bank.data) + d;

  for (int64_t set = 0; set < backward.sets; set += kSets) {
    float sums[kSets][kPack] = {};
    for (int tile = begin; tile < end; tile += kTile) {
      __syncthreads();
      for (int i = threadIdx.x; i < kTile; i += blockDim.x) {
        const int64_t row = tile + i < end ? row_of(candidates, b, tile + i) : -1;
        rows[i] = row;
#pragma unroll
        for (int s = 0; s < kSets; ++s) {
          const int64_t query = (set + s) * candidates.batch + b;
          slopes[s * kTile + i] = row < 0 ? 0.f
                                          : __fmul_rn(backward.grad_loss[query],
                                                      backward.slopes[query * count + tile + i]);
        }
      }
      __syncthreads();
      if (d >= dim) continue;
      for (int i = 0; i < min(kTile, end - tile); i += kInFlight) {
        Pack<Bank, kPack> x[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k)  // a pad reads row 0, in vain
          x[k] = load_pack<kPack>(bank + max(int64_t(rows[i + k]), int64_t(0)) * dim);
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (rows[i + k] < 0) continue;
#pragma unroll
          for (int s = 0; s < kSets; ++s) {
            const float slope = slopes[s * kTile + i + k];
#pragma unroll
            for (int j = 0; j < kPack; ++j)
              sums[s][j] = __fmaf_rn(slope, to_float(x[k].v[j]), sums[s][j]);
          }
        }
      }
    }
    if (d >= dim) continue;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      float* const out =
          task.out + ((split * backward.sets + set + s) * candidates.batch + b) * dim + d;
#pragma unroll
      for (int j = 0; j < kPack; ++j) out[j] = sums[s][j];
    }
  }
}

__global__ void add_parts_kernel(const float* parts,  // [splits, size]
                                 float* sum,          // [size]
                                 int64_t size, int splits) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float total = 0.f;
  for (int split = 0; split < splits; ++split) total = __fadd_rn(total, parts[split * size + i]);
  sum[i] = total;
}

// Whether rows can be read in packs of 16 bytes.
bool packs(const ContrastList& candidates, const void* queries) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  return candidates.bank.cols * size_of(candidates.bank.dtype) % 16 == 0 &&
         aligned(candidates.bank.data) && aligned(queries);
}

// Calls body(bank element, integral_constant pack, integral_constant sets at once).
template <class Body>
void dispatch(const ContrastList& candidates, const void* queries, int64_t sets, Body body) {
  const auto with_bank = [&](auto element) {
    using Bank = decltype(element);
    const auto with_pack = [&](auto pack) {
      if (sets % 2 == 0) return body(element, pack, std::integral_constant<int, 2>());
      return body(element, pack, std::integral_constant<int, 1>());
    };
    if (packs(candidates, queries))
      return with_pack(std::integral_constant<int, kFullPack<Bank>>());
    return with_pack(std::integral_constant<int, 1>());
  };
  if (candidates.bank.dtype == Dtype::float32) return with_bank(float());
  if (candidates.bank.dtype == Dtype::float16) return with_bank(Half());
  return with_bank(BFloat16());
}

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// How the gradient kernel is laid out. Its `out` is not filled in.
struct Layout {
  int threads, slices, splits, part;

  explicit Layout(const SetContrastBackward& backward) {
    const ContrastList& candidates = backward.candidates;
    const int pack = packs(candidates, nullptr) ? int(16 / size_of(candidates.bank.dtype)) : 1;
    const int packs = ceil_div(std::max<int64_t>(candidates.bank.cols, 1), pack);
    threads = std::min(kGradientThreads, ceil_div(packs, 32) * 32);
    slices = ceil_div(packs, threads);
    const int64_t blocks = std::max<int64_t>(candidates.batch, 1) * slices;
    const int wanted =
        std::min(ceil_div(candidates.count, kSplit), ceil_div(kEnoughBlocks, blocks));
    part = ceil_div(candidates.count, std::max(wanted, 1));
    part = std::max(kTile, ceil_div(part, kTile) * kTile);
    splits = std::max(1, ceil_div(candidates.count, part));
  }
};

int64_t gradient_size(const SetContrastBackward& backward) {
  return backward.sets * backward.candidates.batch * backward.candidates.bank.cols;
}

}  // namespace

void set_contrast(const SetContrast& contrast, Stream stream) {
  const ContrastList& candidates = contrast.candidates;
  dispatch(candidates, contrast.queries, contrast.sets, [&](auto element, auto pack, auto sets) {
    launch(kOp, scores_kernel<decltype(element), pack(), sets()>,
           contrast.sets == 0 ? 0 : candidates.batch * ceil_div(candidates.count, kPerBlock),
           kScoreThreads, 0, stream, contrast);
  });
  const int threads = std::min(kSoftmaxThreads, std::max(ceil_div(candidates.count, 32), 1) * 32);
  launch(kOp, softmax_kernel, contrast.sets * candidates.batch, threads, 0, stream, contrast);
}

size_t set_contrast_backward_workspace(const SetContrastBackward& backward) {
  const Layout layout(backward);
  return layout.splits == 1 ? 0 : sizeof(float) * size_t(layout.splits * gradient_size(backward));
}

void set_contrast_backward(const SetContrastBackward& backward, void* workspace, Stream stream) {
  const int64_t size = gradient_size(backward);
  if (size == 0) return;
  const Layout layout(backward);
  float* const parts = layout.splits == 1 ? backward.grad_queries : static_cast<float*>(workspace);
  const GradientTask task{backward, parts, layout.slices, layout.splits, layout.part};
  dispatch(backward.candidates, nullptr, backward.sets, [&](auto element, auto pack, auto sets) {
    launch(kOp, gradient_kernel<decltype(element), pack(), sets()>,
           backward.candidates.batch * layout.slices * layout.splits, layout.threads, 0, stream,
           task);
  });
  if (layout.splits > 1)
    launch(kOp, add_parts_kernel, ceil_div(size, 256), 256, 0, stream, parts, backward.grad_queries,
           size, layout.splits);
}

}  // namespace pyreid
