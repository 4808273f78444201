// Least significant byte first. A tile of keys belongs to one block and a run of it to one warp, so
// that "how many equal bytes came before me" is: in earlier tiles (a scan over all counts), in
// earlier warps of my tile (a scan in shared memory), in earlier rounds of my warp (a running
// count), in lower lanes of my round (match).

#include "cuda/scan.cuh"
#include "cuda/sort.cuh"

namespace pyreid {
namespace {

constexpr int kDigits = 256, kThreads = 256, kWarps = kThreads / 32, kRounds = 8;
constexpr int kTile = kThreads * kRounds;

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
    exclusive_scan(op, counts, kDigits * blocks, stream);
    launch(op, sort_scatter_kernel, blocks, kThreads, 0, stream, static_cast<const uint32_t*>(keys),
           static_cast<const uint32_t*>(order), static_cast<const uint32_t*>(counts), count, shift,
           other_keys, other_order);
    std::swap(keys, other_keys);
    std::swap(order, other_order);
  }
  return {keys, order};
}

}  // namespace pyreid
