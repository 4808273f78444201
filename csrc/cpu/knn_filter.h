// The half-precision filter of knn: products of 16-bit rows, and which pairs of rows they rule out.
//
// Let x be the rows times one factor, so that the longest is about 46,300 long; q = x rounded to
// integers; d = x - q. Sums of products of 16-bit integers are exact in 32 bits, as no sum exceeds
// |q_i| |q_j| < 2^31. What is sought are the float32 products s_ij, a chain of D roundings each; in
// units of the factor squared
//
//   |s_ij - <q_i, q_j>| <= |<d_i, x_j> + <x_i, d_j> - <d_i, d_j>| + gamma |x_i| |x_j|
//                       <= e_i := |d_i| n + |x_i| r + |d_i| r + gamma |x_i| n
//
// by Cauchy-Schwarz, with n and r the largest |x_j| and |d_j|, gamma = (D + 2) u / (1 - (D + 2) u),
// u = 2^-24. If K is the k-th largest <q_i, q_j> of row i, then k rows have s >= K - e_i; a row
// with <q_i, q_j> < K - 2 e_i has s < K - e_i, so it is none of the best k, not even by a tie. All
// others are kept, and scored in float32 by the same arithmetic as without a filter. Where there is
// no room for all, the lowest are lost; if in the end one of these is not ruled out, the row has
// failed, and is compared with all rows instead.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/best_keys.h"
#include "tensor.h"

namespace pyreid {

// How many rows the filter has served, and how many of them had to be compared with all others.
// `mode`: 0 never, 1 where it pays, 2 always, for tests.
struct FilterState {
  std::atomic<int64_t> mode{1}, filtered{0}, repeated{0};
};
extern FilterState filter_state;

// Where the best rows go: (N, k), -inf and -1 beyond the `keep` there are.
struct Ranks {
  int64_t keep, k;
  float* scores;
  int64_t* rows;

  void write(int64_t row, BestKeys best) const {
    best.finish(0, scores + row * k, rows + row * k);
    std::fill(scores + row * k + keep, scores + (row + 1) * k, -INFINITY);
    std::fill(rows + row * k + keep, rows + (row + 1) * k, -1);
  }
};

struct ShortRows {
  std::unique_ptr<float[]> pairs;  // [rows][cols / 2, rounded up]: two int16 in each float's place
  ConstMatrix matrix;              // a view of them
  std::vector<int32_t> slack;      // [rows] at least 2 e_i
};

// False where the rows' lengths do not suit: zero, not finite, or out of all proportion.
bool shorten(const ConstMatrix& features, ShortRows& rows);

// Of each row, the rows that may be among its best k, given all of its products with 16-bit rows,
// as keys in any order.
class Windows {
 public:
  using Score = int32_t;
  static constexpr int32_t kUnreachable = INT32_MAX;

  Windows(int64_t rows, int64_t k, std::vector<int32_t> slack);

  static uint64_t key_of(int32_t score, int64_t row) {
    return uint64_t(uint32_t(score) ^ 0x80000000u) << 32 | uint32_t(~uint32_t(row));
  }
  static int32_t score_of(uint64_t key) { return int32_t(uint32_t(key >> 32) ^ 0x80000000u); }

  // Scores below it are ruled out.
  int32_t bound(int64_t row) const { return bounds_[row].load(std::memory_order_relaxed); }

  void add(int64_t row, uint64_t key);

  // These rows have met all others. False if so many have failed that a filter is a waste.
  bool settle(int64_t first, int64_t count);

  // Scores in float32 of what is left, the best k of each row in order.
  void finish(const ConstMatrix& features, const Ranks& ranks);

 private:
  void compact(int64_t row);
  bool has_failed(int64_t row) const { return bound(row) == kUnreachable; }
  std::vector<int32_t> grouped(std::vector<int64_t>& starts) const;
  void score_kept(const ConstMatrix& features, const std::vector<int64_t>& ends, uint64_t* found);
  void score_failed(const ConstMatrix& features, const Ranks& ranks);

  const int64_t rows_, keep_, capacity_;
  const std::vector<int32_t> slack_;
  std::unique_ptr<uint64_t[]> keys_;  // [rows][capacity]
  std::vector<int32_t> counts_, limits_;
  std::vector<int32_t> lost_;                 // no score that found no room exceeds it
  std::vector<std::atomic<int32_t>> bounds_;  // others read them while their owner moves them
  std::atomic<int64_t> failed_{0};
};

}  // namespace pyreid
