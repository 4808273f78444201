// The neighbours of every row among all rows. The matrix of products is symmetric, so only the half
// right of its diagonal is computed, strip by strip; each strip, still in the second cache, is
// selected from both ways: for the rows of the panel, and for the strip's own. Strips belong to one
// thread each; what they find for the panel's rows is handed in under a lock. Keys are distinct, so
// the best k are the same in whatever order they come.
//
// Where it pays, all this is done with 16-bit rows first, to rule out what cannot be among the best
// (cpu/knn_filter.h).

#include <atomic>
#include <cmath>
#include <mutex>
#include <vector>

#include "cpu/best_keys.h"
#include "cpu/knn_filter.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "ops.h"

namespace pyreid {
namespace {

// Rows of a panel: enough to pay for packing a strip, few enough that the square on the diagonal,
// which is computed twice, stays small.
constexpr int64_t kPanel = 768;
static_assert(kPanel % kColumns == 0 && kPanel % kRows == 0, "panels start where strips do");

struct Best {
  using Score = float;
  static constexpr float kUnreachable = INFINITY;

  Best(int64_t rows, int64_t k)
      : keep(k),
        capacity(k + std::max<int64_t>(k / 4, 64)),
        candidates(rows * capacity),
        thresholds(rows),
        counts(rows),
        bounds(rows) {
    for (std::atomic<float>& bound : bounds) bound.store(-INFINITY, std::memory_order_relaxed);
  }

  BestKeys of(int64_t row) {
    return {keep, capacity, candidates.data() + row * capacity, thresholds[row], counts[row]};
  }

  static uint64_t key_of(float score, int64_t row) {
    return mine_key(float_bits(score + 0.f), uint32_t(row));  // + 0: -0 and 0 are a tie
  }

  float bound(int64_t row) const { return bounds[row].load(std::memory_order_relaxed); }

  void add(int64_t row, uint64_t key) {
    BestKeys best = of(row);
    best.add(key);
    bounds[row].store(best.bound(), std::memory_order_relaxed);
  }

  bool settle(int64_t, int64_t) { return true; }

  const int64_t keep, capacity;
  std::vector<uint64_t> candidates, thresholds;
  std::vector<int32_t> counts;
  std::vector<std::atomic<float>> bounds;  // others read them while their owner moves them
};

struct Hit {
  int32_t row;  // in the panel
  uint64_t key;
};

// What the strip at hand knows of its own rows.
template <class Score>
struct Strip {
  int64_t first, count;
  bool both_ways;            // its rows lie right of the panel
  uint32_t there[kVectors];  // bit of a column: it is a row
  Score bounds[kColumns];    // unreachable where nothing is to be found
  float bias[kColumns];      // -infinity where there is no row: never the lowest
  float lowest[kColumns];
};

// Without a bias, `bias` is null.
template <bool kBias, class Lists>
void select(const std::vector<typename Lists::Score>& sums, int64_t panel, int64_t size,
            const float* bias, Strip<typename Lists::Score>& strip, Lists& best,
            std::vector<Hit>& hits, std::vector<float>& lowest) {
  using Score = typename Lists::Score;
  for (int64_t r = 0; r < size; ++r) {
    const Score* const scores = sums.data() + r * kColumns;
    const auto bound = all(best.bound(panel + r));
    const Vector own_bias = all(kBias ? bias[panel + r] : 0.f);
    Vector least = all(INFINITY);
    for (int v = 0; v < kColumns; v += kWidth) {
      auto across = load(scores + v), down = across;
      if constexpr (kBias) {
        across = subtract(across, load(strip.bias + v));
        down = subtract(down, own_bias);
        store(strip.lowest + v, smaller(load(strip.lowest + v), down));
        least = smaller(least, across);
      }
      // Once lists are full, few pass: what follows is for each of them.
      uint32_t passing = at_least(across, bound) & strip.there[v / kWidth];
      uint32_t passing_down = at_least(down, load(strip.bounds + v));
      if ((passing | passing_down) == 0) continue;
      for (; passing != 0; passing &= passing - 1) {
        const int j = v + __builtin_ctz(passing);
        const Score score = kBias ? scores[j] - Score(strip.bias[j]) : scores[j];
        hits.push_back({int32_t(r), Lists::key_of(score, strip.first + j)});
      }
      for (; passing_down != 0; passing_down &= passing_down - 1) {
        const int j = v + __builtin_ctz(passing_down);
        const Score score = kBias ? scores[j] - Score(bias[panel + r]) : scores[j];
        best.add(strip.first + j, Lists::key_of(score, panel + r));
        strip.bounds[j] = best.bound(strip.first + j);
      }
    }
    if constexpr (kBias) {
      float parts[kWidth];
      store(parts, least);
      lowest[r] = std::min(lowest[r], *std::min_element(parts, parts + kWidth));
    }
  }
}

// Gives every product of two of the rows to `best`. Rows of a panel, when it is done, have met all
// others; false if `best` would not go on.
template <class Products, class Lists>
bool compare_all(const ConstMatrix& features, const float* bias, Lists& best, float* lowest,
                 const std::function<void(int64_t)>& passed) {
  using Score = typename Lists::Score;
  const int64_t size = features.rows;
  std::mutex mutex;
  for (int64_t panel = 0; panel < size; panel += kPanel) {
    const int64_t count = std::min(kPanel, size - panel);
    const std::vector<float> left = pack_rows(rows_of(features, panel, count));
    const int64_t strips = (size - panel + kColumns - 1) / kColumns;
    parallel_for(strips, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> right, panel_lowest(count, INFINITY);
      std::vector<Score> sums;
      std::vector<Hit> hits;
      for (int64_t i = begin; i < end; ++i) {
        Strip<Score> strip;
        strip.first = panel + i * kColumns;
        strip.count = std::min<int64_t>(kColumns, size - strip.first);
        strip.both_ways = strip.first >= panel + count;
        std::fill_n(strip.there, kVectors, 0);
        for (int64_t j = 0; j < kColumns; ++j) {
          const bool there = j < strip.count;
          strip.there[j / kWidth] |= uint32_t(there) << j % kWidth;
          strip.bounds[j] =
              there && strip.both_ways ? best.bound(strip.first + j) : Lists::kUnreachable;
          strip.bias[j] = there && bias != nullptr ? bias[strip.first + j] : -INFINITY;
          strip.lowest[j] = INFINITY;
        }
        multiply_strip<Products>(left, count, features, strip.first, strip.count, right, sums);
        if (bias == nullptr) {
          select<false>(sums, panel, count, bias, strip, best, hits, panel_lowest);
        } else if constexpr (std::is_same_v<Score, float>) {
          select<true>(sums, panel, count, bias, strip, best, hits, panel_lowest);
          for (int64_t j = 0; strip.both_ways && j < strip.count; ++j)
            lowest[strip.first + j] = std::min(lowest[strip.first + j], strip.lowest[j]);
        }
        const std::lock_guard<std::mutex> lock(mutex);
        for (const Hit& hit : hits) best.add(panel + hit.row, hit.key);
        hits.clear();
      }
      if (bias == nullptr) return;
      const std::lock_guard<std::mutex> lock(mutex);
      for (int64_t r = 0; r < count; ++r)
        lowest[panel + r] = std::min(lowest[panel + r], panel_lowest[r]);
    });
    if (!best.settle(panel, count)) return false;
    if (passed) passed(panel + count);
  }
  return true;
}

// What it saves grows with the products of a row, what it costs with k. Times faster, k = 30, unit
// rows, on a core of Zen 5 (one that is busy elsewhere too gains more):
//
//   rows                       12,936                    4000         2000
//   columns                      2048   512   256   128  2048   512   2048   512
//   at random                    1.41  1.30  1.18  1.08  1.12  1.09   0.99  0.95
//   760 people, 17 images each   1.55  1.39  1.20  1.10
//
// Without VNNI, a pair of products takes two instructions, on many machines no gain at all.
//
// The 16-bit rows are a copy: of features that nearly fill the memory, or are mapped from a file,
// there is none.
bool filter_pays(const ConstMatrix& features, int64_t k) {
  constexpr int64_t kCopy = int64_t(1) << 28;  // bytes
  return has_vnni() && features.cols >= 256 && features.rows >= std::max<int64_t>(128 * k, 2048) &&
         features.rows * features.cols <= kCopy / int64_t(sizeof(int16_t));
}

// False where the rows are nothing for a filter.
bool filtered_knn(const ConstMatrix& features, const Ranks& ranks,
                  const std::function<void(int64_t)>& passed) {
  ShortRows brief;
  if (!shorten(features, brief)) return false;
  Windows windows(features.rows, ranks.keep, std::move(brief.slack));
  const auto compare = has_vnni() ? compare_all<VnniPairs, Windows> : compare_all<Pairs, Windows>;
  if (!compare(brief.matrix, nullptr, windows, nullptr, passed)) return false;
  windows.finish(features, ranks);
  return true;
}

}  // namespace

bool has_knn() { return true; }

void knn(const ConstMatrix& features, const float* bias, int64_t k, float* scores, int64_t* rows,
         float* lowest, const std::function<void(int64_t)>& passed, Stream) {
  const int64_t size = features.rows, mode = filter_state.mode;
  const Ranks ranks{std::min(k, size), k, scores, rows};
  if (bias == nullptr && size > 0 && (mode == 2 || (mode == 1 && filter_pays(features, k)))) {
    if (filtered_knn(features, ranks, passed)) return;
    filter_state.repeated += size;
  }
  Best best(size, ranks.keep);
  if (bias != nullptr) std::fill_n(lowest, size, INFINITY);
  compare_all<Floats>(features, bias, best, lowest, passed);
  parallel_for(size, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) ranks.write(row, best.of(row));
  });
}

}  // namespace pyreid
