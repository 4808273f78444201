// Positions of equal ids brought together: groups in ascending id order, positions ascending
// inside.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "tensor.h"

namespace pyreid {

inline int64_t id_at(const Ids& ids, int64_t i) {
  return ids.dtype == Dtype::int64 ? static_cast<const int64_t*>(ids.data)[i]
                                   : static_cast<const int32_t*>(ids.data)[i];
}

struct Groups {
  std::vector<int64_t> positions;  // of all ids
  std::vector<int64_t> starts;     // first index into positions per group, and the end

  int64_t count() const { return int64_t(starts.size()) - 1; }
};

// Positions at which all keys agree are a group; ordered by the first key, then the next. Any ids.
Groups group(std::initializer_list<Ids> keys);

}  // namespace pyreid
