// Stable sort of ids on the device, returning the order: a radix sort, eight bits a pass. The
// result is a function of the input alone: counts are added by integer atomics, positions are
// assigned in order.
#pragma once

#include <cstdint>

#include "cuda/ids.cuh"
#include "cuda/portable.cuh"
#include "tensor.h"

namespace pyreid {

// Ids ascending, and the position of each in the input. An id outside [0, bound) sorts as `bound`:
// last.
struct Sorted {
  const uint32_t* keys;   // [count]
  const uint32_t* order;  // [count]
};

size_t sort_workspace(int64_t count);
Sorted sort_ids(const char* op, Ids ids, int64_t bound, void* workspace, Stream stream);

}  // namespace pyreid
