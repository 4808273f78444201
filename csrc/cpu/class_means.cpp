// Means of the rows of each class. Rows are grouped once; then a thread sums a stretch of columns
// of one class, four rows at a time, in buffers that stay in its cache.

#include <algorithm>

#include "cpu/group.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "half.h"
#include "ops.h"

namespace pyreid {
namespace {

constexpr int64_t kRun = 32;       // rows that are summed plainly
constexpr int64_t kColumns = 512;  // of a class that one thread sums at a time

// What class_means_count leaves in the workspace.
struct Layout {
  int64_t* rows;    // [N] grouped
  int64_t* starts;  // [2 M] first and end of each class in rows

  Layout(const Classes& classes, void* workspace)
      : rows(static_cast<int64_t*>(workspace)), starts(rows + classes.labels.size) {}
};

template <class T>
struct Averager {
  const Classes& classes;
  const Means& means;
  const Layout layout;
  const int64_t dim = classes.features.cols;

  // sum[d] = features of `count` rows, from column `first` on.
  void sum_run(float* sum, const int64_t* rows, int64_t count, int64_t first, int64_t width) const {
    const auto at = [&](int64_t i) {
      return static_cast<const T*>(classes.features.data) + rows[i] * dim + first;
    };
    int64_t i = count % 4;
    const T* a = at(0);
    if (i == 0) {
      std::fill_n(sum, width, 0.f);
    } else if (i == 1) {
      for (int64_t k = 0; k < width; ++k) sum[k] = 0.f + widen(a[k]);
    } else if (i == 2) {
      const T* const b = at(1);
      for (int64_t k = 0; k < width; ++k) sum[k] = (0.f + widen(a[k])) + widen(b[k]);
    } else {
      const T *const b = at(1), *const c = at(2);
      for (int64_t k = 0; k < width; ++k)
        sum[k] = ((0.f + widen(a[k])) + widen(b[k])) + widen(c[k]);
    }
    for (; i < count; i += 4) {
      a = at(i);
      const T *const b = at(i + 1), *const c = at(i + 2), *const d = at(i + 3);
      for (int64_t k = 0; k < width; ++k)
        sum[k] = (((sum[k] + widen(a[k])) + widen(b[k])) + widen(c[k])) + widen(d[k]);
    }
  }

  void average(int64_t index, int64_t first) const {
    const int64_t begin = layout.starts[2 * index], end = layout.starts[2 * index + 1];
    const int64_t width = std::min(kColumns, dim - first);
    float sum[kColumns], total[kColumns] = {}, lost[kColumns] = {};
    for (int64_t i = begin; i < end; i += kRun) {
      sum_run(sum, layout.rows + i, std::min(kRun, end - i), first, width);
      for (int64_t k = 0; k < width; ++k) {
        const float term = sum[k] - lost[k], next = total[k] + term;
        lost[k] = (next - total[k]) - term;
        total[k] = next;
      }
    }
    float* const mean = means.means + index * dim + first;
    for (int64_t k = 0; k < width; ++k) mean[k] = total[k] / float(end - begin);
  }

  void run() const {
    constexpr int64_t kWorthAThread = 8192;  // elements; below, waking a thread costs more
    const int64_t tiles = (dim + kColumns - 1) / kColumns;
    const int64_t elements = 1 + classes.features.rows * dim / (means.classes * tiles);
    parallel_for(means.classes * tiles, 1 + kWorthAThread / elements,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) average(i / tiles, i % tiles * kColumns);
                 });
    if (!means.normalize) return;
    parallel_for(means.classes, 1 + kWorthAThread / dim, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) scale_to_unit(means.means + i * dim, dim);
    });
  }
};

}  // namespace

size_t class_means_workspace(const Classes& classes) {
  return sizeof(int64_t) * size_t(3 * classes.labels.size);
}

void class_means_count(const Classes& classes, int64_t* count, void* workspace, Stream) {
  const Layout layout(classes, workspace);
  const Groups groups = classes.cameras.data == nullptr ? group({classes.labels})
                                                        : group({classes.cameras, classes.labels});
  std::copy(groups.positions.begin(), groups.positions.end(), layout.rows);
  int64_t found = 0;
  for (int64_t g = 0; g < groups.count(); ++g) {
    if (id_at(classes.labels, groups.positions[groups.starts[g]]) < 0) continue;
    layout.starts[2 * found] = groups.starts[g];
    layout.starts[2 * found + 1] = groups.starts[g + 1];
    ++found;
  }
  *count = found;
}

void class_means_fill(const Classes& classes, const Means& means, void* workspace, Stream) {
  const Layout layout(classes, workspace);
  for (int64_t i = 0; i < means.classes; ++i) {
    const int64_t begin = layout.starts[2 * i], row = layout.rows[begin];
    means.labels[i] = id_at(classes.labels, row);
    if (means.cameras != nullptr) means.cameras[i] = id_at(classes.cameras, row);
    means.counts[i] = layout.starts[2 * i + 1] - begin;
  }
  if (means.classes == 0 || classes.features.cols == 0) return;
  switch (classes.features.dtype) {
    case Dtype::float32:
      return Averager<float>{classes, means, layout}.run();
    case Dtype::float16:
      return Averager<HostHalf>{classes, means, layout}.run();
    default:
      return Averager<HostBFloat16>{classes, means, layout}.run();
  }
}

}  // namespace pyreid
