// Ids of either width, read on the device.
#pragma once

#include "cuda/portable.cuh"
#include "tensor.h"

namespace pyreid {

__device__ __forceinline__ int64_t id_at(const Ids& ids, int64_t i) {
  return ids.dtype == Dtype::int64 ? static_cast<const int64_t*>(ids.data)[i]
                                   : static_cast<const int32_t*>(ids.data)[i];
}

}  // namespace pyreid
