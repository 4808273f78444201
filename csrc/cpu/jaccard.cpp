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

// Calls body(row, its place in the range, scratch of this thread).
template <class Scratch, class Body>
void for_rows(const RowRange& rows, int64_t size, const Body& body) {
  parallel_for(rows.count, 64, [&](int64_t begin, int64_t end) {
    Scratch scratch(size);
    for (int64_t place = begin; place < end; ++place) body(rows.first + place, place, scratch);
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
void weights_of(const ConstMatrix& features, const DistanceTerms& distances, bool half,
                const SparseRows& sets, int64_t first_row, float* values) {
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
        const T *const a = data + (first_row + i) * dim, *const b = data + j * dim;
        const float dot = lane_sum(dim, [&](int64_t d) { return widen(a[d]) * widen(b[d]); });
        const float norms =
            distances.norms ? distances.norms[first_row + i] + distances.norms[j] : 2.f;
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

// Sums by id, and the ids in use. What is not above 0 is not there.
class Accumulators {
 public:
  explicit Accumulators(int64_t size) : sums_(size, 0.f), touched_(size + 1) {}

  // Adds term(value) for each of `count` distinct ids, rounded. Which ids are new is hard to
  // foresee, so nothing branches on it.
  template <class Term, class Round>
  void add(const int32_t* ids, const float* values, int64_t count, Term term, Round round) {
    float* const sums = sums_.data();
    int32_t* const touched = touched_.data();
    int64_t in_use = count_;
    for (int64_t e = 0; e < count; ++e) {
      const int32_t id = ids[e];
      const float sum = sums[id], more = term(values[e]);
      touched[in_use] = id;
      in_use += (sum == 0.f) & (more > 0.f);
      sums[id] = round(sum + more);
    }
    count_ = in_use;
  }

  int64_t count() const { return count_; }

  template <class Body>
  void for_each(const Body& body) const {
    for (int64_t n = 0; n < count_; ++n) body(touched_[n], sums_[touched_[n]]);
  }

  // Ids whose sums are at least `least`, ascending: by sorting them, or, where they are many, by
  // looking at all.
  template <class Body>
  void for_each_sorted(float least, const Body& body) {
    constexpr int64_t kMany = 16;
    kept_.clear();
    for_each([&](int32_t id, float sum) {
      if (sum >= least) kept_.push_back(id);
    });
    if (int64_t(kept_.size()) * kMany < int64_t(sums_.size())) {
      std::sort(kept_.begin(), kept_.end());
      for (const int32_t id : kept_) body(id, sums_[id]);
    } else {
      for (size_t id = 0; id < sums_.size(); ++id)
        if (sums_[id] > 0.f && sums_[id] >= least) body(int32_t(id), sums_[id]);
    }
  }

  void clear() {
    for (int64_t n = 0; n < count_; ++n) sums_[touched_[n]] = 0.f;
    count_ = 0;
  }

 private:
  std::vector<float> sums_;
  std::vector<int32_t> touched_, kept_;
  int64_t count_ = 0;
};

template <bool kHalf>
void average_rows(const RankLists& lists, int64_t columns, const SparseRows& weights,
                  const RowRange& rows, const SparseSink& means) {
  for_rows<Accumulators>(rows, weights.rows, [&](int64_t i, int64_t place, Accumulators& sums) {
    int members = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const int32_t j = lists.ids[i * lists.stride + c];
      if (j < 0) continue;
      ++members;
      const int64_t first = weights.starts[j];
      sums.add(
          weights.ids + first, weights.values + first, weights.starts[j + 1] - first,
          [](float value) { return value; }, rounded<false>);
    }
    if (means.counts != nullptr) {
      means.counts[place] = int32_t(sums.count());
    } else {
      int64_t to = means.starts[place];
      sums.for_each_sorted(0.f, [&](int32_t id, float sum) {
        means.ids[to] = id;
        means.values[to++] = rounded<kHalf>(sum / float(members));
      });
    }
    sums.clear();
  });
}

template <bool kHalf>
void add_shared(const SparseRows& weights, const SparseRows& transposed, int64_t i,
                Accumulators& sums) {
  for (int64_t e = weights.starts[i]; e < weights.starts[i + 1]; ++e) {
    const float own = weights.values[e];
    const int64_t first = transposed.starts[weights.ids[e]];
    const int64_t last = transposed.starts[weights.ids[e] + 1];
    sums.add(
        transposed.ids + first, transposed.values + first, last - first,
        [own](float value) { return std::min(own, value); }, rounded<kHalf>);
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
                const RowRange& rows, const SparseSink& graph) {
  // A sum below this one is of a pair too far apart, whatever rounding does to the distance.
  constexpr float kSlack = kHalf ? 0.01f : 1e-4f;
  const float most = std::min(rule.max_distance, 1.f);
  const float least = 2.f * (1.f - most) / (2.f - most) - kSlack;
  for_rows<Accumulators>(rows, weights.rows, [&](int64_t i, int64_t place, Accumulators& sums) {
    int32_t* ids = graph.slot_ids + place * graph.slots;
    float* values = graph.slot_values + place * graph.slots;
    int64_t room = graph.slots, count = 0;
    if (graph.counts == nullptr) {
      int32_t* const to_ids = graph.ids + graph.starts[place];
      float* const to_values = graph.values + graph.starts[place];
      const int64_t size = graph.starts[place + 1] - graph.starts[place];
      if (size <= room) {
        std::copy_n(ids, size, to_ids);
        std::copy_n(values, size, to_values);
        return;
      }
      ids = to_ids, values = to_values, room = size;
    }
    add_shared<kHalf>(weights, transposed, i, sums);
    sums.for_each_sorted(least, [&](int32_t id, float shared) {
      const float distance = distance_of<kHalf>(shared, rule.clip);
      if (distance > rule.max_distance || distance >= 1.f) return;
      if (count < room) {
        ids[count] = id;
        values[count] = distance;
      }
      ++count;
    });
    if (graph.counts != nullptr) graph.counts[place] = int32_t(count);
    sums.clear();
  });
}

template <bool kHalf>
void block(const SparseRows& weights, const SparseRows& transposed, const MinSum& rule,
           const RowRange& rows, int64_t column, int64_t columns, float* distances) {
  for_rows<Accumulators>(rows, weights.rows, [&](int64_t i, int64_t place, Accumulators& sums) {
    add_shared<kHalf>(weights, transposed, i, sums);
    float* const line = distances + place * columns;
    std::fill_n(line, columns, 1.f);
    sums.for_each([&](int32_t id, float shared) {
      if (id >= column && id < column + columns)
        line[id - column] = distance_of<kHalf>(shared, rule.clip);
    });
    sums.clear();
  });
}

}  // namespace

void squared_norms(const char* op, const char* name, const ConstMatrix& features, int64_t first,
                   float* norms, Stream) {
  const auto all = [&](auto* data) {
    parallel_for(features.rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto* const row = data + i * features.cols;
        norms[i] =
            lane_sum(features.cols, [&](int64_t d) { return widen(row[d]) * widen(row[d]); });
        if (!std::isfinite(norms[i]))
          throw std::invalid_argument(
              std::string(op) + ": " + name + " must have rows of finite norm, got " +
              (std::isnan(norms[i]) ? "nan" : "inf") + " in row " + std::to_string(first + i));
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
            const RowRange& rows, const SparseSink& sets, void*, Stream) {
  for_rows<Expansion>(rows, lists.rows, [&](int64_t i, int64_t place, Expansion& found) {
    expand_row(lists, rule, masks, i, found);
    if (sets.counts != nullptr) {
      sets.counts[place] = int32_t(found.ids.size());
    } else {
      std::sort(found.ids.begin(), found.ids.end());
      std::copy(found.ids.begin(), found.ids.end(), sets.ids + sets.starts[place]);
    }
  });
}

void jaccard_weights(const char*, const ConstMatrix& features, const DistanceTerms& distances,
                     bool half, const SparseRows& sets, int64_t first, float* values, Stream) {
  switch (features.dtype) {
    case Dtype::float32:
      return weights_of<float>(features, distances, half, sets, first, values);
    case Dtype::float16:
      return weights_of<HostHalf>(features, distances, half, sets, first, values);
    default:
      return weights_of<HostBFloat16>(features, distances, half, sets, first, values);
  }
}

void average(const char*, const RankLists& lists, int64_t columns, const SparseRows& weights,
             bool half, const RowRange& rows, const SparseSink& means, Stream) {
  half ? average_rows<true>(lists, columns, weights, rows, means)
       : average_rows<false>(lists, columns, weights, rows, means);
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
                  const MinSum& rule, const RowRange& rows, const SparseSink& graph, Stream) {
  rule.half ? graph_rows<true>(weights, transposed, rule, rows, graph)
            : graph_rows<false>(weights, transposed, rule, rows, graph);
}

void jaccard_block(const char*, const SparseRows& weights, const SparseRows& transposed,
                   const MinSum& rule, const RowRange& rows, int64_t column, int64_t columns,
                   float* distances, Stream) {
  rule.half ? block<true>(weights, transposed, rule, rows, column, columns, distances)
            : block<false>(weights, transposed, rule, rows, column, columns, distances);
}

}  // namespace pyreid
