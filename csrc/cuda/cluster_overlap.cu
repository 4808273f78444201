// Three hash tables: of first labels, of second ones, and of pairs, a pair being named by the
// places of its labels in the other two. Who comes first to a place is left to chance, and with it
// where a label goes; how many come is not.

#include "cuda/ids.cuh"
#include "cuda/portable.cuh"
#include "ops.h"
#include "pair_key.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "cluster_overlap";
constexpr int kThreads = 256;
constexpr uint64_t kFree = ~uint64_t(0);  // no key, as keys are not negative
constexpr uint32_t kAlone = 0xffffffffu;

struct Table {
  uint64_t* keys;    // (capacity,)
  uint32_t* counts;  // (capacity,)

  // Counts a key and returns its place.
  __device__ uint32_t add(uint64_t key, uint64_t mask) const {
    uint64_t place = mixed(key) & mask;
    for (;; place = (place + 1) & mask) {
      const uint64_t found =
          atomicCAS(reinterpret_cast<unsigned long long*>(keys + place),
                    static_cast<unsigned long long>(kFree), static_cast<unsigned long long>(key));
      if (found == kFree || found == key) break;
    }
    atomicAdd(counts + place, 1u);
    return uint32_t(place);
  }
};

struct Tables {
  ClusterOverlap task;
  int64_t capacity;
  Table tables[3];      // of first labels, second ones, pairs
  uint32_t* places[3];  // (N,) each sample's in each table; kAlone: in none
};

__device__ __forceinline__ int64_t this_thread() {
  return int64_t(blockIdx.x) * kThreads + threadIdx.x;
}

__global__ void __launch_bounds__(kThreads) overlap_clear_kernel(const Tables all) {
  if (this_thread() >= all.capacity) return;
  for (const Table& table : all.tables) {
    table.keys[this_thread()] = kFree;
    table.counts[this_thread()] = 0;
  }
}

__global__ void __launch_bounds__(kThreads) overlap_add_kernel(const Tables all) {
  const int64_t i = this_thread();
  if (i >= all.task.first.size) return;
  const uint64_t mask = uint64_t(all.capacity - 1);
  const auto add = [&](const Table& table, int64_t key) {
    return key < 0 ? kAlone : table.add(uint64_t(key), mask);
  };
  const uint32_t first = add(all.tables[0], id_at(all.task.first, i));
  const uint32_t second = add(all.tables[1], id_at(all.task.second, i));
  const bool alone = first == kAlone || second == kAlone;
  all.places[0][i] = first;
  all.places[1][i] = second;
  all.places[2][i] = add(all.tables[2], alone ? -1 : pair_key(first, second));
}

__global__ void __launch_bounds__(kThreads) overlap_read_kernel(const Tables all) {
  const int64_t i = this_thread();
  if (i >= all.task.first.size) return;
  const auto members = [&](const Table& table, uint32_t place) {
    return place == kAlone ? int64_t(1) : int64_t(table.counts[place]);
  };
  all.task.sizes[0][i] = members(all.tables[0], all.places[0][i]);
  all.task.sizes[1][i] = members(all.tables[1], all.places[1][i]);
  all.task.shared[i] = members(all.tables[2], all.places[2][i]);
}

}  // namespace

size_t cluster_overlap_workspace(int64_t samples) {
  const auto capacity = size_t(table_capacity(samples));
  return 3 * (capacity * (sizeof(uint64_t) + sizeof(uint32_t)) + samples * sizeof(uint32_t));
}

void cluster_overlap(const ClusterOverlap& task, void* workspace, Stream stream) {
  const int64_t samples = task.first.size;
  Tables all{};
  all.task = task;
  all.capacity = table_capacity(samples);
  auto* const keys = static_cast<uint64_t*>(workspace);
  auto* const counts = reinterpret_cast<uint32_t*>(keys + 3 * all.capacity);
  for (int t = 0; t < 3; ++t) {
    all.tables[t] = {keys + t * all.capacity, counts + t * all.capacity};
    all.places[t] = counts + 3 * all.capacity + t * samples;
  }
  const auto blocks = [](int64_t items) { return (items + kThreads - 1) / kThreads; };
  launch(kOp, overlap_clear_kernel, blocks(all.capacity), kThreads, 0, stream, all);
  launch(kOp, overlap_add_kernel, blocks(samples), kThreads, 0, stream, all);
  launch(kOp, overlap_read_kernel, blocks(samples), kThreads, 0, stream, all);
}

}  // namespace pyreid
