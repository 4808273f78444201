// Stable sort of ids on the device, returning the order: a radix sort, eight bits a pass. The result is a
// function of the input alone: counts are added by integer atomics, positions are assigned in order.
#pragma once

#include <cstdint>

#include "cuda/portable.cuh"
#include "tensor.h"

namespace pyreid {

__device__ __forceinline__ int64_t id_at(const Ids& ids, int64_t i) {
  return ids.dtype == Dtype::int64 ? static_cast<const int64_t*>(ids.data)[i]
                                   : static_cast<const int32_t*>(ids.data)[i];
}

// Ids ascending, and the position of each in the input. An id outside [0, bound) sorts as `bound`: last.
struct Sorted {
  const uint32_t* keys;   // [count]
  const uint32_t* order;  // [count]
};

size_t sort_workspace(int64_t count);
Sorted sort_ids(const char* op, Ids ids, int64_t bound, void* workspace, Stream stream);

}  // namespace pyreid
