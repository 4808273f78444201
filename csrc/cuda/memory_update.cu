// One block per distinct row of the bank. The block holds its row as float32, in registers, moves
// it by each of its events in batch order, and writes it back once: a bank row is read once and
// written once however often the batch repeats it, and no two blocks touch the same row, so there
// is nothing to synchronise and nothing to add atomically.
//
// Which block owns a row? There is one block per event; the first event of a row owns it (the last
// one, where the last one wins). Up to kScanned events, each block finds that out by reading all
// ids: they sit in L2, and one launch does everything. Beyond, the ids are sorted first, and events
// of a row are neighbours.
//
// A chain of repeats costs one block reduction (a barrier) per event, with the next event's feature
// already on its way. Products and sums are rounded one by one, never fused: the same bits as the
// emulator's.

#include <algorithm>

#include "cuda/portable.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sort.cuh"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "memory_update_";
constexpr int kMaxWarps = 16;
constexpr int kPartGroup = 16;  // norms that one barrier serves
constexpr int kScanned = 4096;  // events; beyond, sorting is cheaper than every block reading all
constexpr int kItems = 8;       // elements of a row per thread
constexpr int kLongItems = 16;  // the same for rows of more than 4096 columns
constexpr int kMemoryBlocks = 512;  // rows too long for registers that are in work at a time

// Blocks of 512 threads per multiprocessor that the compiler makes room for: left alone, it spills
// to fit more. Two leave 64 registers a thread, into which code for chips before Hopper does not
// fit.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kTwoBlocks = 1;
#else
constexpr int kTwoBlocks = 2;
#endif

struct Task {
  MemoryUpdate update;
  Sorted sorted;   // keys is null: scan
  float* scratch;  // [gridDim, D]: rows too long for registers
  int dim;         // bank.cols
  bool packs;      // whole 16-byte packs, all aligned
};

__device__ __forceinline__ int part_begin(const Parts& parts, int part) {
  return parts.size > 0 ? part * parts.size : part > 0 ? parts.ends[part - 1] : 0;
}

__device__ __forceinline__ int part_end(const Parts& parts, int part) {
  return parts.size > 0 ? (part + 1) * parts.size : parts.ends[part];
}

__device__ __forceinline__ float mix(float keep, float old, float take, float value) {
  return __fadd_rn(__fmul_rn(keep, old), __fmul_rn(take, value));
}

// Sums over the block, in an order that only the block size decides. Two buffers: the barrier of
// one round also ends the reads of the round before.
template <class Partials>
struct BlockSums {
  Partials partials;  // shared [2, kPartGroup, kMaxWarps]
  int buffer = 0;

  __device__ void begin_round() { buffer ^= 1; }
  __device__ void put(int slot, float value) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0)
      partials[(buffer * kPartGroup + slot) * kMaxWarps + threadIdx.x / 32] = value;
  }
  __device__ float get(int slot) const {
    float total = 0.f;
    for (int warp = 0; warp < int(blockDim.x) / 32; ++warp)
      total = __fadd_rn(total, partials[(buffer * kPartGroup + slot) * kMaxWarps + warp]);
    return total;
  }
};

// The events of one bank row in batch order, the same for every thread of the block.
template <class Matches>
struct Events {
  const Task& task;
  Matches
      matches;  // shared [2, kMaxWarps]: which of blockDim events, from `begin` on, name the row
  uint32_t row = 0;
  int begin = 0;
  int word = 0, buffer = 0;
  uint32_t bits = 0;

  // Whether this block owns the row of the event at `position`; then next() starts with its first
  // event.
  __device__ bool start(int position) {
    const Ids& rows = task.update.rows;
    const bool last = task.update.repeats == Repeats::last;
    begin = position;
    if (task.sorted.keys != nullptr) {
      row = task.sorted.keys[position];
      const int neighbour = last ? position + 1 : position - 1;
      return row < task.update.bank.rows &&
             (neighbour < 0 || neighbour >= rows.size || task.sorted.keys[neighbour] != row);
    }
    const int64_t id = id_at(rows, position);
    if (id < 0 || id >= task.update.bank.rows) return false;
    row = uint32_t(id);
    bool owned = true;
    const int from = last ? position + 1 : 0, to = last ? int(rows.size) : position;
    for (int i = from + int(threadIdx.x); i < to; i += int(blockDim.x))
      owned &= id_at(rows, i) != id;
    if (!__syncthreads_and(owned)) return false;
    if (!last) match();
    return true;
  }

  __device__ void match() {
    const int i = begin + int(threadIdx.x);
    const bool mine = i < task.update.rows.size && id_at(task.update.rows, i) == row;
    const uint32_t warp_matches = __ballot_sync(0xffffffffu, mine);
    buffer ^= 1;
    if (threadIdx.x % 32 == 0) matches[buffer * kMaxWarps + threadIdx.x / 32] = warp_matches;
    __syncthreads();
    word = 0;
    bits = matches[buffer * kMaxWarps];
  }

  __device__ int next() {  // -1 at the end
    if (task.sorted.keys != nullptr) {
      if (begin >= task.update.rows.size || task.sorted.keys[begin] != row) return -1;
      return int(task.sorted.order[begin++]);
    }
    for (;;) {
      while (bits == 0 && ++word < int(blockDim.x) / 32) bits = matches[buffer * kMaxWarps + word];
      if (bits != 0) {
        const int lane = __ffs(int(bits)) - 1;
        bits &= bits - 1;
        return begin + word * 32 + lane;
      }
      begin += int(blockDim.x);
      if (begin >= task.update.rows.size) return -1;
      match();
    }
  }

  __device__ int owner_event(int position) const {
    return task.sorted.keys != nullptr ? int(task.sorted.order[position]) : position;
  }
};

// A row spread over the registers of the block.
template <class Bank_, class Feature_, int kCount>
struct RegisterRow {
  using Bank = Bank_;
  using Feature = Feature_;
  static constexpr int kMinBlocks =
      kCount == kItems && sizeof(Bank) <= sizeof(Feature) ? kTwoBlocks : 1;
  static constexpr int kPack = sizeof(Bank) == 2 && sizeof(Feature) == 2 ? 8 : 4;
  struct Fetched {
    float value[kCount];
  };
  const Task& task;
  float value[kCount];

  __device__ explicit RegisterRow(const Task& task) : task(task) {}

  __device__ int index(int i) const {
    return (i / kPack * int(blockDim.x) + int(threadIdx.x)) * kPack + i % kPack;
  }
  template <class T>
  __device__ void read(float (&to)[kCount], const T* source) const {
#pragma unroll
    for (int i = 0; i < kCount; i += kPack) {
      Pack<T, kPack> pack{};
      if (task.packs && index(i) < task.dim) pack = load_pack<kPack>(source + index(i));
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if (!task.packs && index(i + j) < task.dim) pack.v[j] = source[index(i + j)];
        to[i + j] = to_float(pack.v[j]);
      }
    }
  }
  __device__ void fetch(Fetched& to, const Feature* source) const { read(to.value, source); }
  __device__ void load(const Bank* source) { read(value, source); }
  __device__ void zero() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = 0.f;
  }
  __device__ void store(Bank* to) const {
#pragma unroll
    for (int i = 0; i < kCount; i += kPack) {
      Pack<Bank, kPack> pack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        pack.v[j] = from_float<Bank>(value[i + j]);
        if (!task.packs && index(i + j) < task.dim) to[index(i + j)] = pack.v[j];
      }
      if (task.packs && index(i) < task.dim) store_pack(to + index(i), pack);
    }
  }
  __device__ void blend(float keep, const Fetched& x, float take) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = mix(keep, value[i], take, x.value[i]);
  }
  __device__ void blend(float keep, const Bank* old, float take) {
    float x[kCount];
    read(x, old);
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = mix(keep, value[i], take, x[i]);
  }
  __device__ float dot(const Fetched& x) const {  // of this thread's elements
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum = __fadd_rn(sum, __fmul_rn(value[i], x.value[i]));
    return sum;
  }
  __device__ float squares(int begin, int end) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (index(i) >= begin && index(i) < end) sum = __fadd_rn(sum, __fmul_rn(value[i], value[i]));
    return sum;
  }
  __device__ void scale(int begin, int end, float factor) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (index(i) >= begin && index(i) < end) value[i] = __fmul_rn(value[i], factor);
  }
};

// A row of any length, in scratch memory. Each thread touches its own elements only.
template <class Bank_, class Feature_>
struct MemoryRow {
  using Bank = Bank_;
  using Feature = Feature_;
  static constexpr int kMinBlocks = kTwoBlocks;
  struct Fetched {
    const Feature* source;
  };
  const int dim;
  float* const value;

  __device__ MemoryRow(const Task& task)
      : dim(int(task.update.bank.cols)), value(task.scratch + int64_t(blockIdx.x) * dim) {}

  template <class Body>
  __device__ void each(int begin, int end, Body body) const {
    const int ahead = (int(threadIdx.x) - begin) % int(blockDim.x);
    for (int d = begin + (ahead < 0 ? ahead + int(blockDim.x) : ahead); d < end; d += blockDim.x)
      body(d);
  }
  __device__ void fetch(Fetched& to, const Feature* source) const { to.source = source; }
  __device__ void load(const Bank* source) {
    each(0, dim, [&](int d) { value[d] = to_float(source[d]); });
  }
  __device__ void zero() {
    each(0, dim, [&](int d) { value[d] = 0.f; });
  }
  __device__ void store(Bank* to) const {
    each(0, dim, [&](int d) { to[d] = from_float<Bank>(value[d]); });
  }
  __device__ void blend(float keep, const Fetched& x, float take) {
    each(0, dim, [&](int d) { value[d] = mix(keep, value[d], take, to_float(x.source[d])); });
  }
  __device__ void blend(float keep, const Bank* old, float take) {
    each(0, dim, [&](int d) { value[d] = mix(keep, value[d], take, to_float(old[d])); });
  }
  __device__ float dot(const Fetched& x) const {
    float sum = 0.f;
    each(0, dim, [&](int d) { sum = __fadd_rn(sum, __fmul_rn(value[d], to_float(x.source[d]))); });
    return sum;
  }
  __device__ float squares(int begin, int end) const {
    float sum = 0.f;
    each(begin, end, [&](int d) { sum = __fadd_rn(sum, __fmul_rn(value[d], value[d])); });
    return sum;
  }
  __device__ void scale(int begin, int end, float factor) {
    each(begin, end, [&](int d) { value[d] = __fmul_rn(value[d], factor); });
  }
};

template <class Row, class Sums>
__device__ void normalize(Row& row, const Parts& parts, Sums& sums) {
  for (int group = 0; group < parts.count; group += kPartGroup) {
    const int group_end = min(group + kPartGroup, parts.count);
    sums.begin_round();
#pragma unroll 1
    for (int part = group; part < group_end; ++part)
      sums.put(part - group, row.squares(part_begin(parts, part), part_end(parts, part)));
    __syncthreads();
#pragma unroll 1
    for (int part = group; part < group_end; ++part) {
      const float norm = fmaxf(__fsqrt_rn(sums.get(part - group)), 1e-12f);
      row.scale(part_begin(parts, part), part_end(parts, part), __fdiv_rn(1.f, norm));
    }
  }
}

template <class Row, class Matches, class Sums>
__device__ void apply_events(const Task& task, int position, Row& row, Events<Matches>& events,
                             Sums& sums) {
  using Bank = typename Row::Bank;
  using Feature = typename Row::Feature;
  const MemoryUpdate& update = task.update;
  Bank* const old = static_cast<Bank*>(update.bank.data) + events.row * update.bank.cols;
  const auto feature = [&](int event) {
    return static_cast<const Feature*>(update.features.data) + event * update.features.cols;
  };
  const auto keep = [&](int event) { return update.momenta ? update.momenta[event] : update.keep; };
  const auto take = [&](int event) {
    return update.momenta ? __fsub_rn(1.f, update.momenta[event]) : update.take;
  };
  typename Row::Fetched x;

  if (update.repeats == Repeats::sequential) {
    int event = events.next();
    row.fetch(x, feature(event));
    row.load(old);
    while (event >= 0) {
      const int following = events.next();
      typename Row::Fetched ahead = x;
      if (following >= 0) row.fetch(ahead, feature(following));
      row.blend(keep(event), x, take(event));
      if (update.normalize) normalize(row, update.parts, sums);
      x = ahead;
      event = following;
    }
  } else {
    if (update.repeats == Repeats::mean) {
      float count = 0.f, kept = 0.f;
      row.zero();
      for (int event = events.next(); event >= 0; event = events.next()) {
        row.fetch(x, feature(event));
        row.blend(1.f, x, take(event));
        kept = __fadd_rn(kept, keep(event));
        count += 1.f;
      }
      row.blend(__fdiv_rn(1.f, count), old, __fdiv_rn(kept, count));
    } else {
      int chosen = events.owner_event(position);
      row.load(old);
      if (update.repeats == Repeats::hardest) {
        float smallest = INFINITY;
        for (int event = events.next(); event >= 0; event = events.next()) {
          row.fetch(x, feature(event));
          sums.begin_round();
          sums.put(0, row.dot(x));
          __syncthreads();
          const float similarity = sums.get(0);
          if (similarity < smallest) {
            smallest = similarity;
            chosen = event;
          }
        }
      }
      row.fetch(x, feature(chosen));
      row.blend(keep(chosen), x, take(chosen));
    }
    if (update.normalize) normalize(row, update.parts, sums);
  }
  row.store(old);
}

template <class Row>
__global__ void __launch_bounds__(32 * kMaxWarps, Row::kMinBlocks)
    memory_update_kernel(const Task task) {
  PYREID_SHARED(float, partials, 2 * kPartGroup * kMaxWarps);
  PYREID_SHARED(uint32_t, matches, 2 * kMaxWarps);
  BlockSums<decltype(&partials[0])> sums{&partials[0]};
  Events<decltype(&matches[0])> events{task, &matches[0]};
  for (int position = blockIdx.x; position < task.update.rows.size; position += gridDim.x) {
    if (!events.start(position)) continue;
    Row row(task);
    apply_events(task, position, row, events, sums);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class Bank, class Feature>
void launch_update(Task& task, Stream stream) {
  const int64_t dim = task.update.bank.cols, events = task.update.rows.size;
  task.packs = aligned(task.update.bank.data) && aligned(task.update.features.data) &&
               dim % RegisterRow<Bank, Feature, kItems>::kPack == 0;
  const auto threads = [&](int items) {
    return std::min(32 * kMaxWarps, int((dim + 32 * items - 1) / (32 * items)) * 32);
  };
  if (dim <= 32 * kMaxWarps * kItems) {
    launch(kOp, memory_update_kernel<RegisterRow<Bank, Feature, kItems>>, events, threads(kItems),
           0, stream, task);
  } else if (dim <= 32 * kMaxWarps * kLongItems) {
    launch(kOp, memory_update_kernel<RegisterRow<Bank, Feature, kLongItems>>, events,
           threads(kLongItems), 0, stream, task);
  } else {
    launch(kOp, memory_update_kernel<MemoryRow<Bank, Feature>>,
           std::min<int64_t>(events, kMemoryBlocks), 32 * kMaxWarps, 0, stream, task);
  }
}

size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256; }

size_t row_scratch(const MemoryUpdate& update) {
  if (update.bank.cols <= 32 * kMaxWarps * kLongItems) return 0;
  return padded(sizeof(float) *
                size_t(std::min<int64_t>(update.rows.size, kMemoryBlocks) * update.bank.cols));
}

}  // namespace

size_t memory_update_workspace(const MemoryUpdate& update) {
  return row_scratch(update) + (update.rows.size > kScanned ? sort_workspace(update.rows.size) : 0);
}

void memory_update(const MemoryUpdate& update, void* workspace, Stream stream) {
  if (update.rows.size == 0 || update.bank.cols == 0) return;
  Task task{
      update, {nullptr, nullptr}, static_cast<float*>(workspace), int(update.bank.cols), false};
  if (update.rows.size > kScanned)
    task.sorted = sort_ids(kOp, update.rows, update.bank.rows,
                           static_cast<char*>(workspace) + row_scratch(update), stream);
  const Dtype bank = update.bank.dtype, features = update.features.dtype;
  if (bank == Dtype::float32) {
    if (features == Dtype::float32) return launch_update<float, float>(task, stream);
    if (features == Dtype::float16) return launch_update<float, Half>(task, stream);
    return launch_update<float, BFloat16>(task, stream);
  }
  if (bank == Dtype::float16) {
    if (features == Dtype::float32) return launch_update<Half, float>(task, stream);
    return launch_update<Half, Half>(task, stream);
  }
  if (features == Dtype::float32) return launch_update<BFloat16, float>(task, stream);
  return launch_update<BFloat16, BFloat16>(task, stream);
}

}  // namespace pyreid
