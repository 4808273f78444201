// Rows drawn at random. Rows are grouped once; a sample's draws are then independent of one
// another, and of every other sample's. The network of RandomOrder runs on many places at once, in
// vector units; the few results that leave the range walk on alone.

#include <algorithm>
#include <stdexcept>
#include <string>

#include "candidates.h"
#include "cpu/group.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace pyreid {
namespace {

constexpr int kBatch = 256;  // places at a time

// rows[j] = row(order(j % order.size)) for all j.
template <class Row>
void draw(const RandomOrder& order, int64_t count, int64_t* rows, Row row) {
  const int64_t distinct = std::min<int64_t>(count, order.size);
  uint32_t places[kBatch];
  int owners[kBatch];
  for (int64_t begin = 0; begin < distinct; begin += kBatch) {
    int walking = int(std::min<int64_t>(kBatch, distinct - begin));
    for (int i = 0; i < walking; ++i) {
      places[i] = uint32_t(begin + i);
      owners[i] = i;
    }
    while (walking > 0) {
      for (int i = 0; i < walking; ++i) places[i] = order.once(places[i]);
      int left = 0;
      for (int i = 0; i < walking; ++i) {
        const uint32_t place = places[i];
        const bool out = place >= order.size;
        rows[begin + owners[i]] = row(out ? 0 : place);  // not a branch, which would be a guess
        places[left] = place;
        owners[left] = owners[i];
        left += out ? 1 : 0;
      }
      walking = left;
    }
  }
  for (int64_t j = distinct; j < count; ++j) rows[j] = rows[j - distinct];
}

Candidates candidates(const RowSampling& sampling, const Groups& groups, int64_t sample) {
  const auto id_of = [&](int64_t start) { return id_at(sampling.groups, groups.positions[start]); };
  const auto find = [&](int64_t id) {
    return std::lower_bound(groups.starts.begin(), groups.starts.end() - 1, id,
                            [&](int64_t start, int64_t wanted) { return id_of(start) < wanted; });
  };
  Candidates found{0, 0, sampling.groups.size, -1};
  const int64_t target = id_at(sampling.targets, sample);
  const auto block = find(target);
  if (target >= 0 && block != groups.starts.end() - 1 && id_of(*block) == target) {
    found.begin = block[0];
    found.end = block[1];
  }
  if (sampling.exclude.data != nullptr) {
    const int64_t row = id_at(sampling.exclude, sample);
    const auto own = find(id_at(sampling.groups, row));
    const auto rows = groups.positions.begin();
    found.self = std::lower_bound(rows + own[0], rows + own[1], row) - rows;
  }
  return found;
}

void check_values(const RowSampling& sampling) {
  if (sampling.exclude.data == nullptr) return;
  for (int64_t i = 0; i < sampling.exclude.size; ++i) {
    const int64_t row = id_at(sampling.exclude, i);
    if (row < 0 || row >= sampling.groups.size)
      throw std::invalid_argument("sample_rows: exclude_self must lie in [0, " +
                                  std::to_string(sampling.groups.size) + "), got " +
                                  std::to_string(row) + " at position " + std::to_string(i));
  }
}

}  // namespace

size_t row_sampling_workspace(const RowSampling&) { return 0; }

void row_sampling(const RowSampling& sampling, void*, Stream) {
  check_values(sampling);
  const Groups groups = group({sampling.groups});
  const auto sample_rows = [&](int64_t sample, Draw purpose, int64_t size, int64_t count,
                               int64_t* rows, auto place) {
    if (size == 0) return void(std::fill_n(rows, count, -1));
    const RandomOrder order(sampling.seed, uint32_t(sample), uint32_t(purpose), uint32_t(size));
    draw(order, count, rows, [&](uint32_t i) { return groups.positions[place(i)]; });
  };
  constexpr int64_t kWorthAThread = 1024;  // draws; below, waking a thread costs more
  const int64_t draws = sampling.positives + sampling.negatives;
  parallel_for(sampling.targets.size, 1 + kWorthAThread / (1 + draws),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const Candidates found = candidates(sampling, groups, i);
                   sample_rows(i, Draw::positives, found.positives(), sampling.positives,
                               sampling.positive_rows + i * sampling.positives,
                               [&](int64_t j) { return found.positive(j); });
                   sample_rows(i, Draw::negatives, found.negatives(), sampling.negatives,
                               sampling.negative_rows + i * sampling.negatives,
                               [&](int64_t j) { return found.negative(j); });
                 }
               });
}

}  // namespace pyreid
