// The rows that one sample may draw, as places in the rows sorted by group: shared by the floors.
#pragma once

#include "philox.h"

namespace pyreid {

// Rows of the sample's group lie at [begin, end) of `count`; `self` is where the excluded row lies,
// or -1.
struct Candidates {
  int64_t begin, end, count, self;

  PYREID_BOTH bool self_inside() const { return self >= begin && self < end; }

  // How many rows may be drawn. Where a group holds nothing but the excluded row, that row.
  PYREID_BOTH int64_t positives() const {
    const int64_t own = end - begin;
    return own > 1 && self_inside() ? own - 1 : own;
  }
  PYREID_BOTH int64_t negatives() const {
    return count - (end - begin) - (self >= 0 && !self_inside() ? 1 : 0);
  }

  // The place of the i-th of them.
  PYREID_BOTH int64_t positive(int64_t i) const {
    const int64_t place = begin + i;
    return end - begin > 1 && self_inside() && place >= self ? place + 1 : place;
  }
  PYREID_BOTH int64_t negative(int64_t i) const {
    const bool outside = self >= 0 && !self_inside();
    if (outside && self < begin && i >= self) ++i;
    if (i >= begin) i += end - begin;
    if (outside && self >= end && i >= self) ++i;
    return i;
  }
};

// What tells the random orders of one sample apart.
enum class Draw : uint32_t { positives, negatives };

}  // namespace pyreid
