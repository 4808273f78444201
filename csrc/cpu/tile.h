// Tiles of dot products of two sets of rows. Rows of the right-hand side are packed, a strip at a
// time, so that one vector load fetches the same column of many rows, and stay in the second cache
// while every row of the left-hand side meets them; the innermost loop keeps a tile of sums in
// registers and does nothing but multiply and add. 2.4 times the rate of the BLAS that torch
// brings, where that one holds back on other makers' processors.
//
// A product's bits depend on the two rows alone, in either order, not on where in a tile they meet.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/parallel.h"
#include "half.h"
#include "tensor.h"

#if defined(__AVX512BW__) || defined(__AVX2__)
// GCC 12 warns of its own headers' way to say "any value".
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace pyreid {

// A tile of kRows x 3 vectors of sums, 3 vectors of the right-hand side and one value of the left
// fill the registers there are. `Whole`: sums of products of int16, which come in pairs, each pair
// in the place of a float.
#if defined(__AVX512BW__)
constexpr int kWidth = 16, kRows = 8;
using Vector = __m512;
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline Vector all(float value) { return _mm512_set1_ps(value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }
// As a number; left to GCC 12, it may be spilled as two bytes and read back as four.
inline uint32_t bits_of(__mmask16 mask) {
  uint32_t bits;
  __asm__("kmovw %1, %0" : "=r"(bits) : "k"(mask));
  return bits;
}
// Bit i: a[i] >= b[i].
inline uint32_t at_least(Vector a, Vector b) {
  return bits_of(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ));
}

using Whole = __m512i;
inline Whole load(const int32_t* from) { return _mm512_loadu_si512(from); }
inline void store(int32_t* to, Whole value) { _mm512_storeu_si512(to, value); }
inline Whole all(int32_t value) { return _mm512_set1_epi32(value); }
inline uint32_t at_least(Whole a, Whole b) { return bits_of(_mm512_cmpge_epi32_mask(a, b)); }
inline Whole multiply_add(Vector a, Vector b, Whole c) {
  return _mm512_add_epi32(c, _mm512_madd_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

// to[c * stride + r] = from[r][c] for a square of kWidth: pairs, fours, then quarters of registers.
inline void transpose(const float* const* from, float* to, int64_t stride) {
  Vector fours[16];  // [4 i + j]: column 4 lane + j of rows 4 i, ..., 4 i + 3
  for (int i = 0; i < 16; i += 4) {
    const Vector a = load(from[i]), b = load(from[i + 1]);
    const Vector c = load(from[i + 2]), d = load(from[i + 3]);
    const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
    const __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d low2 = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    const __m512d high2 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, low2));
    fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, low2));
    fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, high2));
    fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, high2));
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;
  for (int j = 0; j < 4; ++j) {
    const Vector even = _mm512_shuffle_f32x4(fours[j], fours[4 + j], kEven);
    const Vector odd = _mm512_shuffle_f32x4(fours[j], fours[4 + j], kOdd);
    const Vector even2 = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], kEven);
    const Vector odd2 = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], kOdd);
    store(to + j * stride, _mm512_shuffle_f32x4(even, even2, kEven));
    store(to + (4 + j) * stride, _mm512_shuffle_f32x4(odd, odd2, kEven));
    store(to + (8 + j) * stride, _mm512_shuffle_f32x4(even, even2, kOdd));
    store(to + (12 + j) * stride, _mm512_shuffle_f32x4(odd, odd2, kOdd));
  }
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kWidth = 8, kRows = 4;
using Vector = __m256;
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
inline Vector all(float value) { return _mm256_set1_ps(value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector smaller(Vector a, Vector b) { return _mm256_min_ps(a, b); }
// Bit i: a[i] >= b[i].
inline uint32_t at_least(Vector a, Vector b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}

using Whole = __m256i;
inline Whole load(const int32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline void store(int32_t* to, Whole value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
}
inline Whole all(int32_t value) { return _mm256_set1_epi32(value); }
inline uint32_t at_least(Whole a, Whole b) {
  return ~uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)))) & 0xff;
}
inline Whole multiply_add(Vector a, Vector b, Whole c) {
  return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}

// to[c * stride + r] = from[r][c] for a square of kWidth: pairs, fours, then halves of registers.
inline void transpose(const float* const* from, float* to, int64_t stride) {
  Vector fours[8];  // [4 i + j]: column 4 lane + j of rows 4 i, ..., 4 i + 3
  for (int i = 0; i < 8; i += 4) {
    const Vector a = load(from[i]), b = load(from[i + 1]);
    const Vector c = load(from[i + 2]), d = load(from[i + 3]);
    const __m256d low = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
    const __m256d high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d low2 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d high2 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    fours[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, low2));
    fours[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, low2));
    fours[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high, high2));
    fours[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high, high2));
  }
  for (int j = 0; j < 4; ++j) {
    store(to + j * stride, _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20));
    store(to + (4 + j) * stride, _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31));
  }
}
#else
constexpr int kWidth = 4, kRows = 4;
typedef float Vector __attribute__((vector_size(16)));
inline Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }
inline Vector all(float value) { return Vector{value, value, value, value}; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
inline Vector subtract(Vector a, Vector b) { return a - b; }
inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
// Bit i: a[i] >= b[i].
inline uint32_t at_least(Vector a, Vector b) {
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= uint32_t(a[i] >= b[i]) << i;
  return bits;
}

typedef int32_t Whole __attribute__((vector_size(16)));
inline Whole load(const int32_t* from) {
  Whole value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(int32_t* to, Whole value) { std::memcpy(to, &value, sizeof value); }
inline Whole all(int32_t value) { return Whole{value, value, value, value}; }
inline uint32_t at_least(Whole a, Whole b) {
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= uint32_t(a[i] >= b[i]) << i;
  return bits;
}
inline Whole multiply_add(Vector a, Vector b, Whole c) {
#if defined(__SSE2__)
  return c + Whole(_mm_madd_epi16(__m128i(a), __m128i(b)));
#else
  typedef int16_t Pairs __attribute__((vector_size(16)));
  const Pairs x = Pairs(a), y = Pairs(b);
  for (int i = 0; i < kWidth; ++i)
    c[i] += int32_t(x[2 * i]) * y[2 * i] + int32_t(x[2 * i + 1]) * y[2 * i + 1];
  return c;
#endif
}

inline void transpose(const float* const* from, float* to, int64_t stride) {
  for (int c = 0; c < kWidth; ++c)
    for (int r = 0; r < kWidth; ++r) to[c * stride + r] = from[r][c];
}
#endif

constexpr int kVectors = 3;
constexpr int kColumns = kWidth * kVectors;
constexpr int64_t kDepth = 512;  // of a packed strip: what the second cache holds

// So many products are added up before they join the sum of those before them: rounding errors are
// those of short sums, an eighth of what one of 2,048 products has.
constexpr int64_t kRun = 128;
static_assert(kDepth % kRun == 0);

// Products of floats, and of pairs of int16 with sums that wrap around.
struct Floats {
  using Sum = float;
  static constexpr bool kExact = false;
  static Vector add(Vector a, Vector b, Vector sums) { return multiply_add(a, b, sums); }
};
struct Pairs {
  using Sum = int32_t;
  static constexpr bool kExact = true;
  static Whole add(Vector a, Vector b, Whole sums) { return multiply_add(a, b, sums); }
};
#if defined(__AVX512BW__)
inline bool has_vnni() { return __builtin_cpu_supports("avx512vnni"); }

// In one instruction, which the assembler knows, if not the instruction level of this file.
struct VnniPairs {
  using Sum = int32_t;
  static constexpr bool kExact = true;
  static Whole add(Vector a, Vector b, Whole sums) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
  }
};
#else
inline bool has_vnni() { return false; }

using VnniPairs = Pairs;
#endif

// tile (+)= left [depth, kRows] x right [depth, kColumns]
template <class Products>
void multiply(const float* left, const float* right, int64_t depth, bool fresh,
              typename Products::Sum* tile) {
  using Sum = typename Products::Sum;
  constexpr bool kExact = Products::kExact;
  const int64_t run = kExact ? depth : kRun;
  for (int64_t begin = 0; begin < depth; begin += run, fresh = false) {
    decltype(all(Sum())) sums[kRows][kVectors];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j)
        sums[i][j] = kExact && !fresh ? load(tile + i * kColumns + j * kWidth) : all(Sum());
    for (int64_t k = begin; k < std::min(depth, begin + run); ++k) {
      Vector columns[kVectors];
      for (int j = 0; j < kVectors; ++j) columns[j] = load(right + k * kColumns + j * kWidth);
      for (int i = 0; i < kRows; ++i) {
        const Vector value = all(left[k * kRows + i]);
        for (int j = 0; j < kVectors; ++j)
          sums[i][j] = Products::add(value, columns[j], sums[i][j]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        Sum* const to = tile + i * kColumns + j * kWidth;
        if constexpr (!kExact)
          if (!fresh) sums[i][j] = load(to) + sums[i][j];
        store(to, sums[i][j]);
      }
    }
  }
}

// packed[k * kWide + j] = rows[first + j][begin + k], or, with ids, rows[ids[first + j]][begin +
// k]; where there is no such row, the last one again.
template <int kWide, class T>
void pack(const ConstMatrix& rows, int64_t first, int64_t count, int64_t begin, int64_t depth,
          float* packed, const int32_t* ids) {
  const T* source[kWide];
  for (int j = 0; j < kWide; ++j) {
    const int64_t row = first + std::min<int64_t>(j, count - 1);
    source[j] = static_cast<const T*>(rows.data) + (ids ? ids[row] : row) * rows.cols + begin;
  }
  int64_t k = 0;
  if constexpr (kWide % kWidth == 0) {
    float square[kWidth * kWidth];
    const float* lines[kWidth];
    for (; k + kWidth <= depth; k += kWidth) {
      for (int j = 0; j < kWide; j += kWidth) {
        for (int r = 0; r < kWidth; ++r) {
          if constexpr (std::is_same_v<T, float>) {
            lines[r] = source[j + r] + k;
          } else {
            lines[r] = square + r * kWidth;
            for (int c = 0; c < kWidth; ++c) square[r * kWidth + c] = widen(source[j + r][k + c]);
          }
        }
        transpose(lines, packed + k * kWide + j, kWide);
      }
    }
  }
  for (; k < depth; ++k)
    for (int j = 0; j < kWide; ++j) packed[k * kWide + j] = widen(source[j][k]);
}

template <int kWide>
void pack(const ConstMatrix& rows, int64_t first, int64_t count, int64_t begin, int64_t depth,
          float* packed, const int32_t* ids = nullptr) {
  switch (rows.dtype) {
    case Dtype::float32:
      return pack<kWide, float>(rows, first, count, begin, depth, packed, ids);
    case Dtype::float16:
      return pack<kWide, HostHalf>(rows, first, count, begin, depth, packed, ids);
    default:
      return pack<kWide, HostBFloat16>(rows, first, count, begin, depth, packed, ids);
  }
}

inline ConstMatrix rows_of(const ConstMatrix& matrix, int64_t first, int64_t count) {
  const int64_t offset = first * matrix.cols * size_of(matrix.dtype);
  return {static_cast<const char*>(matrix.data) + offset, matrix.dtype, count, matrix.cols};
}

// The left-hand side, packed once: [blocks of kRows][cols][row in block]; the blocks from `begin`
// to `end` of it.
inline void pack_blocks(const ConstMatrix& rows, int64_t begin, int64_t end, float* packed) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRows, count = std::min<int64_t>(kRows, rows.rows - first);
    pack<kRows>(rows, first, count, 0, rows.cols, packed + first * rows.cols);
  }
}

inline std::vector<float> pack_rows(const ConstMatrix& rows) {
  const int64_t blocks = (rows.rows + kRows - 1) / kRows;
  std::vector<float> packed(blocks * kRows * rows.cols);
  parallel_for(blocks, 8,
               [&](int64_t begin, int64_t end) { pack_blocks(rows, begin, end, packed.data()); });
  return packed;
}

// sums[row * kColumns + j] = dot product of row `row` of the packed left-hand side, of `count`
// rows, and rows[first + j], for the columns there are up to kColumns; or, with ids, of
// rows[ids[first + j]]. `right` and `sums` are resized as needed.
template <class Products>
void multiply_strip(const std::vector<float>& left, int64_t count, const ConstMatrix& rows,
                    int64_t first, int64_t columns, std::vector<float>& right,
                    std::vector<typename Products::Sum>& sums, const int32_t* ids = nullptr) {
  const int64_t dim = rows.cols;
  right.resize(kDepth * kColumns);
  sums.resize((count + kRows - 1) / kRows * kRows * kColumns);
  for (int64_t depth = 0; depth < dim; depth += kDepth) {
    const int64_t some = std::min(kDepth, dim - depth);
    pack<kColumns>(rows, first, columns, depth, some, right.data(), ids);
    for (int64_t row = 0; row < count; row += kRows)
      multiply<Products>(left.data() + row * dim + depth * kRows, right.data(), some, depth == 0,
                         sums.data() + row * kColumns);
  }
}

}  // namespace pyreid
