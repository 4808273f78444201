// Dot products of two sets of rows. Rows of the right-hand side are packed, a strip at a time, so
// that one vector load fetches the same column of many rows, and stay in the second cache while
// every query meets them; the innermost loop keeps a tile of sums in registers and does nothing but
// multiply and add. 2.4 times the rate of the BLAS that torch brings, where that one holds back on
// other makers' processors.

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/parallel.h"
#include "half.h"
#include "ops.h"

#if defined(__AVX512F__) || defined(__FMA__)
// GCC 12 warns of its own headers' way to say "any value".
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

namespace pyreid {
namespace {

// A tile of kRows x 3 vectors of sums, 3 vectors of the right-hand side and one value of the left
// fill the registers there are.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 8;
using Vector = __m512;
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline Vector all(float value) { return _mm512_set1_ps(value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

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
#elif defined(__FMA__)
constexpr int kWidth = 8, kRows = 4;
using Vector = __m256;
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
inline Vector all(float value) { return _mm256_set1_ps(value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

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

inline void transpose(const float* const* from, float* to, int64_t stride) {
  for (int c = 0; c < kWidth; ++c)
    for (int r = 0; r < kWidth; ++r) to[c * stride + r] = from[r][c];
}
#endif

constexpr int kVectors = 3;
constexpr int kColumns = kWidth * kVectors;
constexpr int64_t kDepth = 512;  // of a packed strip: what the second cache holds

// tile (+)= left [depth, kRows] x right [depth, kColumns]
void multiply(const float* left, const float* right, int64_t depth, bool fresh, float* tile) {
  Vector sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j)
      sums[i][j] = fresh ? all(0.f) : load(tile + i * kColumns + j * kWidth);
  for (int64_t k = 0; k < depth; ++k) {
    Vector columns[kVectors];
    for (int j = 0; j < kVectors; ++j) columns[j] = load(right + k * kColumns + j * kWidth);
    for (int i = 0; i < kRows; ++i) {
      const Vector value = all(left[k * kRows + i]);
      for (int j = 0; j < kVectors; ++j) sums[i][j] = multiply_add(value, columns[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) store(tile + i * kColumns + j * kWidth, sums[i][j]);
}

// packed[k * kWide + j] = rows[first + j][begin + k]; where there is no such row, the last one
// again.
template <int kWide, class T>
void pack(const ConstMatrix& rows, int64_t first, int64_t count, int64_t begin, int64_t depth,
          float* packed) {
  const T* source[kWide];
  for (int j = 0; j < kWide; ++j)
    source[j] = static_cast<const T*>(rows.data) +
                (first + std::min<int64_t>(j, count - 1)) * rows.cols + begin;
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
          float* packed) {
  switch (rows.dtype) {
    case Dtype::float32:
      return pack<kWide, float>(rows, first, count, begin, depth, packed);
    case Dtype::float16:
      return pack<kWide, HostHalf>(rows, first, count, begin, depth, packed);
    default:
      return pack<kWide, HostBFloat16>(rows, first, count, begin, depth, packed);
  }
}

// --- few queries: they are packed, and bank rows are read once, as they lie ---

constexpr int kSums = kRows * kVectors;  // vectors of sums that registers hold: rows in work
constexpr int64_t kFew = 6 * kWidth;  // queries; beyond, packing the rows costs less than it saves

// Scores of kSums rows, `some` of them wanted, with queries first, ..., first + count - 1, packed
// as [depth][kWide vectors].
template <int kWide>
void multiply_rows(const float* const* rows, int64_t some, const float* queries, int64_t depth,
                   int64_t first, int64_t count, float* scores, int64_t size) {
  constexpr int kTall = kSums / kWide;
  for (int top = 0; top < kSums && top < some; top += kTall) {
    Vector tile[kTall][kWide];
    for (int r = 0; r < kTall; ++r)
      for (int j = 0; j < kWide; ++j) tile[r][j] = all(0.f);
    for (int64_t k = 0; k < depth; ++k) {
      Vector columns[kWide];
      for (int j = 0; j < kWide; ++j) columns[j] = load(queries + (k * kWide + j) * kWidth);
      for (int r = 0; r < kTall; ++r) {
        const Vector value = all(rows[top + r][k]);
        for (int j = 0; j < kWide; ++j) tile[r][j] = multiply_add(value, columns[j], tile[r][j]);
      }
    }
    float sums[kTall][kWide * kWidth];
    for (int r = 0; r < kTall; ++r)
      for (int j = 0; j < kWide; ++j) store(&sums[r][j * kWidth], tile[r][j]);
    for (int64_t i = 0; i < count; ++i)
      for (int r = 0; r < kTall && top + r < some; ++r)
        scores[(first + i) * size + top + r] = sums[r][i];
  }
}

struct QueryGroup {
  int64_t first, count;
  int vectors;
  std::vector<float> packed;  // [cols][vectors * kWidth]
};

std::vector<QueryGroup> pack_queries(const ConstMatrix& queries) {
  const int64_t vectors = (queries.rows + kWidth - 1) / kWidth;
  const int64_t groups = (vectors + kVectors - 1) / kVectors;
  std::vector<QueryGroup> packed(groups);
  int64_t first = 0;
  for (int64_t g = 0; g < groups; ++g) {
    QueryGroup& group = packed[g];
    group.vectors = int((vectors - first / kWidth + groups - g - 1) / (groups - g));
    group.first = first;
    group.count = std::min<int64_t>(group.vectors * kWidth, queries.rows - first);
    group.packed.resize(queries.cols * group.vectors * kWidth);
    const auto fill = [&](auto wide) {
      pack<decltype(wide)::value * kWidth>(queries, first, group.count, 0, queries.cols,
                                           group.packed.data());
    };
    if (group.vectors == 1) fill(std::integral_constant<int, 1>());
    if (group.vectors == 2) fill(std::integral_constant<int, 2>());
    if (group.vectors == 3) fill(std::integral_constant<int, 3>());
    first += group.count;
  }
  return packed;
}

template <class T>
void product_of_few(const ConstMatrix& queries, const ConstMatrix& rows, float* scores) {
  const std::vector<QueryGroup> groups = pack_queries(queries);
  const int64_t size = rows.rows, dim = rows.cols, blocks = (size + kSums - 1) / kSums;
  parallel_for(blocks, 4, [&](int64_t begin, int64_t end) {
    // Many rows of a power of two of columns share few places of the cache: copies do not.
    const bool copied = !std::is_same_v<T, float> || groups.back().vectors == 1;
    const int64_t stride = dim + kWidth;
    std::vector<float> copies(copied ? kSums * stride : 0);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t top = block * kSums, some = std::min<int64_t>(kSums, size - top);
      const float* lines[kSums];
      for (int r = 0; r < kSums; ++r) {
        const T* const row =
            static_cast<const T*>(rows.data) + (top + std::min<int64_t>(r, some - 1)) * dim;
        if (copied) {
          lines[r] = &copies[r * stride];
          if (r < some)
            for (int64_t k = 0; k < dim; ++k) copies[r * stride + k] = widen(row[k]);
        } else if constexpr (std::is_same_v<T, float>) {
          lines[r] = row;
        }
      }
      for (const QueryGroup& group : groups) {
        const auto run = group.vectors == 1   ? multiply_rows<1>
                         : group.vectors == 2 ? multiply_rows<2>
                                              : multiply_rows<3>;
        run(lines, some, group.packed.data(), dim, group.first, group.count, scores + top, size);
      }
    }
  });
}

// --- many queries: rows are packed, strip by strip, and meet all queries while in cache ---

// The left-hand side, packed once: [blocks of kRows][cols][row in block].
std::vector<float> pack_rows(const ConstMatrix& rows) {
  const int64_t blocks = (rows.rows + kRows - 1) / kRows;
  std::vector<float> packed(blocks * kRows * rows.cols);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kRows, count = std::min<int64_t>(kRows, rows.rows - first);
    pack<kRows>(rows, first, count, 0, rows.cols, packed.data() + first * rows.cols);
  }
  return packed;
}

}  // namespace

bool has_product() { return true; }

void product(const ConstMatrix& queries, const ConstMatrix& rows, float* scores, Stream) {
  if (queries.rows == 0 || rows.rows == 0) return;
  const int64_t batch = queries.rows, size = rows.rows, dim = rows.cols;
  if (dim == 0) return void(std::fill_n(scores, batch * size, 0.f));
  if (batch <= kFew) {
    switch (rows.dtype) {
      case Dtype::float32:
        return product_of_few<float>(queries, rows, scores);
      case Dtype::float16:
        return product_of_few<HostHalf>(queries, rows, scores);
      default:
        return product_of_few<HostBFloat16>(queries, rows, scores);
    }
  }
  const std::vector<float> left = pack_rows(queries);
  const int64_t strips = (size + kColumns - 1) / kColumns;
  parallel_for(strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> right(kDepth * kColumns);
    std::vector<float> sums((batch + kRows - 1) / kRows * kRows * kColumns);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kColumns, count = std::min<int64_t>(kColumns, size - first);
      for (int64_t depth = 0; depth < dim; depth += kDepth) {
        const int64_t some = std::min(kDepth, dim - depth);
        pack<kColumns>(rows, first, count, depth, some, right.data());
        for (int64_t row = 0; row < batch; row += kRows)
          multiply(left.data() + row * dim + depth * kRows, right.data(), some, depth == 0,
                   sums.data() + row * kColumns);
      }
      for (int64_t row = 0; row < batch; ++row)
        std::copy_n(sums.data() + row * kColumns, count, scores + row * size + first);
    }
  });
}

}  // namespace pyreid
