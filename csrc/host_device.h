// Functions that both the CPU floor and the kernels call.
#pragma once

#ifdef __CUDACC__
#define PYREID_BOTH __host__ __device__ __forceinline__
#define PYREID_UNROLL _Pragma("unroll")
#else
#define PYREID_BOTH inline
#define PYREID_UNROLL _Pragma("GCC unroll 16")
#endif
