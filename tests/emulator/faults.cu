// Each kernel here plants one fault. `faults <name> <schedule>` exits with 0 if launch() threw a
// Fault that says what is expected, no stack was lost, and the next launch works; it prints the
// message. The line at fault is marked "here": the tests look it up and expect it in the message.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "cuda/portable.cuh"

namespace {

using namespace pyreid;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kBlocks = 2;
constexpr size_t kDynamicBytes = 256;

struct Planted {
  void (*kernel)(float*);
  int threads;
  std::vector<std::string> texts;
};

std::map<std::string, Planted>& planted() {
  static std::map<std::string, Planted> all;
  return all;
}

struct Plant {
  Plant(const char* name, void (*kernel)(float*), int threads,
        std::initializer_list<std::string> texts) {
    planted()[name] = {kernel, threads, texts};
  }
};

// A kernel, its block size, and what the message must contain.
#define FAULT(name, threads, ...)                                \
  __global__ void name(float* data);                             \
  const Plant plant_##name(#name, name, threads, {__VA_ARGS__}); \
  __global__ void name([[maybe_unused]] float* data)

// --- barriers -----------------------------------------------------------------------------------

FAULT(barrier_lines, 64, "divergent __syncthreads: thread ", " waits at __syncthreads at ") {
  if (threadIdx.x < 40) {
    __syncthreads();  // here
  } else {
    __syncthreads();
  }
}

FAULT(barrier_kinds, 64, "divergent __syncthreads", " waits at __syncthreads") {
  // clang-format off
  if (threadIdx.x == 5) __syncthreads(); else __syncthreads_or(1);  // here
  // clang-format on
}

FAULT(barrier_after_return, 64, "divergent __syncthreads: thread ", " has returned") {
  if (threadIdx.x == 63) return;
  __syncthreads();  // here
}

FAULT(barrier_in_loop, 64, "divergent __syncthreads: thread ", " has returned") {
  for (unsigned i = 0; i <= threadIdx.x / 32; ++i) __syncthreads();  // here
}

// --- warp operations ----------------------------------------------------------------------------

FAULT(masks_differ, 32, "__ballot_sync: callers disagree about the mask: 0x", " waits with 0x") {
  if (threadIdx.x < 3) __ballot_sync(threadIdx.x == 0 ? 0x3 : 0x7, 1);  // here
}

FAULT(calls_differ, 32, ": callers disagree about the call: thread ", " waits at ") {
  if (threadIdx.x < 16) {
    __shfl_sync(kAll, 1, 0);  // here
  } else {
    __shfl_sync(kAll, 1, 0);
  }
}

FAULT(operations_differ, 32, ": callers disagree about the call: thread ", " waits at __a") {
  // clang-format off
  if (threadIdx.x < 16) __any_sync(kAll, 1); else __all_sync(kAll, 1);  // here
  // clang-format on
}

FAULT(mask_without_caller, 32, "__syncwarp: mask 0xffff does not contain the caller, lane ") {
  __syncwarp(0xffff);  // here
}

FAULT(named_returned, 64, "__shfl_xor_sync: mask 0xffffffff",
      " names thread 35, which has returned") {
  if (threadIdx.x == 35) return;
  __shfl_xor_sync(kAll, 1, 1);  // here
}

FAULT(named_at_barrier, 32, "__any_sync: mask 0xffffffff",
      " names thread 9, which waits at a block barrier") {
  if (threadIdx.x == 9) __syncthreads();
  __any_sync(kAll, 1);  // here
}

FAULT(shuffle_outside_mask, 32, "__shfl_sync: lane 0 reads lane 2, which is outside the mask 0x3") {
  if (threadIdx.x < 2) __shfl_sync(0x3, 1, threadIdx.x == 0 ? 2 : 0);  // here
}

FAULT(shuffle_beyond_block, 40, "__shfl_down_sync: lane ", ", which does not exist") {
  __shfl_down_sync(kAll, 1, 16);  // here
}

FAULT(shuffle_width, 32, "__shfl_up_sync: width 12 is not a power of two up to 32") {
  __shfl_up_sync(kAll, 1, 1, 12);  // here
}

FAULT(deadlock, 32, "deadlock: no thread can run", " waits at __syncwarp at ", " with mask 0x") {
  const unsigned masks[] = {0x3, 0x6, 0x5};             // 0 waits for 1, 1 for 2, 2 for 0
  if (threadIdx.x < 3) __syncwarp(masks[threadIdx.x]);  // here
}

// --- shared memory ------------------------------------------------------------------------------

FAULT(shared_beyond, 32, "out-of-range shared access: 4 bytes at tile[33]",
      "which has 33 elements") {
  PYREID_SHARED(float, tile, 33);
  tile[threadIdx.x + 2] = 1.f;  // here
}

FAULT(shared_before, 32, "out-of-range shared access: 4 bytes at tile[-1]",
      "which has 32 elements") {
  PYREID_SHARED(float, tile, 32);
  tile[int(threadIdx.x) - 1] = 1.f;  // here
}

FAULT(dynamic_beyond, 32, "out-of-range shared access: 4 bytes at values[64]",
      "which has 64 elements") {
  PYREID_DYNAMIC_SHARED(float, values);
  *(values + (33 + threadIdx.x)) = 1.f;  // here
}

FAULT(pack_beyond, 1, "out-of-range shared access: 16 bytes at tile[4]", "which has 7 elements") {
  PYREID_SHARED(float, tile, 7);
  store_pack(tile + 4, Pack<float, 4>());  // here
}

FAULT(too_much_static, 1, "tile: 65536 bytes of static shared memory, CUDA has 49152") {
  PYREID_SHARED(float, tile, 16384);  // here
  tile[0] = 0.f;
}

FAULT(uninitialised, 32, "uninitialised shared read: nobody wrote tile[31] (declared at ") {
  PYREID_SHARED(float, tile, 32);
  if (threadIdx.x != 31) tile[threadIdx.x] = 1.f;
  __syncthreads();
  data[threadIdx.x] = tile[threadIdx.x];  // here
}

FAULT(left_by_earlier_block, 1, "uninitialised shared read: nobody wrote tile[0] (declared at ") {
  PYREID_SHARED(float, tile, 1);
  if (data[0] == 1.f) data[1] = tile[0];  // here
  tile[0] = data[0] = 1.f;
}

FAULT(uninitialised_sum, 32, "uninitialised shared read: nobody wrote tile[", "] (declared at ") {
  PYREID_SHARED(int, tile, 32);
  atomicAdd(&tile[threadIdx.x], 1);  // here
}

FAULT(race_write_write, 64, "shared race: writes tile[0] (declared at ", " wrote at ") {
  PYREID_SHARED(float, tile, 1);
  tile[0] = 1.f;  // here
}

FAULT(race_no_barrier, 64, "shared race: ", " tile[", ", with no synchronisation between") {
  PYREID_SHARED(float, tile, 64);
  tile[threadIdx.x] = 1.f;
  __syncthreads();
  const float other = tile[threadIdx.x ^ 32];  // here
  tile[threadIdx.x] = other;
}

FAULT(race_across_warps, 64, "shared race: ", " tile[", ", with no synchronisation between") {
  PYREID_SHARED(float, tile, 64);
  tile[threadIdx.x] = 1.f;
  __syncthreads();
  data[threadIdx.x] = tile[threadIdx.x ^ 32];
  __syncwarp();             // not enough: the reader is of the other warp
  tile[threadIdx.x] = 2.f;  // here
}

FAULT(race_in_warp, 32, "shared race: ", " tile[", ", with no synchronisation between") {
  PYREID_SHARED(float, tile, 32);
  tile[threadIdx.x] = 1.f;
  __syncwarp();
  tile[threadIdx.x] = tile[threadIdx.x ^ 1];  // here
}

FAULT(race_half_warp, 32, "shared race: ", " tile[", ", with no synchronisation between") {
  PYREID_SHARED(float, tile, 32);
  tile[threadIdx.x] = 1.f;
  __syncwarp();
  const float other = tile[threadIdx.x ^ 16];  // here
  __syncwarp(threadIdx.x < 16 ? 0xffff : 0xffff0000);
  tile[threadIdx.x] = other;
}

FAULT(race_atomic, 64, "shared race: ", " tile[0]", ", with no synchronisation between") {
  PYREID_SHARED(int, tile, 1);
  if (threadIdx.x == 0) tile[0] = 0;
  __syncthreads();
  if (threadIdx.x == 40) tile[0] += 1;  // here
  atomicAdd(&tile[0], 1);
}

FAULT(race_of_bytes, 64, "shared race: ", " tile[", ", with no synchronisation between") {
  PYREID_SHARED(int, tile, 64);
  const SharedPointer<uint8_t> bytes = shared_cast<uint8_t>(tile);
  bytes[threadIdx.x] = 0;
  bytes[(threadIdx.x + 1) % 64] = 1;  // here
}

// --- packs, traps -------------------------------------------------------------------------------

FAULT(misaligned_load, 1, "misaligned load_pack of 16 bytes") {
  data[0] = load_pack<4>(data + 1).v[0];  // here
}

FAULT(misaligned_store, 1, "misaligned store_pack of 8 bytes") {
  store_pack(data + 1, Pack<float, 2>{{1.f, 2.f}});  // here
}

FAULT(misaligned_shared, 1, "misaligned shared access: tile[1]", "not aligned to 16 bytes") {
  PYREID_SHARED(float, tile, 8);
  store_pack(tile + 1, Pack<float, 4>());  // here
}

FAULT(trap, 32, "__trap") {
  if (threadIdx.x == 7) __trap();  // here
}

FAULT(assertion, 32, "assertion failed: threadIdx.x != 7") {
  assert(threadIdx.x != 7);  // here
}

// --- the program --------------------------------------------------------------------------------

__global__ void reverse_kernel(int* data) {
  PYREID_SHARED(int, tile, 64);
  tile[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = tile[63 - int(threadIdx.x)];
}

bool still_works() {
  int data[64];
  for (int i = 0; i < 64; ++i) data[i] = i;
  launch("reverse", reverse_kernel, 1, 64, 0, Stream{}, data);
  for (int i = 0; i < 64; ++i) {
    if (data[i] != 63 - i) return false;
  }
  return true;
}

// Objects on the stacks of fibers that wait when another one faults.
int alive = 0;
struct Alive {
  Alive() { ++alive; }
  ~Alive() { --alive; }
};

__global__ void objects_kernel() {
  const Alive object;
  __syncthreads();
  if (threadIdx.x == 20) __trap();
  __syncthreads();
}

int mappings() {
  std::ifstream file("/proc/self/maps");
  int count = 0;
  for (std::string line; std::getline(file, line);) ++count;
  return count;
}

int check_fault(const Planted& fault, bool print) {
  alignas(16) float data[64] = {};
  try {
    launch("planted", fault.kernel, kBlocks, fault.threads, kDynamicBytes, Stream{}, data);
  } catch (const emulated::Fault& error) {
    const std::string message = error.what();
    int code = message.rfind("planted: block ", 0) == 0 && still_works() ? 0 : 2;
    for (const std::string& text : fault.texts) {
      if (message.find(text) == std::string::npos) code = 2;
    }
    if (print || code != 0) std::printf("%s\n", message.c_str());
    return code;
  }
  return 1;
}

// Every fault over and over: nothing may be lost on the way.
int check_recovery() {
  still_works();
  int before = 0;
  for (int round = 0; round < 20; ++round) {
    for (const auto& [name, fault] : planted()) {
      if (check_fault(fault, false) != 0) return 2;
    }
    try {
      launch("objects", objects_kernel, 1, 64, 0, Stream{});
      return 1;
    } catch (const emulated::Fault&) {
      if (alive != 0) return 4;
    }
    if (round == 1) before = mappings();
  }
  return mappings() > before + 8 ? 5 : 0;
}

// For AddressSanitizer to find.
__global__ void global_beyond_kernel(const float* in, float* out, int n) {
  __syncthreads();
  if (int(threadIdx.x) <= n) out[threadIdx.x] = in[threadIdx.x];
}

void read_beyond() {
  const std::vector<float> in(40);
  std::vector<float> out(64);
  launch("global_beyond", global_beyond_kernel, 1, 64, 0, Stream{}, in.data(), out.data(), 40);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  const int schedule = argc > 2 ? std::atoi(argv[2]) : 0;
  emulated::set_schedule(emulated::Schedule(schedule), 7);
  if (name == "recovery") return check_recovery();
  if (name == "global_beyond") {
    read_beyond();
    return 0;
  }
  return check_fault(planted().at(name), true);
}
