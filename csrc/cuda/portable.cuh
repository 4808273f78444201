// Everything of CUDA that our kernels use, in words that two compilers understand: nvcc, and, with
// PYREID_EMULATED, a plain C++ compiler that runs every CUDA thread on the CPU (emulated/cuda.h).
//
// What differs from CUDA: launch() instead of <<<>>>; the two macros instead of __shared__; 1-D
// grids and blocks; SharedPointer<T> where a function takes a pointer to shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "tensor.h"

#ifdef PYREID_EMULATED
#include "emulated/cuda.h"
#include "half.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#endif

namespace pyreid {

// N elements that are read or written at once: up to 16 bytes in one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  static_assert(N > 0 && (N & (N - 1)) == 0, "a pack holds a power of two of elements");
  T v[N];
};

inline void check_launch(const char* op, int64_t grid, int block) {
  if (grid > 0x7fffffff) {
    throw std::runtime_error(std::string(op) + ": a grid of " + std::to_string(grid) +
                             " blocks; CUDA has at most 2^31 - 1");
  }
  if (block < 1 || block > 1024) {
    throw std::runtime_error(std::string(op) + ": a block of " + std::to_string(block) +
                             " threads; CUDA has 1 to 1024");
  }
}

#ifdef PYREID_EMULATED

using Half = HostHalf;
using BFloat16 = HostBFloat16;

inline float to_float(float value) { return value; }
inline float to_float(Half value) { return widen(value); }
inline float to_float(BFloat16 value) { return widen(value); }

template <class T>
T from_float(float value) {
  return narrow<T>(value);
}

template <class T>
using SharedPointer = emulated::SharedPointer<T>;

#define PYREID_SHARED(type, name, count)     \
  static char name##_key;                    \
  const ::pyreid::SharedPointer<type> name = \
      ::pyreid::emulated::shared_array<type>(&name##_key, #name, count, false)

#define PYREID_DYNAMIC_SHARED(type, name)                                            \
  const ::pyreid::SharedPointer<type> name = ::pyreid::emulated::shared_array<type>( \
      &::pyreid::emulated::dynamic_shared_key, #name, 0, true)

template <class U, class T>
SharedPointer<U> shared_cast(SharedPointer<T> pointer) {
  return pointer.template cast<U>();
}

template <int N, class T>
Pack<std::remove_const_t<T>, N> load_pack(T* from, emulated::Site site = emulated::Site::here()) {
  return emulated::load_as<Pack<std::remove_const_t<T>, N>>(from, site);
}

template <int N, class T>
Pack<std::remove_const_t<T>, N> load_pack(SharedPointer<T> from,
                                          emulated::Site site = emulated::Site::here()) {
  return emulated::load_as<Pack<std::remove_const_t<T>, N>>(from, site);
}

template <class T, int N>
void store_pack(T* to, Pack<T, N> pack, emulated::Site site = emulated::Site::here()) {
  emulated::store_as(to, pack, site);
}

template <class T, int N>
void store_pack(SharedPointer<T> to, Pack<T, N> pack,
                emulated::Site site = emulated::Site::here()) {
  emulated::store_as(to, pack, site);
}

// There is one device: this machine.
class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), int64_t grid, int block, size_t shared_bytes,
            Stream, A... args) {
  if (grid <= 0) return;
  check_launch(op, grid, block);
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, std::tuple<P...>(args...)};
  const auto run_thread = [](void* pointer) {
    const Call& call = *static_cast<const Call*>(pointer);
    std::apply(call.kernel, call.args);
  };
  emulated::machine.run(op, grid, block, shared_bytes, run_thread, &call);
}

#else  // nvcc

using Half = __half;
using BFloat16 = __nv_bfloat16;

__host__ __device__ inline float to_float(float value) { return value; }
__host__ __device__ inline float to_float(Half value) { return __half2float(value); }
__host__ __device__ inline float to_float(BFloat16 value) { return __bfloat162float(value); }

// Rounds to nearest even.
template <class T>
__host__ __device__ T from_float(float value);
template <>
__host__ __device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__host__ __device__ inline Half from_float<Half>(float value) {
  return __float2half_rn(value);
}
template <>
__host__ __device__ inline BFloat16 from_float<BFloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <class T>
using SharedPointer = T*;

#define PYREID_SHARED(type, name, count) __shared__ __align__(16) type name[count]

#define PYREID_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char pyreid_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(pyreid_dynamic_shared)

// The same shared memory as elements of another type.
template <class U, class T>
__device__ __forceinline__ U* shared_cast(T* pointer) {
  return reinterpret_cast<U*>(pointer);
}

// `from` is aligned to the pack.
template <int N, class T>
__device__ __forceinline__ Pack<std::remove_const_t<T>, N> load_pack(T* from) {
  return *reinterpret_cast<const Pack<std::remove_const_t<T>, N>*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, Pack<T, N> pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Throws if a call of the CUDA runtime failed; says what to do where we know.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here, so not to be told again by somebody else's call
  std::string text = std::string(what) + ": CUDA error: " + cudaGetErrorString(error) + " (" +
                     cudaGetErrorName(error) + ")";
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      text +=
          ". pyreid was built for other GPU architectures; `python -m pyreid.info` shows which. "
          "Build it again with TORCH_CUDA_ARCH_LIST set to the one of this device";
      break;
    case cudaErrorInsufficientDriver:
      text +=
          ". The driver is older than the CUDA toolkit that built pyreid; update the driver, or "
          "build pyreid with an older toolkit (CUDA_HOME)";
      break;
    case cudaErrorMemoryAllocation:
      text +=
          ". The device is out of memory; free some (torch.cuda.empty_cache() returns what torch "
          "keeps), or work on smaller pieces";
      break;
    case cudaErrorNoDevice:
      text += ". No GPU is visible; see CUDA_VISIBLE_DEVICES and nvidia-smi";
      break;
    case cudaErrorIllegalAddress:
    case cudaErrorAssert:
      text +=
          ". A kernel failed, perhaps an earlier one of another library; run again with "
          "CUDA_LAUNCH_BLOCKING=1 to see which";
      break;
    default:
      break;
  }
  throw std::runtime_error(text);
}

// Makes a device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Beyond 48 KiB in all, a kernel must be allowed its shared memory. It is allowed all that the
// device has, not what this launch asks for: two threads may launch it with different sizes.
inline void allow_shared(const char* op, const void* kernel, size_t shared_bytes) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), op);
  if (attributes.sharedSizeBytes + shared_bytes <= 48 * 1024) return;
  int device, most;
  check(cudaGetDevice(&device), op);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), op);
  const int64_t left = int64_t(most) - int64_t(attributes.sharedSizeBytes);
  if (int64_t(shared_bytes) > left) {
    throw std::runtime_error(std::string(op) + ": needs " + std::to_string(shared_bytes) +
                             " bytes of dynamic shared memory, this device has " +
                             std::to_string(left));
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(left)), op);
}

// Queues the kernel on the stream, on the device of the stream. Nothing synchronises.
template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), int64_t grid, int block, size_t shared_bytes,
            Stream stream, A... args) {
  if (grid <= 0) return;
  check_launch(op, grid, block);
  const DeviceGuard guard(stream.device);
  if (shared_bytes > 0) allow_shared(op, reinterpret_cast<const void*>(kernel), shared_bytes);
  kernel<<<unsigned(grid), unsigned(block), shared_bytes,
           static_cast<cudaStream_t>(stream.handle)>>>(static_cast<P>(args)...);
  check(cudaGetLastError(), op);
}

#endif

}  // namespace pyreid
