// The best rows so far of one query, as keys, among candidates that somebody else holds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "half.h"
#include "mine_key.h"

namespace pyreid {

class BestKeys {
 public:
  BestKeys(int64_t keep, int64_t capacity, uint64_t* candidates, uint64_t& threshold,
           int32_t& count)
      : keep_(keep),
        capacity_(capacity),
        candidates_(candidates),
        threshold_(threshold),
        count_(count) {}

  void start() {
    threshold_ = 0;
    count_ = 0;
  }

  // Scores below this one cannot count any more, nor equal ones if rows come in ascending order.
  float bound() const {
    return threshold_ == 0 ? -INFINITY : bits_float(key_score_bits(threshold_));
  }

  // -0 must have been made +0.
  void add(float score, int64_t row) { add(mine_key(float_bits(score), uint32_t(row))); }

  void add(uint64_t key) {
    if (count_ == capacity_) compact();
    if (key > threshold_) candidates_[count_++] = key;
  }

  // Only the best `keep` stay, at the front.
  void compact() {
    if (count_ < keep_) return;
    std::nth_element(candidates_, candidates_ + keep_ - 1, candidates_ + count_, std::greater<>());
    threshold_ = candidates_[keep_ - 1];
    count_ = int32_t(keep_);
  }

  void finish(int64_t skip, float* scores, int64_t* rows) {
    compact();
    std::sort(candidates_, candidates_ + count_, std::greater<>());
    for (int64_t rank = skip; rank < keep_; ++rank) {
      const bool found = rank < count_;
      scores[rank - skip] = found ? bits_float(key_score_bits(candidates_[rank])) : -INFINITY;
      rows[rank - skip] = found ? key_row(candidates_[rank]) : -1;
    }
  }

 private:
  const int64_t keep_, capacity_;
  uint64_t* const candidates_;
  uint64_t& threshold_;
  int32_t& count_;
};

}  // namespace pyreid
