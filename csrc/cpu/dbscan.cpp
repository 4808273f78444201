// scikit-learn's search, from the smallest core sample of each cluster, on rows that are cut to
// what it needs. Counting neighbours is most of the work and is shared out to the threads; so are
// several eps. A dense matrix is read once: it becomes a bit per pair and eps.

#include <cstring>
#include <vector>

#include "cpu/graph.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "dbscan";

int64_t words(int64_t samples) { return (samples + 63) / 64; }

// Samples that no cluster has reached yet.
class Unreached {
 public:
  explicit Unreached(int64_t samples) : bits_(words(samples), ~uint64_t(0)) {}

  // Whether it was there.
  bool remove(int64_t sample) {
    uint64_t& word = bits_[sample / 64];
    const uint64_t bit = uint64_t(1) << sample % 64;
    const bool there = (word & bit) != 0;
    word &= ~bit;
    return there;
  }

  // Removes those of one word's `samples` that were there, and returns them.
  uint64_t remove_word(int64_t word, uint64_t samples) {
    samples &= bits_[word];
    bits_[word] &= ~samples;
    return samples;
  }

 private:
  std::vector<uint64_t> bits_;
};

template <class Index>
struct StoredRows {
  const Distances& graph;
  float eps;

  const Index* indices() const { return static_cast<const Index*>(graph.indices.data); }

  int64_t degree(int64_t row) const {
    const auto [begin, end] = row_at(graph, row);
    int64_t near = 0, itself = 0;
    for (int64_t i = begin; i < end; ++i) {
      near += graph.values[i] <= eps;
      itself += indices()[i] == row;
    }
    return near + (itself == 0);
  }

  template <class Visit>
  void reach(int64_t row, Unreached& unreached, Visit visit) const {
    const auto [begin, end] = row_at(graph, row);
    for (int64_t i = begin; i < end; ++i)
      if (graph.values[i] <= eps && unreached.remove(indices()[i])) visit(indices()[i]);
  }
};

struct DenseRows {
  int64_t samples;
  const uint64_t* bits;  // (N, words)

  int64_t degree(int64_t row) const {
    int64_t near = 0;
    for (int64_t w = 0; w < words(samples); ++w)
      near += __builtin_popcountll(bits[row * words(samples) + w]);
    return near;
  }

  template <class Visit>
  void reach(int64_t row, Unreached& unreached, Visit visit) const {
    for (int64_t w = 0; w < words(samples); ++w) {
      const uint64_t near = bits[row * words(samples) + w];
      if (near == 0) continue;
      for (uint64_t fresh = unreached.remove_word(w, near); fresh != 0; fresh &= fresh - 1)
        visit(64 * w + __builtin_ctzll(fresh));
    }
  }
};

// One bit for each of `count` <= 64 values that is at most eps.
uint64_t near_word(const float* values, int64_t count, float eps) {
  alignas(64) uint8_t near[64] = {};
  if (count == 64) {
    for (int i = 0; i < 64; ++i) near[i] = values[i] <= eps;
  } else {
    for (int64_t i = 0; i < count; ++i) near[i] = values[i] <= eps;
  }
  uint64_t word = 0;
  for (int part = 0; part < 8; ++part) {
    uint64_t eight = 0;  // byte k holds bit k; the product brings them together at the top
    for (int k = 0; k < 8; ++k) eight |= uint64_t(near[8 * part + k]) << 8 * k;
    word |= (eight * 0x0102040810204080ull >> 56) << 8 * part;
  }
  return word;
}

template <class Rows>
void search(const Rows& rows, const std::vector<uint8_t>& core, int64_t* labels) {
  const int64_t samples = int64_t(core.size());
  Unreached unreached(samples);
  std::vector<int64_t> waiting;
  std::fill(labels, labels + samples, -1);
  int64_t label = 0;
  for (int64_t seed = 0; seed < samples; ++seed) {
    if (!core[seed] || !unreached.remove(seed)) continue;
    labels[seed] = label;
    waiting.push_back(seed);
    while (!waiting.empty()) {
      const int64_t row = waiting.back();
      waiting.pop_back();
      rows.reach(row, unreached, [&](int64_t sample) {
        labels[sample] = label;
        if (core[sample]) waiting.push_back(sample);
      });
    }
    ++label;
  }
}

template <class RowsAt>
void run(const Dbscan& task, RowsAt rows_at) {
  const int64_t samples = task.distances.samples;
  std::vector<std::vector<uint8_t>> core(task.count, std::vector<uint8_t>(samples));
  constexpr int64_t kGrain = 512;
  parallel_for(samples, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int e = 0; e < task.count; ++e)
        core[e][row] = rows_at(e).degree(row) >= task.min_samples;
  });
  parallel_for(task.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e)
      search(rows_at(int(e)), core[e], task.labels + e * samples);
  });
}

void run_dense(const Dbscan& task, uint64_t* bits) {  // (count, N, words)
  const int64_t samples = task.distances.samples, width = words(samples);
  parallel_for(samples, 1 + (1 << 16) / samples, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int e = 0; e < task.count; ++e)
        for (int64_t w = 0; w < width; ++w)
          bits[(e * samples + row) * width + w] =
              near_word(task.distances.values + row * samples + 64 * w,
                        std::min<int64_t>(64, samples - 64 * w), task.eps[e]);
  });
  run(task, [&](int e) { return DenseRows{samples, bits + e * samples * width}; });
}

}  // namespace

size_t dbscan_workspace(const Dbscan& task) {
  const int64_t samples = task.distances.samples;
  if (task.distances.indptr.data != nullptr) return 0;
  return sizeof(uint64_t) * size_t(task.count * samples * words(samples));
}

void dbscan(const Dbscan& task, void* workspace, Stream) {
  const Distances& distances = task.distances;
  if (distances.indptr.data != nullptr) check_graph(kOp, distances);
  if (distances.samples == 0) return;
  if (distances.indptr.data == nullptr) {
    run_dense(task, static_cast<uint64_t*>(workspace));
  } else if (distances.indices.dtype == Dtype::int32) {
    run(task, [&](int e) { return StoredRows<int32_t>{distances, task.eps[e]}; });
  } else {
    run(task, [&](int e) { return StoredRows<int64_t>{distances, task.eps[e]}; });
  }
}

}  // namespace pyreid
