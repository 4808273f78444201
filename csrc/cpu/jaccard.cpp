// The sparse stages after the neighbour lists. Rows are independent; a thread keeps one array of N
// accumulators and the list of those in use, so that a row costs what its entries cost.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "half.h"
#include "ops.h"

namespace pyreid {
namespace {

bool bit(const uint32_t* mask, int column) { return mask[column / 32] >> column % 32 & 1; }

float to_half(float value) { return widen(narrow<HostHalf>(value)); }

template <bool kHalf>
float rounded(float value) {
  return kHalf ? to_half(value) : value;
}

// Calls body(row, scratch of this thread) for rows [0, count).
template <class Scratch, class Body>
void for_rows(int64_t count, int64_t size, const Body& body) {
  parallel_for(count, 64, [&](int64_t begin, int64_t end) {
    Scratch scratch(size);
    for (int64_t row = begin; row < end; ++row) body(row, scratch);
  });
}

// A set of ids in [0, size) that is emptied at no cost.
class IdSet {
 public:
  explicit IdSet(int64_t size) : stamps_(size, 0) {}
  void clear() { ++stamp_; }
  bool has(int32_t id) const { return stamps_[id] == stamp_; }
  bool insert(int32_t id) {
    if (has(id)) return false;
    stamps_[id] = stamp_;
    return true;
  }

 private:
  std::vector<int32_t> stamps_;
  int32_t stamp_ = 0;
};

struct Expansion {
  explicit Expansion(int64_t size) : near(size), all(size) {}
  IdSet near, all;
  std::vector<int32_t> ids;
};

void expand_row(const RankLists& lists, const Reciprocity& rule, const uint32_t* masks, int64_t row,
                Expansion& found) {
  const int half_word = (rule.columns + 31) / 32;
  found.near.clear();
  found.all.clear();
  found.ids.clear();
  const int32_t* const list = lists.ids + row * lists.stride;
  const uint32_t* const mask = masks + row * rule.words();
  for (int c = 0; c < rule.columns; ++c) {
    if (!bit(mask, c)) continue;
    found.near.insert(list[c]);
    if (found.all.insert(list[c])) found.ids.push_back(list[c]);
  }
  for (int c = 0; rule.half > 0 && c < rule.columns; ++c) {
    if (!bit(mask, c)) continue;
    const int32_t* const other = lists.ids + list[c] * lists.stride;
    const uint32_t* const other_mask = masks + list[c] * rule.words() + half_word;
    int shared = 0, size = 0;
    for (int h = 0; h < rule.half; ++h) {
      if (!bit(other_mask, h)) continue;
      ++size;
      shared += found.near.has(other[h]);
    }
    if (3 * shared <= 2 * size) continue;
    for (int h = 0; h < rule.half; ++h)
      if (bit(other_mask, h) && found.all.insert(other[h])) found.ids.push_back(other[h]);
  }
}

template <class T>
void weights_of(const ConstMatrix& features, const Distances& distances, bool half,
                const SparseRows& sets, float* values) {
  const int64_t dim = features.cols;
  const T* const data = static_cast<const T*>(features.data);
  parallel_for(sets.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = sets.starts[i], last = sets.starts[i + 1];
      const float low = distances.low ? distances.low[i] : 0.f;
      const float span = distances.high ? distances.high[i] - low : 1.f;
      float nearest = INFINITY;
      for (int64_t e = first; e < last; ++e) {
        const int64_t j = sets.ids[e];
        const T *const a = data + i * dim, *const b = data + j * dim;
        const float dot = lane_sum(dim, [&](int64_t d) { return widen(a[d]) * widen(b[d]); });
        const float norms = distances.norms ? distances.norms[i] + distances.norms[j] : 2.f;
        values[e] = span > 0 ? (norms - 2 * dot - low) / span : 0.f;
        nearest = std::min(nearest, values[e]);
      }
      float total = 0.f;
      for (int64_t e = first; e < last; ++e) total += values[e] = std::exp(nearest - values[e]);
      for (int64_t e = first; e < last; ++e)
        values[e] = half ? to_half(values[e] / total) : values[e] / total;
    }
  });
}

// Sums by id. What is not above 0 is not there.
class Accumulators {
 public:
  explicit Accumulators(int64_t size) : sums_(size, 0.f) {}

  template <class Round, class Value>
  void add(int32_t id, Value value, Round round) {
    float& sum = sums_[id];
    if (sum == 0.f) touched_.push_back(id);
    sum = round(sum + value);
  }

  const std::vector<int32_t>& touched() const { return touched_; }
  float operator[](int32_t id) const { return sums_[id]; }

  // Ids in use, ascending: by sorting them, or, where they are many, by looking at all.
  const std::vector<int32_t>& sorted() {
    constexpr size_t kMany = 16;
    if (touched_.size() * kMany < sums_.size()) {
      std::sort(touched_.begin(), touched_.end());
    } else {
      touched_.clear();
      for (size_t id = 0; id < sums_.size(); ++id)
        if (sums_[id] > 0.f) touched_.push_back(int32_t(id));
    }
    return touched_;
  }

  void clear() {
    for (const int32_t id : touched_) sums_[id] = 0.f;
    touched_.clear();
  }

 private:
  std::vector<float> sums_;
  std::vector<int32_t> touched_;
};

template <bool kHalf>
void average_rows(const RankLists& lists, int64_t columns, const SparseRows& weights,
                  const SparseSink& means) {
  for_rows<Accumulators>(lists.rows, weights.rows, [&](int64_t i, Accumulators& sums) {
    int members = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const int32_t j = lists.ids[i * lists.stride + c];
      if (j < 0) continue;
      ++members;
      for (int64_t e = weights.starts[j]; e < weights.starts[j + 1]; ++e)
        if (weights.values[e] > 0.f)
          sums.add(weights.ids[e], weights.values[e], [](float sum) { return sum; });
    }
    if (means.counts != nullptr) {
      means.counts[i] = int32_t(sums.touched().size());
    } else {
      int64_t to = means.starts[i];
      for (const int32_t id : sums.sorted()) {
        means.ids[to] = id;
        means.values[to++] = rounded<kHalf>(sums[id] / float(members));
      }
    }
    sums.clear();
  });
}

template <bool kHalf>
void add_shared(const SparseRows& weights, const SparseRows& transposed, int64_t i,
                Accumulators& sums) {
  for (int64_t e = weights.starts[i]; e < weights.starts[i + 1]; ++e) {
    const float own = weights.values[e];
    const int32_t column = weights.ids[e];
    for (int64_t f = transposed.starts[column]; f < transposed.starts[column + 1]; ++f) {
      const float smaller = std::min(own, transposed.values[f]);
      if (smaller > 0.f) sums.add(transposed.ids[f], smaller, rounded<kHalf>);
    }
  }
}

template <bool kHalf>
float distance_of(float shared, bool clip) {
  const float ratio = rounded<kHalf>(shared / rounded<kHalf>(2.f - shared));
  const float distance = rounded<kHalf>(1.f - ratio);
  return clip && distance < 0.f ? 0.f : distance;
}

template <bool kHalf>
void graph_rows(const SparseRows& weights, const SparseRows& transposed, const MinSum& rule,
                const SparseSink& graph) {
  for_rows<Accumulators>(weights.rows, weights.rows, [&](int64_t i, Accumulators& sums) {
    add_shared<kHalf>(weights, transposed, i, sums);
    const auto kept = [&](float distance) {
      return distance <= rule.max_distance && distance < 1.f;
    };
    if (graph.counts != nullptr) {
      int32_t count = 0;
      for (const int32_t id : sums.touched())
        count += kept(distance_of<kHalf>(sums[id], rule.clip));
      graph.counts[i] = count;
    } else {
      int64_t to = graph.starts[i];
      for (const int32_t id : sums.sorted()) {
        const float distance = distance_of<kHalf>(sums[id], rule.clip);
        if (!kept(distance)) continue;
        graph.ids[to] = id;
        graph.values[to++] = distance;
      }
    }
    sums.clear();
  });
}

template <bool kHalf>
void block(const SparseRows& weights, const SparseRows& transposed, const MinSum& rule,
           int64_t rows, int64_t column, int64_t columns, float* distances) {
  for_rows<Accumulators>(rows, weights.rows, [&](int64_t i, Accumulators& sums) {
    add_shared<kHalf>(weights, transposed, i, sums);
    float* const line = distances + i * columns;
    std::fill_n(line, columns, 1.f);
    for (const int32_t id : sums.touched())
      if (id >= column && id < column + columns)
        line[id - column] = distance_of<kHalf>(sums[id], rule.clip);
    sums.clear();
  });
}

}  // namespace

void squared_norms(const char* op, const char* name, const ConstMatrix& features, float* norms,
                   Stream) {
  const auto all = [&](auto* data) {
    parallel_for(features.rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto* const row = data + i * features.cols;
        norms[i] =
            lane_sum(features.cols, [&](int64_t d) { return widen(row[d]) * widen(row[d]); });
        if (!std::isfinite(norms[i]))
          throw std::invalid_argument(
              std::string(op) + ": " + name + " must have rows of finite norm, got " +
              (std::isnan(norms[i]) ? "nan" : "inf") + " in row " + std::to_string(i));
      }
    });
  };
  switch (features.dtype) {
    case Dtype::float32:
      return all(static_cast<const float*>(features.data));
    case Dtype::float16:
      return all(static_cast<const HostHalf*>(features.data));
    default:
      return all(static_cast<const HostBFloat16*>(features.data));
  }
}

void reciprocal(const char* op, const RankLists& lists, const Reciprocity& rule, uint32_t* masks,
                Stream) {
  for (int64_t i = 0; i < lists.rows * lists.stride; ++i)
    if (lists.ids[i] < -1 || lists.ids[i] >= lists.rows)
      throw std::invalid_argument(std::string(op) + ": ranks must lie in [-1, " +
                                  std::to_string(lists.rows) + "), got " +
                                  std::to_string(lists.ids[i]));
  parallel_for(lists.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* const list = lists.ids + i * lists.stride;
      uint32_t* const mask = masks + i * rule.words();
      std::fill_n(mask, rule.words(), 0);
      // Marks columns first, ..., last - 1 in the words from `word` on.
      const auto mark = [&](int first, int last, int word) {
        for (int c = first; c < last; ++c) {
          if (list[c] < 0) continue;
          const int32_t* const other = lists.ids + list[c] * lists.stride;
          int found = 0;
          for (int o = first; o < last; ++o) found |= other[o] == i;
          mask[word + c / 32] |= uint32_t(found) << c % 32;
        }
      };
      mark(0, rule.split, 0);
      mark(rule.split, rule.columns, 0);
      mark(0, rule.half, (rule.columns + 31) / 32);
    }
  });
}

size_t expand_workspace(const RankLists&, const Reciprocity&) { return 0; }

void expand(const char*, const RankLists& lists, const Reciprocity& rule, const uint32_t* masks,
            const SparseSink& sets, void*, Stream) {
  for_rows<Expansion>(lists.rows, lists.rows, [&](int64_t i, Expansion& found) {
    expand_row(lists, rule, masks, i, found);
    if (sets.counts != nullptr) {
      sets.counts[i] = int32_t(found.ids.size());
    } else {
      std::sort(found.ids.begin(), found.ids.end());
      std::copy(found.ids.begin(), found.ids.end(), sets.ids + sets.starts[i]);
    }
  });
}

void jaccard_weights(const char*, const ConstMatrix& features, const Distances& distances,
                     bool half, const SparseRows& sets, float* values, Stream) {
  switch (features.dtype) {
    case Dtype::float32:
      return weights_of<float>(features, distances, half, sets, values);
    case Dtype::float16:
      return weights_of<HostHalf>(features, distances, half, sets, values);
    default:
      return weights_of<HostBFloat16>(features, distances, half, sets, values);
  }
}

void average(const char*, const RankLists& lists, int64_t columns, const SparseRows& weights,
             bool half, const SparseSink& means, Stream) {
  half ? average_rows<true>(lists, columns, weights, means)
       : average_rows<false>(lists, columns, weights, means);
}

size_t transpose_workspace(int64_t) { return 0; }

void transpose(const char*, const SparseRows& weights, int64_t entries, int64_t* starts,
               int32_t* ids, float* values, void*, Stream) {
  std::fill_n(starts, weights.rows + 1, 0);
  for (int64_t e = 0; e < entries; ++e) ++starts[weights.ids[e] + 1];
  std::partial_sum(starts, starts + weights.rows + 1, starts);
  std::vector<int64_t> next(starts, starts + weights.rows);
  for (int64_t i = 0; i < weights.rows; ++i) {
    for (int64_t e = weights.starts[i]; e < weights.starts[i + 1]; ++e) {
      const int64_t to = next[weights.ids[e]]++;
      ids[to] = int32_t(i);
      values[to] = weights.values[e];
    }
  }
}

void jaccard_rows(const char*, const SparseRows& weights, const SparseRows& transposed,
                  const MinSum& rule, const SparseSink& graph, Stream) {
  rule.half ? graph_rows<true>(weights, transposed, rule, graph)
            : graph_rows<false>(weights, transposed, rule, graph);
}

void jaccard_block(const char*, const SparseRows& weights, const SparseRows& transposed,
                   const MinSum& rule, int64_t rows, int64_t column, int64_t columns,
                   float* distances, Stream) {
  rule.half ? block<true>(weights, transposed, rule, rows, column, columns, distances)
            : block<false>(weights, transposed, rule, rows, column, columns, distances);
}

}  // namespace pyreid
