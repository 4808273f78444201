// Least significant byte first. A tile of keys belongs to one block and a run of it to one warp, so
// that "how many equal bytes came before me" is: in earlier tiles (a scan over all counts), in
// earlier warps of my tile (a scan in shared memory), in earlier rounds of my warp (a running
// count), in lower lanes of my round (match).

#include "cuda/sort.cuh"

namespace pyreid {
namespace {

constexpr int kDigits = 256, kThreads = 256, kWarps = kThreads / 32, kRounds = 8;
constexpr int kTile = kThreads * kRounds;
constexpr int kScanThreads = 512;

int64_t tiles(int64_t count) { return (count + kTile - 1) / kTile; }

__global__ void __launch_bounds__(kThreads)
    sort_keys_kernel(Ids ids, int64_t bound,
                     uint32_t* __restrict__ keys,     // [count]
                     uint32_t* __restrict__ order) {  // [count]
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= ids.size) return;
  const int64_t id = id_at(ids, i);
  keys[i] = uint32_t(id < 0 || id > bound ? bound : id);
  order[i] = uint32_t(i);
}

__global__ void __launch_bounds__(kThreads)
    sort_count_kernel(const uint32_t* __restrict__ keys,  // [count]
                      int64_t count, int shift,
                      uint32_t* __restrict__ counts) {  // [kDigits, tiles]
  PYREID_SHARED(uint32_t, digits, kDigits);
  digits[threadIdx.x] = 0;
  __syncthreads();
  const int64_t begin = int64_t(blockIdx.x) * kTile;
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = begin + round * kThreads + threadIdx.x;
    if (i < count) atomicAdd(&digits[(keys[i] >> shift) & (kDigits - 1)], 1u);
  }
  __syncthreads();
  counts[int64_t(threadIdx.x) * gridDim.x + blockIdx.x] = digits[threadIdx.x];
}

// Exclusive prefix sums in place, by one block: a tile's worth of counts is small beside its keys.
__global__ void __launch_bounds__(kScanThreads)
    sort_scan_kernel(uint32_t* __restrict__ counts,  // [size]
                     int64_t size) {
  PYREID_SHARED(uint32_t, warp_totals, kScanThreads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t carry = 0;
  for (int64_t begin = 0; begin < size; begin += kScanThreads) {
    const int64_t i = begin + threadIdx.x;
    const uint32_t value = i < size ? counts[i] : 0;
    uint32_t inclusive = value;
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t below = __shfl_up_sync(0xffffffffu, inclusive, step);
      if (lane >= step) inclusive += below;
    }
    if (lane == 31) warp_totals[warp] = inclusive;
    __syncthreads();
    uint32_t before = carry, total = 0;
    for (int w = 0; w < kScanThreads / 32; ++w) {
      const uint32_t warp_total = warp_totals[w];
      if (w < warp) before += warp_total;
      total += warp_total;
    }
    if (i < size) counts[i] = before + inclusive - value;
    carry += total;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads)
    sort_scatter_kernel(const uint32_t* __restrict__ keys,    // [count]
                        const uint32_t* __restrict__ order,   // [count]
                        const uint32_t* __restrict__ starts,  // [kDigits, tiles]
                        int64_t count, int shift,
                        uint32_t* __restrict__ keys_out,     // [count]
                        uint32_t* __restrict__ order_out) {  // [count]
  PYREID_SHARED(uint32_t, next, kWarps* kDigits);  // where each warp puts its next key of a digit
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < kWarps * kDigits; i += kThreads) next[i] = 0;
  __syncthreads();

  const int64_t begin = int64_t(blockIdx.x) * kTile + warp * (kTile / kWarps) + lane;
  constexpr uint32_t kNone = kDigits;  // the digit of a lane beyond the end
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = begin + round * 32;
    const uint32_t digit = i < count ? (keys[i] >> shift) & (kDigits - 1) : kNone;
    const uint32_t peers = __match_any_sync(0xffffffffu, digit);
    if (digit != kNone && lane == __ffs(peers) - 1) next[warp * kDigits + digit] += __popc(peers);
    __syncwarp();
  }
  __syncthreads();
  uint32_t position = starts[int64_t(threadIdx.x) * gridDim.x + blockIdx.x];
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t amount = next[w * kDigits + threadIdx.x];
    next[w * kDigits + threadIdx.x] = position;
    position += amount;
  }
  __syncthreads();

  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = begin + round * 32;
    const uint32_t key = i < count ? keys[i] : 0;
    const uint32_t digit = i < count ? (key >> shift) & (kDigits - 1) : kNone;
    const uint32_t peers = __match_any_sync(0xffffffffu, digit);
    if (digit != kNone) {
      const uint32_t to = next[warp * kDigits + digit] + __popc(peers & ((1u << lane) - 1));
      keys_out[to] = key;
      order_out[to] = order[i];
    }
    __syncwarp();
    if (digit != kNone && lane == __ffs(peers) - 1) next[warp * kDigits + digit] += __popc(peers);
    __syncwarp();
  }
}

}  // namespace

size_t sort_workspace(int64_t count) {
  return sizeof(uint32_t) * size_t(4 * count + kDigits * tiles(count));
}

Sorted sort_ids(const char* op, Ids ids, int64_t bound, void* workspace, Stream stream) {
  const int64_t count = ids.size, blocks = tiles(count);
  uint32_t* keys = static_cast<uint32_t*>(workspace);
  uint32_t *order = keys + count, *other_keys = order + count, *other_order = other_keys + count;
  uint32_t* const counts = other_order + count;
  launch(op, sort_keys_kernel, (count + kThreads - 1) / kThreads, kThreads, 0, stream, ids, bound,
         keys, order);
  for (int shift = 0; shift < 32 && bound >> shift > 0; shift += 8) {
    launch(op, sort_count_kernel, blocks, kThreads, 0, stream, static_cast<const uint32_t*>(keys),
           count, shift, counts);
    launch(op, sort_scan_kernel, 1, kScanThreads, 0, stream, counts, kDigits * blocks);
    launch(op, sort_scatter_kernel, blocks, kThreads, 0, stream, static_cast<const uint32_t*>(keys),
           static_cast<const uint32_t*>(order), static_cast<const uint32_t*>(counts), count, shift,
           other_keys, other_order);
    std::swap(keys, other_keys);
    std::swap(order, other_order);
  }
  return {keys, order};
}

}  // namespace pyreid
