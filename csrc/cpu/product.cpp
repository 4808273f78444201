#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "ops.h"

namespace pyreid {

bool has_product() { return true; }

void product(const ConstMatrix& queries, const ConstMatrix& rows, float* scores, Stream) {
  if (queries.rows == 0 || rows.rows == 0) return;
  const int64_t batch = queries.rows, size = rows.rows;
  if (rows.cols == 0) return void(std::fill_n(scores, batch * size, 0.f));
  const std::vector<float> left = pack_rows(queries);
  const int64_t strips = (size + kColumns - 1) / kColumns;
  parallel_for(strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> right, sums;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kColumns, count = std::min<int64_t>(kColumns, size - first);
      multiply_strip(left, batch, rows, first, right, sums);
      for (int64_t row = 0; row < batch; ++row)
        std::copy_n(sums.data() + row * kColumns, count, scores + row * size + first);
    }
  });
}

}  // namespace pyreid
