// Sums and maxima over a warp and over a block: every thread gets the result, in an order that
// nothing but the code decides.
#pragma once

#include "cuda/portable.cuh"

namespace pyreid {

__device__ __forceinline__ float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2)
    value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

__device__ __forceinline__ double warp_sum(double value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int step = 16; step > 0; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// `partials`: shared, one for each warp of the block. It may be used again at once.
template <class Partials, class Combine>
__device__ __forceinline__ float block_combine(float value, Partials partials, Combine combine) {
  __syncthreads();
  if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = value;
  __syncthreads();
  float total = partials[0];
  for (int warp = 1; warp < int(blockDim.x) / 32; ++warp)
    total = combine(total, float(partials[warp]));
  return total;
}

template <class Partials>
__device__ __forceinline__ float block_sum(float value, Partials partials) {
  return block_combine(warp_sum(value), partials, [](float a, float b) { return __fadd_rn(a, b); });
}

template <class Partials>
__device__ __forceinline__ float block_max(float value, Partials partials) {
  return block_combine(warp_max(value), partials, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace pyreid
