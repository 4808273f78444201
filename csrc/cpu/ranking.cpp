// Counts what is ahead of each match while the scores of one query go by, a block of them at a
// time. Few matches: the whole block is compared with each, many scores at once. Many: a score is
// placed among the matches by bisection, and only if it is ahead of the last of them.

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/group.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace pyreid {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int64_t kFew = 64;

struct Match {
  float score;
  int64_t row;

  bool operator<(const Match& other) const {
    return score > other.score || (score == other.score && row < other.row);
  }
};

// Sums of int32: as wide as the scores, so that both fill the same vectors.
int32_t count_above(const float* scores, int64_t size, float bound) {
  int32_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += scores[i] > bound;
  return count;
}

int32_t count_at_least(const float* scores, int64_t size, float bound) {
  int32_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += scores[i] >= bound;
  return count;
}

class Ranker {
 public:
  explicit Ranker(const RankInput& input)
      : input_(input), ids_(input.gallery_ids.size), junk_(input.gallery_ids.size) {
    for (size_t row = 0; row < ids_.size(); ++row) {
      ids_[row] = id_at(input.gallery_ids, int64_t(row));
      junk_[row] = ids_[row] < 0 ? NAN : 0.f;
    }
  }

  // The query's matches in their order, and how many rows of the gallery are ahead of each.
  struct Found {
    std::vector<Match> matches;
    std::vector<int64_t> ahead;  // beyond the matches: rows behind them all
    std::vector<float> bounds;
    std::vector<int64_t> same_view;  // rows that are left out for this query
  };

  void rank(int64_t query, Found& found) const {
    const float* const scores = input_.scores + query * int64_t(ids_.size());
    find(query, scores, found);
    const int64_t count = int64_t(found.matches.size()), size = int64_t(ids_.size());
    if (count == 0) return;
    size_t room = 1;
    while (room <= size_t(count)) room *= 2;
    found.ahead.assign(room, 0);
    found.bounds.assign(room, -INFINITY);
    for (int64_t i = 0; i < count; ++i) found.bounds[i] = found.matches[i].score;
    float block[kBlock];
    auto left_out = found.same_view.begin();
    for (int64_t begin = 0; begin < size; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, size);
      for (int64_t row = begin; row < end; ++row)
        block[row - begin] = comparable(scores[row]) + junk_[row];
      for (; left_out != found.same_view.end() && *left_out < end; ++left_out)
        block[*left_out - begin] = NAN;  // neither above anything nor equal to it
      if (count <= kFew) {
        compare_each(block, begin, end - begin, found);
      } else {
        bisect(block, begin, end - begin, found);
      }
    }
    if (count > kFew)
      for (int64_t i = 1; i < count; ++i) found.ahead[i] += found.ahead[i - 1];
  }

 private:
  // The larger, the earlier.
  float comparable(float score) const {
    const float value = input_.are_distances ? -score : score;
    return value == value ? value : -INFINITY;
  }

  void find(int64_t query, const float* scores, Found& found) const {
    const int64_t id = id_at(input_.query_ids, query), size = int64_t(ids_.size());
    const int64_t camera = id_at(input_.query_cameras, query);
    found.matches.clear();
    found.same_view.clear();
    if (id < 0) return;
    for (int64_t begin = 0; begin < size; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, size);
      int64_t equal = 0;
      for (int64_t row = begin; row < end; ++row) equal += ids_[row] == id;
      for (int64_t row = begin; equal > 0; ++row) {
        if (ids_[row] != id) continue;
        --equal;
        if (id_at(input_.gallery_cameras, row) == camera) {
          found.same_view.push_back(row);
        } else {
          found.matches.push_back({comparable(scores[row]), row});
        }
      }
    }
    std::sort(found.matches.begin(), found.matches.end());
  }

  static void compare_each(const float* block, int64_t begin, int64_t size, Found& found) {
    for (size_t i = 0; i < found.matches.size(); ++i) {
      const Match& match = found.matches[i];
      const int64_t below = std::clamp<int64_t>(match.row - begin, 0, size);  // these win ties
      found.ahead[i] += count_at_least(block, below, match.score) +
                        count_above(block + below, size - below, match.score);
    }
  }

  // Counts a row at the first match that it is ahead of. `bounds` are the matches' scores, then
  // -inf up to a power of two: so a step is the same for all rows, which take it together.
  static void bisect(const float* block, int64_t begin, int64_t size, Found& found) {
    const float* const bounds = found.bounds.data();
    int32_t place[kBlock] = {};
    for (int32_t step = int32_t(found.bounds.size() / 2); step > 0; step /= 2)
      for (int64_t i = 0; i < size; ++i)
        place[i] += bounds[place[i] + step - 1] <= block[i] ? 0 : step;
    for (int64_t i = 0; i < size; ++i) {
      int64_t first = place[i];
      if (bounds[first] == block[i]) {
        const Match row{block[i], begin + i};
        first = std::upper_bound(found.matches.begin() + first, found.matches.end(), row) -
                found.matches.begin();
      }
      ++found.ahead[first];
    }
  }

  const RankInput& input_;
  std::vector<int64_t> ids_;
  std::vector<float> junk_;  // added to scores: NaN for rows that are no part of the gallery
};

}  // namespace

void rank_matches(const RankInput& input, const RankOutput& output, Stream) {
  const Ranker ranker(input);
  parallel_for(input.query_ids.size, 1 + 16384 / std::max<int64_t>(input.gallery_ids.size, 1),
               [&](int64_t begin, int64_t end) {
                 Ranker::Found found;
                 for (int64_t query = begin; query < end; ++query) {
                   ranker.rank(query, found);
                   const int64_t count = int64_t(found.matches.size());
                   double sum = 0;
                   for (int64_t i = 0; i < count; ++i)
                     sum += double(i + 1) / double(found.ahead[i] + 1);
                   const bool any = count > 0;
                   output.first[query] = any ? found.ahead.front() + 1 : 0;
                   output.ap[query] = any ? float(sum / double(count)) : 0.f;
                   output.inp[query] =
                       any ? float(double(count) / double(found.ahead[count - 1] + 1)) : 0.f;
                 }
               });
}

}  // namespace pyreid
