// Sums and maxima over a warp or a block: every thread gets the result, in an order that nothing
// but the code and the size of the block decide.
#pragma once

#include "cuda/portable.cuh"

namespace pyreid {

__device__ __forceinline__ float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2)
    value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int step = 16; step > 0; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// By all threads of a block of whole warps, once per `partials` (shared, [warps]).
template <class Partials>
__device__ __forceinline__ float block_sum(float value, Partials partials) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.f;
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) {
    const float partial = partials[warp];
    total = __fadd_rn(total, partial);
  }
  return total;
}

}  // namespace pyreid
