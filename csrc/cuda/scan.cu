#include "cuda/scan.cuh"

namespace pyreid {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) scan_kernel(uint32_t* __restrict__ counts,  // [size]
                                                        int64_t size) {
  PYREID_SHARED(uint32_t, warp_totals, kThreads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t carry = 0;
  for (int64_t begin = 0; begin < size; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    const uint32_t value = i < size ? counts[i] : 0;
    uint32_t inclusive = value;
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t below = __shfl_up_sync(0xffffffffu, inclusive, step);
      if (lane >= step) inclusive += below;
    }
    if (lane == 31) warp_totals[warp] = inclusive;
    __syncthreads();
    uint32_t before = carry, total = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      const uint32_t warp_total = warp_totals[w];
      if (w < warp) before += warp_total;
      total += warp_total;
    }
    if (i < size) counts[i] = before + inclusive - value;
    carry += total;
    __syncthreads();
  }
}

}  // namespace

void exclusive_scan(const char* op, uint32_t* counts, int64_t size, Stream stream) {
  launch(op, scan_kernel, size > 0 ? 1 : 0, kThreads, 0, stream, counts, size);
}

}  // namespace pyreid
