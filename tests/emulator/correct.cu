// Kernels that do nothing wrong, each with its result worked out by a plain loop, under every
// schedule. Exits with 0, or says which line did not hold.

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/portable.cuh"

namespace {

using namespace pyreid;
using emulated::Schedule;

#define EXPECT(condition)                                                 \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (false)

constexpr unsigned kAll = 0xffffffffu;
const Stream kStream{0, nullptr};

// --- block primitives ---------------------------------------------------------------------------

template <class T>
__device__ T block_sum(T value) {
  PYREID_SHARED(T, partial, 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAll, value, distance);
  }
  __syncthreads();  // the reads of the call before
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  T sum = 0;
  for (int w = 0; w < int(blockDim.x) / 32; ++w) sum += partial[w];
  return sum;
}

// Two instantiations, and one of them twice: three uses of two arrays.
__global__ void sums_kernel(const int* values, int* ints, float* floats, int64_t* longs) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int sum = block_sum(values[i]);
  const float half = block_sum(0.5f * values[i]);
  const int64_t big = block_sum(int64_t(values[i]) * (int64_t(1) << 32));
  const int again = block_sum(sum);
  if (threadIdx.x == 0) {
    ints[blockIdx.x] = again;
    floats[blockIdx.x] = half;
    longs[blockIdx.x] = big;
  }
}

void check_sums() {
  const int blocks = 5;
  for (const int threads : {32, 64, 256, 512, 1024}) {
    std::vector<int> values(size_t(blocks * threads)), ints(blocks);
    std::vector<float> floats(blocks);
    std::vector<int64_t> longs(blocks);
    for (size_t i = 0; i < values.size(); ++i) values[i] = int(i * 7 % 11) - 3;
    launch("sums", sums_kernel, blocks, threads, 0, kStream, values.data(), ints.data(),
           floats.data(), longs.data());
    for (int b = 0; b < blocks; ++b) {
      int sum = 0;
      for (int t = 0; t < threads; ++t) sum += values[size_t(b * threads + t)];
      EXPECT(ints[b] == sum * threads);
      EXPECT(floats[b] == 0.5f * float(sum));
      EXPECT(longs[b] == int64_t(sum) * (int64_t(1) << 32));
    }
  }
}

// Inclusive prefix sums of a block, Hillis and Steele: every step reads what others wrote.
__global__ void scan_kernel(const int* in, int* out, int n) {
  PYREID_DYNAMIC_SHARED(int, sums);
  SharedPointer<int> from = sums, to = sums + n;
  const int t = threadIdx.x;
  if (t < n) from[t] = in[t];
  __syncthreads();
  for (int step = 1; step < n; step *= 2) {
    if (t < n) to[t] = t < step ? int(from[t]) : from[t] + from[t - step];
    __syncthreads();
    const SharedPointer<int> other = from;
    from = to;
    to = other;
  }
  if (t < n) out[t] = from[t];
}

void check_scan() {
  for (const int n : {1, 2, 31, 33, 100, 257}) {
    std::vector<int> in(static_cast<size_t>(n)), out(in.size());
    for (int i = 0; i < n; ++i) in[i] = i * i % 17;
    launch("scan", scan_kernel, 1, n, 2 * n * sizeof(int), kStream, in.data(), out.data(), n);
    for (int i = 0, sum = 0; i < n; ++i) {
      sum += in[i];
      EXPECT(out[i] == sum);
    }
  }
}

__global__ void barrier_votes_kernel(int* out) {
  const int t = threadIdx.x, n = blockDim.x;
  int* row = out + 5 * t;
  row[0] = __syncthreads_count(t % 3 == 0);
  row[1] = __syncthreads_or(t == n - 1);
  row[2] = __syncthreads_or(0);
  row[3] = __syncthreads_and(7);
  row[4] = __syncthreads_and(t != 0);
}

void check_barrier_votes() {
  for (const int n : {1, 33, 96, 500}) {
    std::vector<int> out(5 * size_t(n));
    launch("votes", barrier_votes_kernel, 1, n, 0, kStream, out.data());
    for (int t = 0; t < n; ++t) {
      const int* row = &out[5 * size_t(t)];
      EXPECT(row[0] == (n + 2) / 3 && row[1] == 1 && row[2] == 0 && row[3] == 1 && row[4] == 0);
    }
  }
}

// --- warp operations ----------------------------------------------------------------------------

template <class T>
__global__ void shuffles_kernel(T* out, int width, int by) {
  const T value = T(threadIdx.x * 3 + 1);
  T* row = out + 4 * threadIdx.x;
  row[0] = __shfl_sync(kAll, value, by, width);
  row[1] = __shfl_up_sync(kAll, value, by, width);
  row[2] = __shfl_down_sync(kAll, value, by, width);
  row[3] = __shfl_xor_sync(kAll, value, by, width);
}

template <class T>
void check_shuffles() {
  const int threads = 64;
  for (int width = 1; width <= 32; width *= 2) {
    for (const int by : {0, 1, 2, 3, 5, 8, 15, 16, 17, 31}) {
      std::vector<T> out(4 * threads);
      launch("shuffles", shuffles_kernel<T>, 1, threads, 0, kStream, out.data(), width, by);
      for (int t = 0; t < threads; ++t) {
        const int base = t / 32 * 32, lane = t % 32, start = lane / width * width;
        const int end = start + width;
        const auto value = [&](int source) { return T((base + source) * 3 + 1); };
        EXPECT(out[4 * t + 0] == value(start + by % width));
        EXPECT(out[4 * t + 1] == value(lane - by >= start ? lane - by : lane));
        EXPECT(out[4 * t + 2] == value(lane + by < end ? lane + by : lane));
        EXPECT(out[4 * t + 3] == value((lane ^ by) < end ? lane ^ by : lane));
      }
    }
  }
}

// In the last warp of the block, full masks name the lanes that there are.
__global__ void votes_kernel(const unsigned* values, const int64_t* longs, unsigned* out) {
  const int t = threadIdx.x;
  const unsigned value = values[t];
  unsigned* row = out + 14 * t;
  row[0] = __ballot_sync(kAll, value % 2);
  row[1] = __any_sync(kAll, value == 40);
  row[2] = __all_sync(kAll, value < 50);
  row[3] = __match_any_sync(kAll, value % 5);
  row[4] = __match_any_sync(kAll, longs[t]);
  row[5] = __reduce_add_sync(kAll, value);
  row[6] = __reduce_min_sync(kAll, value);
  row[7] = __reduce_max_sync(kAll, value);
  row[8] = unsigned(__reduce_add_sync(kAll, int(value) - 25));
  row[9] = unsigned(__reduce_min_sync(kAll, int(value) - 25));
  row[10] = unsigned(__reduce_max_sync(kAll, int(value) - 25));
  row[11] = __reduce_or_sync(kAll, value);
  row[12] = __reduce_and_sync(kAll, value | 0x100);
  row[13] = __match_any_sync(kAll, float(value % 3));
}

void check_votes() {
  for (const int n : {1, 20, 32, 45, 64, 127}) {
    std::vector<unsigned> values(static_cast<size_t>(n)), out(14 * values.size());
    std::vector<int64_t> longs(values.size());
    for (int i = 0; i < n; ++i) {
      values[i] = unsigned(i * 37 % 51);
      longs[i] = int64_t(i % 4) << 40;  // equal in the low half
    }
    launch("votes", votes_kernel, 1, n, 0, kStream, values.data(), longs.data(), out.data());
    for (int t = 0; t < n; ++t) {
      const int begin = t / 32 * 32, end = std::min(n, begin + 32);
      unsigned odd = 0, peers = 0, long_peers = 0, float_peers = 0, sum = 0, least = ~0u, most = 0;
      unsigned any = 0, all = 1, ors = 0, ands = ~0u;
      for (int i = begin; i < end; ++i) {
        const unsigned bit = 1u << (i - begin), value = values[i];
        if (value % 2) odd |= bit;
        if (value % 5 == values[t] % 5) peers |= bit;
        if (value % 3 == values[t] % 3) float_peers |= bit;
        if (longs[i] == longs[t]) long_peers |= bit;
        any |= value == 40;
        all &= value < 50;
        sum += value;
        least = std::min(least, value);
        most = std::max(most, value);
        ors |= value;
        ands &= value | 0x100;
      }
      const unsigned lanes = unsigned(end - begin);
      const unsigned expected[14] = {
          odd,        any,       all, peers, long_peers, sum, least, most, sum - 25 * lanes,
          least - 25, most - 25, ors, ands,  float_peers};
      for (int k = 0; k < 14; ++k) EXPECT(out[14 * size_t(t) + k] == expected[k]);
    }
  }
}

// Half warps on their own, then all: the upper half waits at the second operation while the lower
// one is still at the first. Then even and odd lanes, each with their own mask, at one call.
__global__ void groups_kernel(int* out) {
  const int lane = threadIdx.x % 32;
  int value = lane;
  if (lane < 16) {
    for (int distance = 8; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(0xffffu, value, distance);
    }
  }
  const int lowest = __shfl_sync(kAll, value, 0);
  const unsigned mask = lane % 2 ? 0xaaaaaaaau : 0x55555555u;
  out[threadIdx.x] = 1000 * lowest + __reduce_add_sync(mask, lane);
}

void check_groups() {
  std::vector<int> out(96);
  launch("groups", groups_kernel, 1, 96, 0, kStream, out.data());
  for (int t = 0; t < 96; ++t) EXPECT(out[t] == 1000 * 120 + (t % 2 ? 256 : 240));
}

__global__ void sort_kernel(int* data) {
  const int lane = threadIdx.x % 32;
  int value = data[threadIdx.x];
  for (int size = 2; size <= 32; size *= 2) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      const int other = __shfl_xor_sync(kAll, value, distance);
      const bool up = (lane & size) == 0, low = (lane & distance) == 0;
      value = up == low ? min(value, other) : max(value, other);
    }
  }
  data[threadIdx.x] = value;
}

void check_sort() {
  std::vector<int> data(64), expected;
  for (int i = 0; i < 64; ++i) data[i] = i * 29 % 23;
  expected = data;
  std::sort(expected.begin(), expected.begin() + 32);
  std::sort(expected.begin() + 32, expected.end());
  launch("sort", sort_kernel, 1, 64, 0, kStream, data.data());
  EXPECT(data == expected);
}

// --- memory -------------------------------------------------------------------------------------

// Within a warp, __syncwarp orders shared memory; so do operations of the lanes concerned.
__global__ void warp_exchange_kernel(int* out) {
  PYREID_SHARED(int, tile, 128);
  const int t = threadIdx.x;
  tile[t] = t;
  __syncwarp();
  int value = tile[t ^ 1];
  __syncwarp(t % 32 < 16 ? 0xffffu : 0xffff0000u);
  tile[t] = value;
  __syncwarp(t % 4 < 2 ? 0x33333333u : 0xccccccccu);
  value = tile[t ^ 1];
  __syncthreads();
  tile[t ^ 64] = value;
  __syncthreads();
  out[t] = tile[t];
}

void check_warp_exchange() {
  std::vector<int> out(128);
  launch("exchange", warp_exchange_kernel, 1, 128, 0, kStream, out.data());
  for (int t = 0; t < 128; ++t) EXPECT(out[t] == (t ^ 64));
}

struct Entry {
  float distance;
  int index;
};

__global__ void operators_kernel(int* out, float* distances) {
  PYREID_SHARED(int, v, 8);
  PYREID_SHARED(Entry, entries, 4);
  if (threadIdx.x > 0) return;
  for (int i = 0; i < 8; ++i) v[i] = i;
  v[0] += 5;
  v[1] -= v[2];
  v[2] *= 10;
  v[3] /= 2;
  v[4] |= 3;
  v[5] &= 4;
  v[6] ^= 2;
  v[7] <<= v[3];
  ++v[0];
  const int before = v[0]++;
  v[1] = v[0] = v[0] + v[1];
  SharedPointer<int> p = v + 2;
  *++p += 100;
  const SharedPointer<const int> q = &v[4];
  for (int i = 0; i < 8; ++i) out[i] = v[i];
  out[8] = before;
  out[9] = int(q - p) * 10 + q[1] + *(1 + q) + *(q - 1);
  out[10] = v[v[3] % 8] < v[0] ? min(v[6], 3) : -1;
  entries[1] = Entry{0.5f, 7};
  entries[2] = entries[1];
  const Entry entry = entries[2];
  distances[0] = entry.distance + float(entry.index);
}

void check_operators() {
  std::vector<int> out(11);
  float distance = 0.f;
  launch("operators", operators_kernel, 1, 3, 0, kStream, out.data(), &distance);
  EXPECT((out == std::vector<int>{6, 6, 20, 101, 7, 4, 4, 14, 6, 119, 3}));
  EXPECT(distance == 7.5f);
}

__global__ void atomics_kernel(int* ints, unsigned* words, unsigned long long* longs,
                               long long* signed_longs, float* floats) {
  PYREID_SHARED(int, sums, 4);
  PYREID_SHARED(unsigned, bits, 2);
  PYREID_SHARED(unsigned long long, most, 1);
  const int t = threadIdx.x;
  if (t < 4) sums[t] = 0;
  if (t < 2) bits[t] = t ? kAll : 0;
  if (t == 0) most[0] = 0;
  __syncthreads();
  atomicAdd(&sums[t % 4], t);
  atomicOr(&bits[0], 1u << (t % 30));
  atomicAnd(bits + 1, ~(1u << (t % 30)));
  atomicMax(&most[0], static_cast<unsigned long long>(t) << 33);
  atomicAdd(ints, 1);
  atomicMin(ints + 1, -t);
  atomicMax(ints + 2, t);
  atomicAdd(words, 2u);
  atomicAdd(longs, 1ull << 32);
  atomicMin(signed_longs, -(static_cast<long long>(t) << 33));
  atomicAdd(floats, 0.5f);
  if (atomicCAS(words + 1, 0u, 77u) == 0u) atomicExch(ints + 3, 1 + atomicExch(ints + 3, 5));
  __syncthreads();
  if (t < 4) atomicAdd(ints + 4 + t, sums[t]);
  if (t == 0) {
    words[2] = bits[0];
    words[3] = bits[1];
    longs[1] = most[0];
  }
}

void check_atomics() {
  int ints[8] = {};
  unsigned words[4] = {};
  unsigned long long longs[2] = {};
  long long signed_longs[1] = {};
  float floats[1] = {};
  launch("atomics", atomics_kernel, 3, 100, 0, kStream, ints, words, longs, signed_longs, floats);
  EXPECT(ints[0] == 300 && ints[1] == -99 && ints[2] == 99 && ints[3] == 1);
  for (int k = 0; k < 4; ++k) EXPECT(ints[4 + k] == 3 * (25 * k + 4 * 300));
  EXPECT(words[0] == 600 && words[1] == 77);
  EXPECT(words[2] == 0x3fffffff && words[3] == 0xc0000000);
  EXPECT(longs[0] == 300ull << 32 && longs[1] == 99ull << 33);
  EXPECT(signed_longs[0] == -99ll * (1ll << 33) && floats[0] == 150.f);
}

template <class T, int N>
__global__ void packs_kernel(const T* in, T* out, float* sums, int n) {
  PYREID_DYNAMIC_SHARED(float, values);
  const SharedPointer<T> copies = shared_cast<T>(values + 32 * N);
  const int i = threadIdx.x * N;
  if (i < n) {
    const Pack<T, N> pack = load_pack<N>(in + i);
    Pack<float, N> wide;
    for (int k = 0; k < N; ++k) wide.v[k] = to_float(pack.v[k]);
    store_pack(values + i, wide);
    store_pack(copies + i, pack);
  }
  __syncthreads();
  if (i < n) {
    float sum = 0.f;
    for (int k = 0; k < N; ++k) sum += values[n - 1 - i - k];
    sums[threadIdx.x] = sum + 0.f * to_float(copies[i]);
    store_pack(out + i, load_pack<N>(copies + (n - N - i)));
  }
}

template <class T, int N>
void check_packs() {
  const int n = 25 * N;
  std::vector<Pack<T, N>> in(25), out(25);
  std::vector<float> sums(25);
  for (int i = 0; i < n; ++i) in[size_t(i / N)].v[i % N] = from_float<T>(float(i) - 7.f);
  launch("packs", packs_kernel<T, N>, 1, 32, 32 * N * (sizeof(float) + sizeof(T)), kStream, in[0].v,
         out[0].v, sums.data(), n);
  for (int i = 0; i < 25; ++i) {
    float sum = 0.f;
    for (int k = 0; k < N; ++k) {
      EXPECT(to_float(out[i].v[k]) == float((24 - i) * N + k) - 7.f);
      sum += float(n - 1 - i * N - k) - 7.f;
    }
    EXPECT(sums[i] == sum);
  }
}

// --- numbers ------------------------------------------------------------------------------------

// What a 16-bit pattern with `mantissa` bits of mantissa is worth, from the definition.
double worth(int bits, int mantissa) {
  const int exponent_bits = 15 - mantissa, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa) & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << mantissa) - 1);
  const double sign = bits & 0x8000 ? -1. : 1.;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
  return sign * std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
}

template <class T>
__global__ void convert_kernel(const uint16_t* patterns, float* wide, uint16_t* narrow, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  wide[i] = to_float(T{patterns[i]});
  narrow[i] = from_float<T>(wide[i]).bits;
}

template <class T>
__global__ void round_kernel(const float* values, uint16_t* rounded, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) rounded[i] = from_float<T>(values[i]).bits;
}

template <class T>
void check_conversions(int mantissa) {
  const int n = 65536, threads = 512;
  std::vector<uint16_t> patterns(n), back(n);
  std::vector<float> wide(n);
  for (int i = 0; i < n; ++i) patterns[i] = uint16_t(i);
  launch("convert", convert_kernel<T>, n / threads, threads, 0, kStream, patterns.data(),
         wide.data(), back.data(), n);
  for (int i = 0; i < n; ++i) {
    const double value = worth(i, mantissa);
    if (std::isnan(value)) {
      EXPECT(std::isnan(wide[i]) && std::isnan(worth(back[i], mantissa)));
    } else {
      EXPECT(wide[i] == float(value) && std::signbit(wide[i]) == std::signbit(value));
      EXPECT(back[i] == patterns[i]);
    }
  }

  // Between neighbours: the midpoint goes to the even pattern, a hair beside it to the nearer one.
  const int infinity = ((1 << (15 - mantissa)) - 1) << mantissa;
  std::vector<float> values;
  std::vector<int> expected;
  for (int sign : {0, 0x8000}) {
    for (int i = 0; i < infinity; ++i) {
      const double low = worth(i, mantissa);
      // Beyond the largest number stands, for rounding, the power of two that comes next.
      const double high =
          i + 1 < infinity ? worth(i + 1, mantissa) : 2 * low - worth(i - 1, mantissa);
      const float middle = float(low / 2 + high / 2);
      if (double(middle) != low / 2 + high / 2) continue;  // finer than a float
      const float s = sign ? -1.f : 1.f;
      values.insert(values.end(), {s * middle, s * std::nextafter(middle, 0.f),
                                   s * std::nextafter(middle, INFINITY)});
      expected.insert(expected.end(), {sign | (i + i % 2), sign | i, sign | (i + 1)});
    }
    for (const float huge : {std::numeric_limits<float>::max(), INFINITY}) {
      values.push_back(sign ? -huge : huge);
      expected.push_back(sign | infinity);
    }
  }
  const int count = int(values.size());
  EXPECT(count > 100000);
  std::vector<uint16_t> rounded(values.size());
  launch("round", round_kernel<T>, (count + threads - 1) / threads, threads, 0, kStream,
         values.data(), rounded.data(), count);
  for (int i = 0; i < count; ++i) EXPECT(rounded[i] == expected[i]);
}

__global__ void intrinsics_kernel(double* out) {
  int k = 0;
  const auto put = [&](double value) { out[k++] = value; };
  put(__popc(0xf0f0u) + __popcll(~0ull));
  put(__ffs(0) + __ffs(8) + __ffsll(1ll << 40));
  put(__clz(0) + __clz(1) + __clz(-1) + __clzll(0) + __clzll(1));
  put(__brev(1) == 0x80000000u && __brev(0x12345678u) == 0x1e6a2c48u);
  put(__umulhi(0x80000000u, 6) + __mulhi(-0x40000000, 8));
  put(double(__umul64hi(1ull << 63, 10)));
  put(__float_as_uint(1.f) == 0x3f800000u && __float_as_int(-0.f) == INT_MIN);
  put(__uint_as_float(0x40000000u) + __int_as_float(0x3f800000));
  put(__fadd_rn(1.f, 0x1p-24f) + __fsub_rn(1.f, 0x1p-26f));
  // A fused product would keep the low half of the square.
  put(__fadd_rn(__fmul_rn(1.f + 0x1p-12f, 1.f + 0x1p-12f), -1.f - 0x1p-11f));
  put(__fmaf_rn(1.f + 0x1p-12f, 1.f + 0x1p-12f, -1.f - 0x1p-11f) == 0x1p-24f);
  put(__fdiv_rn(1.f, 3.f) == 1.f / 3.f && __frcp_rn(4.f) == 0.25f && __fsqrt_rn(9.f) == 3.f);
  put(rsqrtf(16.f) + __expf(0.f) + __logf(1.f));
  put(min(-1, 2u) + max(3, 4) + min(1.5f, NAN) + max(2.0, 1.f));
  put(double(max(1ll << 40, 5ll)) + double(min(7ul, 9ul)));
  const int value = 5;
  put(__ldg(&value));
  __threadfence();
  __threadfence_block();
  assert(k == 16);
}

void check_intrinsics() {
  double out[16];
  launch("intrinsics", intrinsics_kernel, 1, 1, 0, kStream, out);
  const double expected[16] = {
      72, 45,   32 + 31 + 0 + 64 + 63, 1,          3 - 2, 5, 1, 3, 1 + 1, 0, 1,
      1,  1.25, 2 + 4 + 1.5 + 2,       0x1p40 + 7, 5};
  for (int k = 0; k < 16; ++k) EXPECT(out[k] == expected[k]);
}

// --- the machine --------------------------------------------------------------------------------

__global__ void visit_kernel(int* order, int* next) {
  if (blockIdx.x % 5 == 3) return;  // a block that has nothing to do
  order[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
  __syncthreads();
  order[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

std::vector<int> visit(int blocks, int threads) {
  std::vector<int> order(size_t(2 * blocks * threads));
  int count = 0;
  launch("visit", visit_kernel, blocks, threads, 0, kStream, order.data(), &count);
  order.resize(size_t(count));
  return order;
}

void check_schedules() {
  const int blocks = 9, threads = 70;
  std::vector<int> expected;
  for (int b = 0; b < blocks; ++b) {
    for (int twice = 0; twice < 2 && b % 5 != 3; ++twice) {
      for (int t = 0; t < threads; ++t) expected.push_back(b * threads + t);
    }
  }
  emulated::set_schedule(Schedule::in_order);
  EXPECT(visit(blocks, threads) == expected);
  emulated::set_schedule(Schedule::reversed);
  std::vector<int> reversed = visit(blocks, threads);
  std::reverse(reversed.begin(), reversed.end());
  EXPECT(reversed == expected);

  emulated::set_schedule(Schedule::shuffled, 1);
  std::vector<int> first = visit(blocks, threads), second = visit(blocks, threads);
  emulated::set_schedule(Schedule::shuffled, 1);
  EXPECT(visit(blocks, threads) == first);
  emulated::set_schedule(Schedule::shuffled, 2);
  EXPECT(visit(blocks, threads) != first && first != second && first != expected);
  std::sort(first.begin(), first.end());
  std::sort(expected.begin(), expected.end());
  EXPECT(first == expected);
}

__global__ void count_kernel(unsigned long long* count) { atomicAdd(count, 1ull); }

void check_statistics() {
  unsigned long long count = 0;
  emulated::reset_statistics();
  launch("count", count_kernel, 20000, 33, 0, kStream, &count);
  launch("count", count_kernel, 0, 33, 0, kStream, &count);
  launch("count", count_kernel, -1, 33, 0, kStream, &count);
  const emulated::Statistics statistics = emulated::statistics();
  EXPECT(count == 20000 * 33 && statistics.launches == 1 && statistics.blocks == 20000);
  EXPECT(statistics.switches >= 20000 * 33);
  const Setting* launches = emulated::setting("launches");
  EXPECT(launches->get() == 1);
  launches->set(0);
  EXPECT(launches->get() == 0 && emulated::setting("blocks")->get() == 0);
  const Setting* seed = emulated::setting("seed");
  seed->set(42);
  emulated::setting("schedule")->set(1);
  EXPECT(seed->get() == 42 && emulated::setting("schedule")->get() == 1);
  EXPECT(emulated::setting("nothing") == nullptr);
  try {
    emulated::setting("schedule")->set(3);
    EXPECT(false);
  } catch (const std::invalid_argument&) {
  }
}

__global__ void rounding_kernel(float* out, float one, float small) {
  __syncthreads();
  out[threadIdx.x] = __fadd_rn(one, small) + __fmul_rn(0x1p-140f, one);
}

void check_rounding() {
  std::vector<float> out(64);
  std::fesetround(FE_UPWARD);
  launch("rounding", rounding_kernel, 1, 64, 0, kStream, out.data(), 1.f, 0x1p-30f);
  const int mode = std::fegetround();
  std::fesetround(FE_TONEAREST);
  EXPECT(mode == FE_UPWARD);
  for (const float value : out) EXPECT(value == 1.f);
}

void check_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([] {
      for (int round = 0; round < 5; ++round) {
        check_sort();
        check_scan();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void check_limits() {
  const auto refusal = [](int64_t grid, int block) {
    unsigned long long count = 0;
    try {
      launch("limits", count_kernel, grid, block, 0, kStream, &count);
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT(refusal(1, 1024).empty());
  EXPECT(refusal(1, 1025) == "limits: a block of 1025 threads; CUDA has 1 to 1024");
  EXPECT(refusal(1, 0) == "limits: a block of 0 threads; CUDA has 1 to 1024");
  EXPECT(refusal(int64_t(1) << 31, 1) ==
         "limits: a grid of 2147483648 blocks; CUDA has at most 2^31 - 1");
}

}  // namespace

int main() {
  const struct {
    Schedule kind;
    uint64_t seed;
  } schedules[] = {{Schedule::in_order, 0},
                   {Schedule::reversed, 0},
                   {Schedule::shuffled, 1},
                   {Schedule::shuffled, 2}};
  for (const auto& schedule : schedules) {
    emulated::set_schedule(schedule.kind, schedule.seed);
    check_sums();
    check_scan();
    check_barrier_votes();
    check_shuffles<int>();
    check_shuffles<unsigned>();
    check_shuffles<int64_t>();
    check_shuffles<unsigned long long>();
    check_shuffles<float>();
    check_shuffles<double>();
    check_votes();
    check_groups();
    check_sort();
    check_warp_exchange();
    check_operators();
    check_atomics();
    check_packs<float, 1>();
    check_packs<float, 4>();
    check_packs<float, 8>();
    check_packs<Half, 8>();
    check_packs<BFloat16, 4>();
    check_conversions<Half>(10);
    check_conversions<BFloat16>(7);
    check_intrinsics();
    check_rounding();
    check_threads();
  }
  check_schedules();
  check_statistics();
  check_limits();
  std::printf("all as expected\n");
  return 0;
}
