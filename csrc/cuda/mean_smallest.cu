// The k-th smallest distance by its digits from the top: each pass counts, of the distances that
// begin with the digits found so far, how many have which next digit. Then one pass adds up those
// below it: a warp per row, and one block for the rows, in an order that only their number decides.

#include <algorithm>

#include "cuda/graph.cuh"
#include "cuda/portable.cuh"
#include "ops.h"
#include "smallest_digits.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "mean_smallest";
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlocks = 4;  // per multiprocessor; ptxas aims at 8, which here means spilling
constexpr int kOneBlock = 512, kDigitsEach = kDigits / kOneBlock;
constexpr int64_t kCountBlocks = 1024;

struct State {
  unsigned long long zeros;
  int64_t rank;    // of the wanted distance among those that begin with prefix, from 1
  int64_t absent;  // pairs that are not stored, each at distance 1
  uint32_t prefix;
};

struct Selection {
  Distances distances;
  double fraction;
  unsigned long long* counts;  // (kPasses, kDigits)
  double* sums;                // (N,)
  State* state;
  Smallest* out;

  __device__ bool dense() const { return distances.indptr.data == nullptr; }

  // visit(distance) for the row's pairs in the strict upper triangle, by a warp.
  template <class Visit>
  __device__ void each_above(int64_t row, Visit visit) const {
    const int lane = threadIdx.x % 32;
    if (dense()) {
      const float* const values = distances.values + row * distances.samples;
      for (int64_t i = row + 1 + lane; i < distances.samples; i += 32) visit(values[i]);
      return;
    }
    const Row entries = row_at(distances, row);
    for (int64_t i = entries.begin + lane; i < entries.end; i += 32) {
      const int64_t sample = id_at(distances.indices, i);
      if (sample > row && sample < distances.samples) visit(distances.values[i]);
    }
  }
};

__global__ void __launch_bounds__(kThreads) smallest_clear_kernel(const Selection selection) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  selection.counts[i] = 0;
  if (i == 0) *selection.state = State{};
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    smallest_count_kernel(const Selection selection, int pass) {
  PYREID_SHARED(uint32_t, digits, kDigits);
  PYREID_SHARED(uint32_t, zeros, 1);
  for (int i = threadIdx.x; i < kDigits; i += kThreads) digits[i] = 0;
  if (threadIdx.x == 0) zeros[0] = 0;
  __syncthreads();
  const uint32_t prefix = selection.state->prefix;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
       row < selection.distances.samples; row += int64_t(gridDim.x) * kWarps)
    selection.each_above(row, [&](float distance) {
      const uint32_t key = distance_key(__float_as_uint(distance));
      if (distance == 0.f) {
        atomicAdd(&zeros[0], 1u);
      } else if (begins_with(key, prefix, pass)) {
        atomicAdd(&digits[digit_of(key, pass)], 1u);
      }
    });
  __syncthreads();
  for (int i = threadIdx.x; i < kDigits; i += kThreads) {
    const uint32_t amount = digits[i];
    if (amount != 0)
      atomicAdd(selection.counts + pass * kDigits + i, static_cast<unsigned long long>(amount));
  }
  if (threadIdx.x == 0 && pass == 0)
    atomicAdd(&selection.state->zeros, static_cast<unsigned long long>(uint32_t(zeros[0])));
}

// Sums of `value` over the threads before this one, and over all of the block.
struct BlockSums {
  int64_t before, total;
};

template <class Totals>
__device__ BlockSums block_sums(int64_t value, Totals warp_totals) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  long long inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const long long below = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += below;
  }
  if (lane == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  BlockSums sums{int64_t(inclusive) - value, 0};
  for (int w = 0; w < kOneBlock / 32; ++w) {
    const int64_t amount = warp_totals[w];
    if (w < warp) sums.before += amount;
    sums.total += amount;
  }
  return sums;
}

// One block finds the digit; in the first pass also what is sought.
__global__ void __launch_bounds__(kOneBlock)
    smallest_choose_kernel(const Selection selection, int pass) {
  PYREID_SHARED(int64_t, warp_totals, kOneBlock / 32);
  const State before = *selection.state;
  const unsigned long long* const counts =
      selection.counts + pass * kDigits + threadIdx.x * kDigitsEach;
  int64_t mine = 0;
  for (int i = 0; i < kDigitsEach; ++i) mine += int64_t(counts[i]);
  BlockSums sums = block_sums(mine, &warp_totals[0]);
  int64_t rank = before.rank, absent = before.absent;
  if (pass == 0) {
    Smallest found{};
    found.stored = sums.total;
    found.counted = selection.dense()
                        ? found.stored
                        : pairs_of(selection.distances.samples) - int64_t(before.zeros);
    found.taken = int64_t(rint(selection.fraction * double(found.counted)));
    absent = found.counted - found.stored;
    rank = found.taken;
    if (threadIdx.x == 0) *selection.out = found;
  }
  // Pairs that are not stored, at their digit.
  const int one = begins_with(kOneKey, before.prefix, pass) ? digit_of(kOneKey, pass) : kDigits;
  if (one < int(threadIdx.x) * kDigitsEach) sums.before += absent;
  int64_t below = sums.before;
  __syncthreads();  // all have read the state
  for (int i = 0; i < kDigitsEach; ++i) {
    const int digit = int(threadIdx.x) * kDigitsEach + i;
    const int64_t amount = int64_t(counts[i]) + (digit == one ? absent : 0);
    if (below < rank && rank <= below + amount) {
      selection.state->rank = rank - below;
      selection.state->absent = absent;
      selection.state->prefix = before.prefix | uint32_t(digit) << digit_shift(pass);
    }
    below += amount;
  }
}

__device__ __forceinline__ double warp_sum(double value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

__global__ void __launch_bounds__(kThreads) smallest_sum_kernel(const Selection selection) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= selection.distances.samples) return;
  const uint32_t largest = selection.state->prefix;
  double sum = 0;
  selection.each_above(row, [&](float distance) {
    if (distance != 0.f && distance_key(__float_as_uint(distance)) < largest) sum += distance;
  });
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) selection.sums[row] = sum;
}

__global__ void __launch_bounds__(kOneBlock) smallest_total_kernel(const Selection selection) {
  PYREID_SHARED(double, warp_totals, kOneBlock / 32);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < selection.distances.samples; row += kOneBlock)
    sum += selection.sums[row];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warp_totals[int(threadIdx.x) / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int w = 0; w < kOneBlock / 32; ++w) {
    const double part = warp_totals[w];
    total += part;
  }
  selection.out->ties = selection.state->rank;
  selection.out->largest = float_bits_of(selection.state->prefix);
  selection.out->sum = total;
}

}  // namespace

size_t smallest_workspace(const Distances& distances) {
  return sizeof(uint64_t) * size_t(kPasses * kDigits + distances.samples) + sizeof(State);
}

void smallest(const Distances& distances, double fraction, Smallest* out, void* workspace,
              Stream stream) {
  Selection selection{};
  selection.distances = distances;
  selection.fraction = fraction;
  selection.counts = static_cast<unsigned long long*>(workspace);
  selection.sums = reinterpret_cast<double*>(selection.counts + kPasses * kDigits);
  selection.state = reinterpret_cast<State*>(selection.sums + distances.samples);
  selection.out = out;
  const int64_t blocks = (distances.samples + kWarps - 1) / kWarps;
  launch(kOp, smallest_clear_kernel, kPasses * kDigits / kThreads, kThreads, 0, stream, selection);
  for (int pass = 0; pass < kPasses; ++pass) {
    launch(kOp, smallest_count_kernel, std::min(blocks, kCountBlocks), kThreads, 0, stream,
           selection, pass);
    launch(kOp, smallest_choose_kernel, 1, kOneBlock, 0, stream, selection, pass);
  }
  launch(kOp, smallest_sum_kernel, blocks, kThreads, 0, stream, selection);
  launch(kOp, smallest_total_kernel, 1, kOneBlock, 0, stream, selection);
}

}  // namespace pyreid
