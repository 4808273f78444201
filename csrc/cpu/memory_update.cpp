// Momentum update of bank rows. Events are grouped by row; each row is moved by one thread, in a
// float32 buffer that stays in its cache, and written once.

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/group.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "half.h"
#include "ops.h"

namespace pyreid {
namespace {

void normalize(float* row, const Parts& parts) {
  int begin = 0;
  for (int part = 0; part < parts.count; ++part) {
    const int end = parts.size > 0 ? begin + parts.size : parts.ends[part];
    scale_to_unit(row + begin, end - begin);
    begin = end;
  }
}

template <class Source>
void blend(float* row, float keep, const Source* source, float take, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) row[i] = keep * row[i] + take * widen(source[i]);
}

template <class Bank, class Feature>
struct Updater {
  const MemoryUpdate& update;
  const int64_t dim = update.bank.cols;

  const Feature* feature(int64_t event) const {
    return static_cast<const Feature*>(update.features.data) + event * dim;
  }
  float keep(int64_t event) const { return update.momenta ? update.momenta[event] : update.keep; }
  float take(int64_t event) const {
    return update.momenta ? 1.f - update.momenta[event] : update.take;
  }

  int64_t hardest(const float* row, const int64_t* events, int64_t count) const {
    int64_t best = events[0];
    float smallest = INFINITY;
    for (int64_t i = 0; i < count; ++i) {
      const Feature* const x = feature(events[i]);
      const float dot = lane_sum(dim, [=](int64_t d) { return row[d] * widen(x[d]); });
      if (dot < smallest) {
        smallest = dot;
        best = events[i];
      }
    }
    return best;
  }

  void mean(float* row, const Bank* old, const int64_t* events, int64_t count) const {
    float kept = 0.f;
    for (int64_t d = 0; d < dim; ++d) row[d] = 0.f;
    for (int64_t i = 0; i < count; ++i) {
      kept += keep(events[i]);
      blend(row, 1.f, feature(events[i]), take(events[i]), dim);
    }
    blend(row, 1.f / float(count), old, kept / float(count), dim);
  }

  // The events of one bank row, ascending.
  void apply(float* row, const int64_t* events, int64_t count) const {
    const int64_t index = id_at(update.rows, events[0]);
    Bank* const old = static_cast<Bank*>(update.bank.data) + index * dim;
    for (int64_t d = 0; d < dim; ++d) row[d] = widen(old[d]);
    if (update.repeats == Repeats::sequential) {
      for (int64_t i = 0; i < count; ++i) {
        blend(row, keep(events[i]), feature(events[i]), take(events[i]), dim);
        if (update.normalize) normalize(row, update.parts);
      }
    } else {
      if (update.repeats == Repeats::mean) {
        mean(row, old, events, count);
      } else {
        const int64_t chosen = update.repeats == Repeats::last ? events[count - 1]
                               : count == 1                    ? events[0]
                                                               : hardest(row, events, count);
        blend(row, keep(chosen), feature(chosen), take(chosen), dim);
      }
      if (update.normalize) normalize(row, update.parts);
    }
    for (int64_t d = 0; d < dim; ++d) old[d] = narrow<Bank>(row[d]);
  }

  void run() const {
    const Groups groups = group({update.rows});
    constexpr int64_t kWorthAThread = 8192;  // elements; below, waking a thread costs more
    parallel_for(groups.count(), 1 + kWorthAThread / dim, [&](int64_t begin, int64_t end) {
      std::vector<float> row(dim);
      for (int64_t i = begin; i < end; ++i)
        apply(row.data(), &groups.positions[groups.starts[i]],
              groups.starts[i + 1] - groups.starts[i]);
    });
  }
};

// Everything is checked before anything is written.
void check_values(const MemoryUpdate& update) {
  for (int64_t i = 0; i < update.rows.size; ++i) {
    const int64_t row = id_at(update.rows, i);
    if (row < 0 || row >= update.bank.rows)
      throw std::invalid_argument("memory_update_: rows must lie in [0, " +
                                  std::to_string(update.bank.rows) + "), got " +
                                  std::to_string(row) + " at position " + std::to_string(i));
    if (update.momenta != nullptr && !(update.momenta[i] >= 0.f && update.momenta[i] <= 1.f))
      throw std::invalid_argument("memory_update_: momentum must lie in [0, 1], got " +
                                  std::to_string(update.momenta[i]) + " at position " +
                                  std::to_string(i));
  }
}

template <class Bank>
void dispatch_features(const MemoryUpdate& update) {
  switch (update.features.dtype) {
    case Dtype::float32:
      return Updater<Bank, float>{update}.run();
    case Dtype::float16:
      return Updater<Bank, HostHalf>{update}.run();
    default:
      return Updater<Bank, HostBFloat16>{update}.run();
  }
}

}  // namespace

size_t memory_update_workspace(const MemoryUpdate&) { return 0; }

void memory_update(const MemoryUpdate& update, void*, Stream) {
  check_values(update);
  if (update.rows.size == 0 || update.bank.cols == 0) return;
  switch (update.bank.dtype) {
    case Dtype::float32:
      return dispatch_features<float>(update);
    case Dtype::float16:
      return dispatch_features<HostHalf>(update);
    default:
      return dispatch_features<HostBFloat16>(update);
  }
}

}  // namespace pyreid
