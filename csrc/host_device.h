// A function that both floors call.
#pragma once

#ifdef __CUDACC__
#define PYREID_HOST_DEVICE __host__ __device__ inline
#else
#define PYREID_HOST_DEVICE inline
#endif
