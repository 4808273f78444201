// Times are few beside pairs: the histogram is counted by one thread and smoothed by all, a pair of
// cameras each. Of the distances, a row is a look-up of its times, then a loop without branches.

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/exp.h"
#include "cpu/group.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace pyreid {
namespace {

// The images of a cluster in a camera.
struct Cell {
  int64_t images = 0, frames = 0, first = INT64_MAX;

  double mean() const { return double(frames) / double(images); }
};

void check_cameras(const char* op, const char* name, const Ids& cameras, int64_t count) {
  for (int64_t i = 0; i < cameras.size; ++i) {
    const int64_t camera = id_at(cameras, i);
    if (camera < 0 || camera >= count)
      throw std::invalid_argument(std::string(op) + ": " + name + " must lie in [0, " +
                                  std::to_string(count) + "), got " + std::to_string(camera));
  }
}

// counts[later][earlier][bin] += more, if there is such a bin.
struct Counts {
  const TimeHistogram& task;
  std::vector<int64_t> values =
      std::vector<int64_t>(size_t(task.cameras * task.cameras * task.bins), 0);

  void add(int64_t later, int64_t earlier, double time, int64_t more) {
    const double bin = std::floor(time / double(task.bin));
    if (bin < double(task.bins))
      values[(later * task.cameras + earlier) * task.bins + int64_t(bin)] += more;
  }
};

Counts counted(const TimeHistogram& task) {
  const int64_t cameras = task.cameras;
  std::vector<Cell> cells(size_t(task.count * cameras));
  const auto for_each = [&](const auto& body) {
    for (int64_t i = 0; i < task.clusters.size; ++i) {
      const int64_t cluster = id_at(task.clusters, i), frame = id_at(task.seen.frames, i);
      if (cluster < 0 || cluster >= task.count || frame < 0) continue;
      const int64_t camera = id_at(task.seen.cameras, i);
      body(cells[cluster * cameras + camera], camera, frame);
    }
  };
  for_each([](Cell& cell, int64_t, int64_t frame) {
    ++cell.images;
    cell.frames += frame;
    cell.first = std::min(cell.first, frame);
  });
  Counts counts{task};
  for (int64_t cluster = 0; cluster < task.count; ++cluster) {
    const Cell* const of = cells.data() + cluster * cameras;
    for (int64_t a = 0; a < cameras; ++a) {
      for (int64_t b = a + 1; of[a].images > 0 && b < cameras; ++b) {
        if (of[b].images == 0) continue;
        const double time = of[a].mean() - of[b].mean();
        time > 0 ? counts.add(a, b, time, 1) : counts.add(b, a, -time, 1);
      }
    }
  }
  for_each([&](const Cell& cell, int64_t camera, int64_t frame) {
    counts.add(camera, camera, double(frame - cell.first), cell.images);
  });
  return counts;
}

}  // namespace

size_t time_histogram_workspace(const TimeHistogram&) { return 0; }

void time_histogram(const TimeHistogram& task, float* histogram, void*, Stream) {
  check_cameras("time_histogram", "cameras", task.seen.cameras, task.cameras);
  const Counts counts = counted(task);
  std::vector<double> taps(size_t(task.reach) + 1, 1.);
  for (int64_t k = 1; k <= task.reach; ++k)
    taps[k] = std::exp(-0.5 * double(k) * double(k) / (task.sigma * task.sigma));
  parallel_for(task.cameras * task.cameras, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> smooth(size_t(task.bins));
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t* const count = counts.values.data() + pair * task.bins;
      std::fill(smooth.begin(), smooth.end(), 0.);
      for (int64_t j = 0; j < task.bins; ++j) {
        if (count[j] == 0) continue;
        const int64_t last = std::min(task.bins - 1, j + task.reach);
        for (int64_t i = std::max<int64_t>(0, j - task.reach); i <= last; ++i)
          smooth[i] += double(count[j]) * taps[std::abs(i - j)];
      }
      double total = 0.;
      for (const double value : smooth) total += value;
      float* const out = histogram + pair * task.bins;
      for (int64_t i = 0; i < task.bins; ++i) out[i] = total > 0. ? float(smooth[i] / total) : 0.f;
    }
  });
}

void joint_block(const char* op, const float* scores, const Sightings& queries,
                 const Sightings& gallery, const JointTerms& terms, float* distances,
                 int64_t stride, int64_t column, Stream) {
  check_cameras(op, "cameras", gallery.cameras, terms.cameras);
  check_cameras(op, "query_cameras", queries.cameras, terms.cameras);
  const int64_t size = gallery.cameras.size, limit = terms.bin * terms.bins;
  const auto likelihood = [](float weight, float exponent) {
    return 1.f / (1.f + weight * vector_exp(std::min(exponent, 88.f)));
  };
  parallel_for(queries.cameras.size, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> times(static_cast<size_t>(size));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t own = id_at(queries.cameras, i), frame = id_at(queries.frames, i);
      for (int64_t j = 0; j < size; ++j) {
        const int64_t other = id_at(gallery.cameras, j), seen = id_at(gallery.frames, j);
        const bool later = frame > seen || (frame == seen && own > other);
        const int64_t time = later ? frame - seen : seen - frame;
        const int64_t pair = later ? own * terms.cameras + other : other * terms.cameras + own;
        const bool known = frame >= 0 && seen >= 0 && time < limit;
        times[j] = known ? terms.histogram[pair * terms.bins + time / terms.bin] : 0.f;
      }
      const float* const score = scores + i * size;
      float* const out = distances + i * stride + column;
      for (int64_t j = 0; j < size; ++j)
        out[j] = 1.f - likelihood(terms.visual, -terms.gamma * score[j]) *
                           likelihood(terms.temporal, -terms.gamma * times[j]);
    }
  });
}

}  // namespace pyreid
