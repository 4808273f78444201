#include <utility>

#include "cuda/merge_sort.cuh"

namespace pyreid {
namespace {

constexpr int kTile = 512;  // keys and threads of a block

__global__ void __launch_bounds__(kTile)
    merge_sort_tile_kernel(Ids major, Ids minor,
                           SortKey* __restrict__ keys,      // [count]
                           uint32_t* __restrict__ order) {  // [count]
  PYREID_SHARED(int64_t, majors, kTile);
  PYREID_SHARED(int64_t, minors, kTile);
  const int64_t begin = int64_t(blockIdx.x) * kTile, i = begin + threadIdx.x;
  const int size = int(min(int64_t(kTile), minor.size - begin));
  SortKey key{0, 0};
  if (i < minor.size) key = {major.data != nullptr ? id_at(major, i) : int64_t(0), id_at(minor, i)};
  majors[threadIdx.x] = key.major;
  minors[threadIdx.x] = key.minor;
  __syncthreads();
  if (i >= minor.size) return;
  int rank = 0;
  for (int j = 0; j < size; ++j) {
    const SortKey other{majors[j], minors[j]};
    rank += other < key || (j < int(threadIdx.x) && !(key < other)) ? 1 : 0;
  }
  keys[begin + rank] = key;
  order[begin + rank] = uint32_t(i);
}

// Runs of `run` keys become runs of twice as many. Of equal keys, those of the left run come first.
__global__ void __launch_bounds__(kTile)
    merge_sort_merge_kernel(const SortKey* __restrict__ keys,    // [count]
                            const uint32_t* __restrict__ order,  // [count]
                            int64_t count, int64_t run,
                            SortKey* __restrict__ keys_out,      // [count]
                            uint32_t* __restrict__ order_out) {  // [count]
  const int64_t i = int64_t(blockIdx.x) * kTile + threadIdx.x;
  if (i >= count) return;
  const SortKey key = keys[i];
  const int64_t begin = i / (2 * run) * (2 * run);
  const int64_t middle = min(begin + run, count), end = min(begin + 2 * run, count);
  const bool left = i < middle;
  const int64_t place = left ? find_place(keys, middle, end, key, false) - middle
                             : find_place(keys, begin, middle, key, true) - middle;
  keys_out[i + place] = key;
  order_out[i + place] = order[i];
}

// Two of them, that passes read and write in turn.
struct Buffers {
  SortKey* keys;
  uint32_t* order;

  Buffers(int64_t count, void* workspace, bool second)
      : keys(static_cast<SortKey*>(workspace) + (second ? count : 0)),
        order(reinterpret_cast<uint32_t*>(static_cast<SortKey*>(workspace) + 2 * count) +
              (second ? count : 0)) {}
};

}  // namespace

size_t merge_sort_workspace(int64_t count) {
  return 2 * (sizeof(SortKey) + sizeof(uint32_t)) * size_t(count);
}

MergeSorted merge_sort(const char* op, Ids major, Ids minor, void* workspace, Stream stream) {
  const int64_t count = minor.size, blocks = (count + kTile - 1) / kTile;
  Buffers from(count, workspace, false), to(count, workspace, true);
  launch(op, merge_sort_tile_kernel, blocks, kTile, 0, stream, major, minor, from.keys, from.order);
  for (int64_t run = kTile; run < count; run *= 2) {
    launch(op, merge_sort_merge_kernel, blocks, kTile, 0, stream,
           static_cast<const SortKey*>(from.keys), static_cast<const uint32_t*>(from.order), count,
           run, to.keys, to.order);
    std::swap(from, to);
  }
  return {from.keys, from.order};
}

MergeSorted merge_sorted(int64_t count, void* workspace) {
  bool second = false;
  for (int64_t run = kTile; run < count; run *= 2) second = !second;
  const Buffers buffers(count, workspace, second);
  return {buffers.keys, buffers.order};
}

}  // namespace pyreid
