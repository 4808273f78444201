// CUDA on the CPU, for tests: a C++ compiler that includes this compiles our kernels as they are.
//
// Every CUDA thread is a fiber (fiber.h); blocks and threads run in an order that tests choose
// (scheduler.h); barriers and warp operations wait as on a GPU (warp.h); shared memory is checked
// access by access (shared_memory.h). What CUDA leaves undefined is an emulated::Fault.
//
// __shared__ is missing on purpose: shared memory is declared by the macros of portable.cuh.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#include "emulated/intrinsics.h"
#include "emulated/scheduler.h"
#include "emulated/settings.h"
#include "emulated/shared_memory.h"
#include "emulated/warp.h"
