// Sums and maxima over a warp: every lane gets the result, in an order that nothing but the code
// decides.
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

}  // namespace pyreid
