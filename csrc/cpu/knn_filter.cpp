#include "cpu/knn_filter.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "cpu/best_keys.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace pyreid {

FilterState filter_state;

// --- 16-bit rows
// ----------------------------------------------------------------------------------

namespace {

constexpr double kLongest = 46340;  // of a 16-bit row: its square is below 2^31
constexpr int64_t kMostColumns = 1 << 20;

template <class T>
void widen_row(const ConstMatrix& features, int64_t row, float* to) {
  const T* const from = static_cast<const T*>(features.data) + row * features.cols;
  for (int64_t i = 0; i < features.cols; ++i) to[i] = widen(from[i]);
}

void widen_row(const ConstMatrix& features, int64_t row, float* to) {
  switch (features.dtype) {
    case Dtype::float32:
      return widen_row<float>(features, row, to);
    case Dtype::float16:
      return widen_row<HostHalf>(features, row, to);
    default:
      return widen_row<HostBFloat16>(features, row, to);
  }
}

}  // namespace

bool shorten(const ConstMatrix& features, ShortRows& result) {
  const int64_t size = features.rows, dim = features.cols;
  if (dim == 0 || dim > kMostColumns) return false;
  // Of each row: its squared length, and its largest value.
  std::vector<float> lengths(size), extremes(size);
  parallel_for(size, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> line(dim);
    for (int64_t row = begin; row < end; ++row) {
      widen_row(features, row, line.data());
      lengths[row] = lane_sum(dim, [&](int64_t i) { return line[i] * line[i]; });
      for (float& value : line) value = std::fabs(value);
      extremes[row] = lane_max(dim, line.data());
    }
  });
  double longest = 0, extreme = 0;
  for (int64_t row = 0; row < size; ++row) {
    if (!std::isfinite(lengths[row])) return false;
    longest = std::max(longest, std::sqrt(double(lengths[row])));
    extreme = std::max(extreme, double(extremes[row]));
  }
  // Within these limits neither products nor what underflows in them come near those of float32.
  if (!(longest > 0x1p-30 && longest < 0x1p30)) return false;
  const double wanted = kLongest - std::sqrt(double(dim)) / 2 - 8;  // rounding adds to the length
  const float factor = float(std::min(wanted / longest, 32000 / extreme));

  const int64_t words = (dim + 1) / 2;
  result.pairs.reset(new float[size * words]);
  result.matrix = {result.pairs.get(), Dtype::float32, size, words};
  std::vector<double> left(size), right(size);         // at least |x_i| and |d_i|
  const double more = 1 + double(dim + 16) * 0x1p-24;  // what float32 sums of squares may lack
  parallel_for(size, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> line(dim), rest(dim);
    std::vector<int16_t> whole(2 * words);
    for (int64_t row = begin; row < end; ++row) {
      widen_row(features, row, line.data());
      for (int64_t i = 0; i < dim; ++i) {
        constexpr float kRound = 0x1.8p23f;  // leaves no bits below one
        line[i] *= factor;
        const float rounded = (line[i] + kRound) - kRound;
        rest[i] = line[i] - rounded;
        whole[i] = int16_t(rounded);
      }
      std::memcpy(result.pairs.get() + row * words, whole.data(), words * sizeof(float));
      const auto length = [&](const std::vector<float>& values) {
        return std::sqrt(more * lane_sum(dim, [&](int64_t i) { return values[i] * values[i]; }));
      };
      left[row] = length(line) * (1 + 0x1p-20);
      right[row] = length(rest) + left[row] * 0x1p-24;
    }
  });
  const double n = *std::max_element(left.begin(), left.end());
  const double r = *std::max_element(right.begin(), right.end());
  if (n + r > kLongest) return false;
  const double roundings = double(dim + 2) * 0x1p-24, gamma = roundings / (1 - roundings);
  result.slack.resize(size);
  for (int64_t row = 0; row < size; ++row) {
    const double e = right[row] * n + left[row] * r + right[row] * r + gamma * left[row] * n + 1;
    result.slack[row] = int32_t(std::min(std::ceil(2 * e), double(INT32_MAX)));
  }
  return true;
}

// --- windows
// --------------------------------------------------------------------------------------

namespace {

constexpr int64_t kRoom = 64;  // for new ones, until what is there is sorted out

}  // namespace

Windows::Windows(int64_t rows, int64_t k, std::vector<int32_t> slack)
    : rows_(rows),
      keep_(std::min(k, rows)),
      capacity_(keep_ + std::max<int64_t>(keep_, 2 * kRoom)),
      slack_(std::move(slack)),
      keys_(new uint64_t[rows * capacity_]),
      counts_(rows),
      limits_(rows, int32_t(keep_ + kRoom)),
      lost_(rows, INT32_MIN),
      bounds_(rows) {
  for (std::atomic<int32_t>& bound : bounds_) bound.store(INT32_MIN, std::memory_order_relaxed);
}

void Windows::add(int64_t row, uint64_t key) {
  if (counts_[row] == limits_[row]) compact(row);
  if (score_of(key) >= bound(row)) keys_[row * capacity_ + counts_[row]++] = key;
}

void Windows::compact(int64_t row) {
  if (counts_[row] < keep_) return;
  uint64_t* const keys = keys_.get() + row * capacity_;
  uint64_t* const kth = keys + keep_ - 1;
  uint64_t* end = keys + counts_[row];
  std::nth_element(keys, kth, end, std::greater<>());
  const int64_t least = int64_t(score_of(*kth)) - slack_[row];
  const int32_t bound = int32_t(std::max<int64_t>(least, INT32_MIN));
  end = std::partition(kth, end, [=](uint64_t key) { return score_of(key) >= bound; });
  const int64_t most = capacity_ - kRoom;
  if (end - keys > most) {
    std::nth_element(kth, keys + most - 1, end, std::greater<>());
    lost_[row] = score_of(keys[most - 1]);
    end = keys + most;
  }
  counts_[row] = int32_t(end - keys);
  limits_[row] = int32_t(counts_[row] + kRoom);
  bounds_[row].store(std::max(bound, lost_[row]), std::memory_order_relaxed);
}

bool Windows::settle(int64_t first, int64_t count) {
  parallel_for(count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = first + begin; row < first + end; ++row) {
      compact(row);
      uint64_t* const keys = keys_.get() + row * capacity_;
      std::sort(keys, keys + counts_[row], std::greater<>());
      if (lost_[row] == INT32_MIN || lost_[row] < bound(row)) continue;
      bounds_[row].store(kUnreachable, std::memory_order_relaxed);
      counts_[row] = 0;
      failed_.fetch_add(1, std::memory_order_relaxed);
    }
  });
  return failed_ <= rows_ / 8;
}

// Rows that have not failed, in groups of up to kRows that share many of what they have kept: the
// first row that is left and its nearest that are. starts[g] = where group g starts in the result.
std::vector<int32_t> Windows::grouped(std::vector<int64_t>& starts) const {
  std::vector<int32_t> order;
  order.reserve(rows_);
  std::vector<uint8_t> taken(rows_);
  for (int64_t row = 0; row < rows_; ++row) taken[row] = has_failed(row);
  starts.assign(1, 0);
  for (int64_t row = 0; row < rows_; ++row) {
    if (taken[row]) continue;
    const auto take = [&](int64_t next) {
      if (taken[next]) return;
      taken[next] = 1;
      order.push_back(int32_t(next));
    };
    take(row);
    const uint64_t* const keys = keys_.get() + row * capacity_;
    for (int64_t i = 0; i < counts_[row] && int64_t(order.size()) < starts.back() + kRows; ++i)
      take(key_row(keys[i]));
    starts.push_back(int64_t(order.size()));
  }
  return order;
}

// Two rows that have kept each other are multiplied once, by the group that comes first.
void Windows::score_kept(const ConstMatrix& features, const std::vector<int64_t>& ends,
                         uint64_t* found) {
  std::vector<int64_t> starts;
  const std::vector<int32_t> order = grouped(starts);
  const int64_t groups = int64_t(starts.size()) - 1;
  std::vector<int32_t> group_of(rows_);
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t i = starts[group]; i < starts[group + 1]; ++i) group_of[order[i]] = int32_t(group);
  std::vector<std::atomic<int32_t>> left_over(rows_);  // free places before the end of a row's
  for (int64_t row = 0; row < rows_; ++row)
    left_over[row].store(counts_[row], std::memory_order_relaxed);
  const auto hand_in = [&](int64_t row, float score, int64_t other) {
    const int32_t place = left_over[row].fetch_sub(1, std::memory_order_relaxed);
    found[ends[row] - place] = mine_key(float_bits(score), uint32_t(other));
  };

  parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
    struct Wanted {
      uint8_t askers = 0, mutual = 0;  // bit r: row r of the group has kept it; it has kept row r
    };
    static_assert(kRows <= 8);
    std::vector<float> left(kRows * features.cols), right, sums;
    std::vector<int32_t> ids, places(rows_, -1);
    std::vector<Wanted> wanted;
    for (int64_t group = begin; group < end; ++group) {
      const int32_t* const members = order.data() + starts[group];
      const int64_t count = starts[group + 1] - starts[group];
      for (int64_t r = 0; r < count; ++r) {
        const uint64_t* const keys = keys_.get() + members[r] * capacity_;
        for (int64_t i = 0; i < counts_[members[r]]; ++i) {
          const int64_t row = key_row(keys[i]);
          const bool mutual = score_of(keys[i]) >= bound(row);
          if (mutual && group_of[row] < group) continue;
          if (places[row] < 0) {
            places[row] = int32_t(ids.size());
            ids.push_back(int32_t(row));
            wanted.emplace_back();
          }
          wanted[places[row]].askers |= uint8_t(1 << r);
          wanted[places[row]].mutual |= uint8_t(int(mutual && group_of[row] > group) << r);
        }
      }
      pack<kRows>(features, 0, count, 0, features.cols, left.data(), members);
      for (size_t first = 0; first < ids.size(); first += kColumns) {
        const int64_t some = std::min<int64_t>(kColumns, ids.size() - first);
        multiply_strip<Floats>(left, count, features, first, some, right, sums, ids.data());
        for (int64_t j = 0; j < some; ++j) {
          const Wanted& pairs = wanted[first + j];
          for (unsigned bits = pairs.askers; bits != 0; bits &= bits - 1) {
            const int r = __builtin_ctz(bits);
            const float score = sums[r * kColumns + j] + 0.f;  // + 0: -0 and 0 are a tie
            hand_in(members[r], score, ids[first + j]);
            if (pairs.mutual >> r & 1) hand_in(ids[first + j], score, members[r]);
          }
        }
      }
      for (const int32_t row : ids) places[row] = -1;
      ids.clear();
      wanted.clear();
    }
  });
}

void Windows::score_failed(const ConstMatrix& features, const Ranks& ranks) {
  std::vector<int32_t> failed;
  for (int64_t row = 0; row < rows_; ++row)
    if (has_failed(row)) failed.push_back(int32_t(row));
  const int64_t groups = (int64_t(failed.size()) + kRows - 1) / kRows;
  parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
    const int64_t capacity = keep_ + std::max<int64_t>(keep_ / 4, 64);
    std::vector<float> left(kRows * features.cols), right, sums;
    std::vector<uint64_t> candidates(kRows * capacity), thresholds(kRows);
    std::vector<int32_t> counts(kRows);
    for (int64_t group = begin; group < end; ++group) {
      const int32_t* const members = failed.data() + group * kRows;
      const int64_t count = std::min<int64_t>(kRows, failed.size() - group * kRows);
      std::vector<BestKeys> best;
      for (int64_t r = 0; r < count; ++r) {
        best.emplace_back(keep_, capacity, &candidates[r * capacity], thresholds[r], counts[r]);
        best.back().start();
      }
      pack<kRows>(features, 0, count, 0, features.cols, left.data(), members);
      for (int64_t first = 0; first < rows_; first += kColumns) {
        const int64_t some = std::min<int64_t>(kColumns, rows_ - first);
        multiply_strip<Floats>(left, count, features, first, some, right, sums);
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t j = 0; j < some; ++j) {
            const float score = sums[r * kColumns + j] + 0.f;
            if (score >= best[r].bound()) best[r].add(score, first + j);
          }
        }
      }
      for (int64_t r = 0; r < count; ++r) ranks.write(members[r], best[r]);
    }
  });
}

void Windows::finish(const ConstMatrix& features, const Ranks& ranks) {
  std::vector<int64_t> ends(rows_);
  int64_t total = 0;
  for (int64_t row = 0; row < rows_; ++row) ends[row] = total += counts_[row];
  const std::unique_ptr<uint64_t[]> found(new uint64_t[total]);
  score_kept(features, ends, found.get());
  parallel_for(rows_, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (has_failed(row)) continue;
      uint64_t threshold = 0;
      int32_t count = counts_[row];
      ranks.write(row, {keep_, count, found.get() + ends[row] - count, threshold, count});
    }
  });
  score_failed(features, ranks);
  filter_state.filtered += rows_ - failed_;
  filter_state.repeated += failed_;
}

}  // namespace pyreid
