// Dot products of two sets of rows. Many queries: the rows are packed, a strip at a time, and meet
// all queries while in cache (cpu/tile.h). Few queries: see below.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "ops.h"

namespace pyreid {
namespace {

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
    float sums[kTall][kWide * kWidth];
    for (int64_t begin = 0; begin < depth; begin += kRun) {
      Vector tile[kTall][kWide];
      for (int r = 0; r < kTall; ++r)
        for (int j = 0; j < kWide; ++j) tile[r][j] = all(0.f);
      for (int64_t k = begin; k < std::min(depth, begin + kRun); ++k) {
        Vector columns[kWide];
        for (int j = 0; j < kWide; ++j) columns[j] = load(queries + (k * kWide + j) * kWidth);
        for (int r = 0; r < kTall; ++r) {
          const Vector value = all(rows[top + r][k]);
          for (int j = 0; j < kWide; ++j) tile[r][j] = multiply_add(value, columns[j], tile[r][j]);
        }
      }
      for (int r = 0; r < kTall; ++r) {
        for (int j = 0; j < kWide; ++j) {
          float* const to = &sums[r][j * kWidth];
          store(to, begin ? load(to) + tile[r][j] : tile[r][j]);
        }
      }
    }
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

}  // namespace

bool has_product() { return true; }

void product(const ConstMatrix& queries, const ConstMatrix& rows, float* scores, Stream) {
  if (queries.rows == 0 || rows.rows == 0) return;
  const int64_t batch = queries.rows, size = rows.rows;
  if (rows.cols == 0) return void(std::fill_n(scores, batch * size, 0.f));
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
    std::vector<float> right, sums;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kColumns, count = std::min<int64_t>(kColumns, size - first);
      multiply_strip<Floats>(left, batch, rows, first, count, right, sums);
      for (int64_t row = 0; row < batch; ++row)
        std::copy_n(sums.data() + row * kColumns, count, scores + row * size + first);
    }
  });
}

}  // namespace pyreid
