// Clusters are the components of core samples that are each other's neighbours: a union-find that
// hooks a larger root under a smaller one, so that the root of a component is its smallest sample,
// in whatever order the hooks happen. Others take the smallest root among the core samples that
// they are neighbours of; roots are numbered by a prefix sum.
//
// Distances need not be symmetric, though. A core sample then passes its label to its neighbours
// but not the other way round, and the label of a sample is the smallest core sample that reaches
// it. So only pairs that are mutual are united, and pairs are only looked up the other way as long
// as their roots differ. What then still leads from one component to another is a one-way street.
// As a rule there is none; where there is, one block per eps relaxes roots until nothing moves.
//
// A warp per row and eps, rows outermost: all eps of a row share its cache lines.

#include "cuda/graph.cuh"
#include "cuda/portable.cuh"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "dbscan";
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlocks = 4;  // per multiprocessor; ptxas aims at 8, which here means spilling
constexpr int kRelaxThreads = 512;
constexpr uint32_t kNone = 0xffffffffu;

struct Search {
  Dbscan task;
  uint32_t* parents;  // (count, N) of core samples; kNone: not a core sample
  uint32_t* least;    // (count, N) the smallest core sample that reaches a root, or a border sample
  uint32_t* numbers;  // (count, N) of roots: which cluster they are
  uint32_t* seeds;    // (count, tiles) how many clusters begin in each tile of kThreads samples
  uint32_t* one_way;  // (count,) whether a one-way street is left
  uint32_t* bits;     // (count, N, words) whether two samples are neighbours, if dense
};

__host__ __device__ int64_t tiles(int64_t samples) { return (samples + kThreads - 1) / kThreads; }
__host__ __device__ int64_t words(int64_t samples) { return (samples + 31) / 32; }

__device__ __forceinline__ uint32_t warp_total(uint32_t value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// The neighbours in a CSR graph at one eps.
class StoredRows {
 public:
  __device__ StoredRows(const Search& search, int e)
      : graph_(search.task.distances), eps_(search.task.eps[e]) {}

  // By a whole warp.
  __device__ uint32_t degree(int64_t row) const {
    const Row entries = row_at(graph_, row);
    uint32_t near = 0;
    bool itself = false;
    for (int64_t i = entries.begin + threadIdx.x % 32; i < entries.end; i += 32) {
      const int64_t sample = id_at(graph_.indices, i);
      near += exists(sample) && graph_.values[i] <= eps_;
      itself |= sample == row;
    }
    return warp_total(near) + !__any_sync(0xffffffffu, itself);
  }

  // visit(neighbour), each by one lane of a warp.
  template <class Visit>
  __device__ void each(int64_t row, Visit visit) const {
    const Row entries = row_at(graph_, row);
    for (int64_t i = entries.begin + threadIdx.x % 32; i < entries.end; i += 32) {
      if (!(graph_.values[i] <= eps_)) continue;
      const int64_t sample = id_at(graph_.indices, i);
      if (exists(sample)) visit(sample);
    }
  }

  __device__ bool near(int64_t row, int64_t sample) const {
    const Row entries = row_at(graph_, row);
    for (int64_t i = entries.begin; i < entries.end; ++i)
      if (id_at(graph_.indices, i) == sample) return graph_.values[i] <= eps_;
    return false;
  }

  // Of a mutual pair, one comes first: the one with the longer row, as the other row is searched.
  __device__ bool first(int64_t row, int64_t sample) const {
    const Row mine = row_at(graph_, row), other = row_at(graph_, sample);
    const int64_t longer = (mine.end - mine.begin) - (other.end - other.begin);
    return longer > 0 || (longer == 0 && row > sample);
  }

 private:
  __device__ bool exists(int64_t sample) const { return sample >= 0 && sample < graph_.samples; }

  const Distances& graph_;
  const float eps_;
};

// The neighbours in a dense matrix at one eps, as bits.
class DenseRows {
 public:
  __device__ DenseRows(const Search& search, int e)
      : words_(words(search.task.distances.samples)),
        bits_(search.bits + e * search.task.distances.samples * words_) {}

  __device__ uint32_t degree(int64_t row) const {
    uint32_t near = 0;
    for (int64_t w = threadIdx.x % 32; w < words_; w += 32) near += __popc(bits_[row * words_ + w]);
    return warp_total(near);
  }

  template <class Visit>
  __device__ void each(int64_t row, Visit visit) const {
    for (int64_t w = threadIdx.x % 32; w < words_; w += 32)
      for (uint32_t left = bits_[row * words_ + w]; left != 0; left &= left - 1)
        visit(32 * w + __ffs(int(left)) - 1);
  }

  __device__ bool near(int64_t row, int64_t sample) const {
    return bits_[row * words_ + sample / 32] >> sample % 32 & 1;
  }

  __device__ bool first(int64_t row, int64_t sample) const { return row > sample; }

 private:
  const int64_t words_;
  const uint32_t* const bits_;
};

// The components of one eps. Others change them while they are read: any value that a parent ever
// had is an ancestor, and that is all that finding a root needs.
class Components {
 public:
  __device__ Components(const Search& search, int e)
      : parents_(search.parents + e * search.task.distances.samples) {}

  __device__ bool core(int64_t sample) const { return parent(sample) != kNone; }

  __device__ uint32_t parent(int64_t sample) const {
    return *static_cast<const volatile uint32_t*>(parents_ + sample);
  }

  __device__ void set_parent(int64_t sample, uint32_t parent) const {
    *static_cast<volatile uint32_t*>(parents_ + sample) = parent;
  }

  // Halves the path on its way.
  __device__ uint32_t root(int64_t sample) const {
    uint32_t above = parent(sample);
    if (above == sample) return above;
    int64_t below = sample;
    for (uint32_t next = parent(above); next < above; next = parent(above)) {
      set_parent(below, next);
      below = above;
      above = next;
    }
    return above;
  }

  // A hook that fails has been overtaken by another one, so somebody always gets on.
  __device__ void unite(uint32_t a, uint32_t b) const {
    while (a != b) {
      const uint32_t high = a > b ? a : b, low = a > b ? b : a;
      const uint32_t before = atomicCAS(parents_ + high, high, low);
      if (before == high) return;
      a = root(before);
      b = root(low);
    }
  }

 private:
  uint32_t* const parents_;
};

struct Place {
  int64_t row;
  int e;
};

__device__ __forceinline__ int64_t this_warp() {
  return int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
}

// What this warp works on.
__device__ __forceinline__ Place this_place(const Search& search) {
  return {this_warp() / search.task.count, int(this_warp() % search.task.count)};
}

// A warp per 32 words, lane by lane one of them.
__global__ void __launch_bounds__(kThreads) dbscan_bits_kernel(const Search search) {
  const int64_t samples = search.task.distances.samples, width = words(samples);
  const int64_t stretches = words(width);
  const int64_t row = this_warp() / stretches, first = this_warp() % stretches * 32;
  const int lane = threadIdx.x % 32;
  if (row >= samples) return;
  const float* const values = search.task.distances.values + row * samples;
  for (int e = 0; e < search.task.count; ++e) {
    const float eps = search.task.eps[e];
    uint32_t mine = 0;
    for (int w = 0; w < 32; ++w) {
      const int64_t i = (first + w) * 32 + lane;
      const uint32_t near = __ballot_sync(0xffffffffu, i < samples && values[i] <= eps);
      if (lane == w) mine = near;
    }
    if (first + lane < width) search.bits[(e * samples + row) * width + first + lane] = mine;
  }
}

template <class Rows>
__global__ void __launch_bounds__(kThreads) dbscan_core_kernel(const Search search) {
  const int64_t samples = search.task.distances.samples;
  const Place at = this_place(search);
  if (at.row >= samples) return;
  const bool core = int64_t(Rows(search, at.e).degree(at.row)) >= search.task.min_samples;
  if (threadIdx.x % 32 != 0) return;
  const uint32_t self = core ? uint32_t(at.row) : kNone;
  search.parents[at.e * samples + at.row] = self;
  search.least[at.e * samples + at.row] = self;
  if (at.row == 0) search.one_way[at.e] = 0;
}

template <class Rows>
__global__ void __launch_bounds__(kThreads, kBlocks) dbscan_unite_kernel(const Search search) {
  const int64_t samples = search.task.distances.samples;
  const Place at = this_place(search);
  if (at.row >= samples) return;
  const Rows rows(search, at.e);
  const Components components(search, at.e);
  if (!components.core(at.row)) return;
  rows.each(at.row, [&](int64_t sample) {
    if (sample == at.row || !components.core(sample) || !rows.first(at.row, sample)) return;
    const uint32_t a = components.root(at.row), b = components.root(sample);
    if (a != b && rows.near(sample, at.row)) components.unite(a, b);
  });
}

template <class Rows>
__global__ void __launch_bounds__(kThreads) dbscan_settle_kernel(const Search search) {
  const int64_t samples = search.task.distances.samples;
  const Place at = this_place(search);
  if (at.row >= samples) return;
  const Components components(search, at.e);
  if (!components.core(at.row)) return;
  const uint32_t root = components.root(at.row);
  uint32_t* const least = search.least + at.e * samples;
  Rows(search, at.e).each(at.row, [&](int64_t sample) {
    if (!components.core(sample)) {
      atomicMin(least + sample, root);
    } else if (components.root(sample) != root) {
      search.one_way[at.e] = 1;
    }
  });
  if (threadIdx.x % 32 == 0) components.set_parent(at.row, root);
}

// Where there are one-way streets. A smaller sample found is final only when a whole round has
// found none; meanwhile, what reaches the sample that reaches us reaches us.
template <class Rows>
__global__ void __launch_bounds__(kRelaxThreads) dbscan_relax_kernel(const Search search) {
  const int64_t samples = search.task.distances.samples;
  const int e = blockIdx.x;
  if (search.one_way[e] == 0) return;
  const Rows rows(search, e);
  const Components components(search, e);
  uint32_t* const least = search.least + e * samples;
  const auto lowered = [&](int64_t sample, uint32_t to) {
    if (*static_cast<const volatile uint32_t*>(least + sample) <= to) return false;
    return atomicMin(least + sample, to) > to;
  };
  bool moved;
  do {
    moved = false;
    for (int64_t row = threadIdx.x / 32; row < samples; row += kRelaxThreads / 32) {
      const uint32_t root = components.parent(row);
      if (root == kNone) continue;
      const uint32_t source = *static_cast<const volatile uint32_t*>(least + root);
      const uint32_t mine = *static_cast<const volatile uint32_t*>(least + source);
      moved |= lowered(root, mine);
      rows.each(row, [&](int64_t sample) {
        const uint32_t target = components.parent(sample);
        moved |= lowered(target == kNone ? sample : int64_t(target), mine);
      });
    }
  } while (__syncthreads_or(moved));
}

__device__ __forceinline__ bool is_seed(const Search& search, int e, int64_t sample) {
  const int64_t at = e * search.task.distances.samples + sample;
  return search.parents[at] == sample && search.least[at] == sample;
}

// A block per tile and eps.
__global__ void __launch_bounds__(kThreads) dbscan_count_kernel(const Search search) {
  const int64_t samples = search.task.distances.samples;
  const int e = int(blockIdx.x / tiles(samples));
  const int64_t sample = blockIdx.x % tiles(samples) * kThreads + threadIdx.x;
  const int seeds = __syncthreads_count(sample < samples && is_seed(search, e, sample));
  if (threadIdx.x == 0) search.seeds[blockIdx.x] = uint32_t(seeds);
}

__global__ void __launch_bounds__(kThreads) dbscan_number_kernel(const Search search) {
  PYREID_SHARED(uint32_t, before, kWarps);
  PYREID_SHARED(uint32_t, here, kWarps);
  const int64_t samples = search.task.distances.samples;
  const int e = int(blockIdx.x / tiles(samples)), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tile = blockIdx.x % tiles(samples), sample = tile * kThreads + threadIdx.x;
  uint32_t earlier = 0;
  for (int64_t t = threadIdx.x; t < tile; t += kThreads)
    earlier += search.seeds[e * tiles(samples) + t];
  earlier = warp_total(earlier);
  const bool seed = sample < samples && is_seed(search, e, sample);
  const uint32_t peers = __ballot_sync(0xffffffffu, seed);
  if (lane == 0) {
    before[warp] = earlier;
    here[warp] = uint32_t(__popc(peers));
  }
  __syncthreads();
  uint32_t number = uint32_t(__popc(peers & ((1u << lane) - 1)));
  for (int w = 0; w < kWarps; ++w) {
    number += before[w];
    if (w < warp) number += here[w];
  }
  if (seed) search.numbers[e * samples + sample] = number;
}

__global__ void __launch_bounds__(kThreads) dbscan_label_kernel(const Search search) {
  const int64_t samples = search.task.distances.samples;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= search.task.count * samples) return;
  const int64_t first = i / samples * samples;  // of this eps
  const uint32_t root = search.parents[i];
  const uint32_t seed = search.least[root == kNone ? i : first + root];
  search.task.labels[i] = seed == kNone ? -1 : int64_t(search.numbers[first + seed]);
}

template <class Rows>
void run(const Search& search, Stream stream) {
  const int64_t samples = search.task.distances.samples, count = search.task.count;
  const int64_t blocks = (count * samples + kWarps - 1) / kWarps;
  launch(kOp, dbscan_core_kernel<Rows>, blocks, kThreads, 0, stream, search);
  launch(kOp, dbscan_unite_kernel<Rows>, blocks, kThreads, 0, stream, search);
  launch(kOp, dbscan_settle_kernel<Rows>, blocks, kThreads, 0, stream, search);
  launch(kOp, dbscan_relax_kernel<Rows>, count, kRelaxThreads, 0, stream, search);
  launch(kOp, dbscan_count_kernel, count * tiles(samples), kThreads, 0, stream, search);
  launch(kOp, dbscan_number_kernel, count * tiles(samples), kThreads, 0, stream, search);
  launch(kOp, dbscan_label_kernel, (count * samples + kThreads - 1) / kThreads, kThreads, 0, stream,
         search);
}

}  // namespace

size_t dbscan_workspace(const Dbscan& task) {
  const int64_t samples = task.distances.samples;
  const int64_t dense = task.distances.indptr.data == nullptr ? samples * words(samples) : 0;
  return sizeof(uint32_t) * size_t(task.count * (3 * samples + tiles(samples) + 1 + dense));
}

void dbscan(const Dbscan& task, void* workspace, Stream stream) {
  const int64_t samples = task.distances.samples, all = task.count * samples;
  if (samples == 0) return;
  Search search{};
  search.task = task;
  search.parents = static_cast<uint32_t*>(workspace);
  search.least = search.parents + all;
  search.numbers = search.least + all;
  search.seeds = search.numbers + all;
  search.one_way = search.seeds + task.count * tiles(samples);
  search.bits = search.one_way + task.count;
  if (task.distances.indptr.data == nullptr) {
    const int64_t warps = samples * words(words(samples));
    launch(kOp, dbscan_bits_kernel, (warps + kWarps - 1) / kWarps, kThreads, 0, stream, search);
    run<DenseRows>(search, stream);
  } else {
    run<StoredRows>(search, stream);
  }
}

}  // namespace pyreid
