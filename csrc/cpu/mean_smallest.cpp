// Two passes. The first counts distances by the top eleven bits of their keys, which tells the bin
// that the k-th smallest lies in; the second collects the keys of that bin, to select in it. Keys
// of one bin are equally spaced distances, so that a bin is summed by counting and by adding the
// low bits as integers: exactly, and thus alike for any number of threads.

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>
#include <vector>

#include "cpu/graph.h"
#include "cpu/parallel.h"
#include "half.h"
#include "ops.h"
#include "smallest_digits.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "mean_smallest";
constexpr int kZero = kDigits;  // where zeros are counted

int bin_of(uint32_t key) { return digit_of(key, 0); }
uint32_t first_key(int bin) { return uint32_t(bin) << digit_shift(0); }
uint32_t low_bits(uint32_t key) { return key - first_key(bin_of(key)); }

struct Bin {
  int64_t count = 0, low = 0;  // keys, and their low bits added up

  void add(uint32_t key) {
    ++count;
    low += low_bits(key);
  }

  // Of the distances that the keys stand for.
  double sum(int bin) const {
    if (count == 0) return 0;
    const double first = bits_float(float_bits_of(first_key(bin)));
    const double step = double(bits_float(float_bits_of(first_key(bin) + 1))) - first;
    return double(count) * first + double(low) * step;
  }
};

// Pairs above the diagonal, row by row: visit(distance).
struct DensePairs {
  const Distances& distances;

  int64_t mean_entries() const { return distances.samples; }

  template <class Visit>
  void each(int64_t row, Visit visit) const {
    const float* const values = distances.values + row * distances.samples;
    for (int64_t i = row + 1; i < distances.samples; ++i) visit(values[i]);
  }
};

template <class Index>
struct SparsePairs {
  const Distances& distances;

  int64_t mean_entries() const { return distances.indices.size / (1 + distances.samples); }

  template <class Visit>
  void each(int64_t row, Visit visit) const {
    const auto* const indices = static_cast<const Index*>(distances.indices.data);
    const auto [begin, end] = row_at(distances, row);
    for (int64_t i = begin; i < end; ++i)
      if (indices[i] > row) visit(distances.values[i]);
  }
};

template <class Pairs, class Body>
void parallel_rows(const Pairs& pairs, Body body) {
  constexpr int64_t kWorthAThread = 1 << 15;  // distances
  parallel_for(pairs.distances.samples, 1 + kWorthAThread / (1 + pairs.mean_entries()), body);
}

using Counts = std::array<int64_t, kDigits + 1>;

template <class Pairs>
Counts count(const Pairs& pairs) {
  Counts total{};
  std::mutex mutex;
  parallel_rows(pairs, [&](int64_t begin, int64_t end) {
    std::array<Counts, 4> mine{};  // in turn: neighbours often fall into the same bin
    for (int64_t row = begin; row < end; ++row) {
      unsigned turn = 0;
      pairs.each(row, [&](float distance) {
        const int bin = bin_of(distance_key(float_bits(distance)));
        ++mine[turn++ % 4][distance == 0.f ? kZero : bin];
      });
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (const Counts& counts : mine)
      for (int bin = 0; bin <= kZero; ++bin) total[bin] += counts[bin];
  });
  return total;
}

struct Split {
  std::vector<Bin> bins = std::vector<Bin>(kDigits);  // below the chosen one
  std::vector<uint32_t> inside;                       // keys in the chosen one
};

template <class Pairs>
Split split(const Pairs& pairs, int chosen) {
  Split total;
  std::mutex mutex;
  const uint32_t last = first_key(chosen) + (first_key(1) - 1);
  parallel_rows(pairs, [&](int64_t begin, int64_t end) {
    Split mine;
    for (int64_t row = begin; row < end; ++row)
      pairs.each(row, [&](float distance) {
        const uint32_t key = distance_key(float_bits(distance));
        if (key > last || distance == 0.f) return;
        if (bin_of(key) == chosen)
          mine.inside.push_back(key);
        else
          mine.bins[bin_of(key)].add(key);
      });
    const std::lock_guard<std::mutex> lock(mutex);
    for (int bin = 0; bin < chosen; ++bin) {
      total.bins[bin].count += mine.bins[bin].count;
      total.bins[bin].low += mine.bins[bin].low;
    }
    total.inside.insert(total.inside.end(), mine.inside.begin(), mine.inside.end());
  });
  return total;
}

// The rank-th smallest (from 1) of the keys and of `ones` keys of 1, which is the first of its bin.
uint32_t select(std::vector<uint32_t>& keys, int64_t ones, int64_t rank) {
  if (rank <= ones) return kOneKey;
  const auto nth = keys.begin() + (rank - ones - 1);
  std::nth_element(keys.begin(), nth, keys.end());
  return *nth;
}

template <class Pairs>
Smallest run(const Pairs& pairs, bool dense, double fraction) {
  Counts counts = count(pairs);
  Smallest found{};
  for (int bin = 0; bin < kDigits; ++bin) found.stored += counts[bin];
  found.counted = dense ? found.stored : pairs_of(pairs.distances.samples) - counts[kZero];
  found.taken = int64_t(std::rint(fraction * double(found.counted)));
  if (found.taken == 0) return found;

  const int64_t absent = found.counted - found.stored;
  counts[bin_of(kOneKey)] += absent;
  int bin = 0;
  int64_t rank = found.taken;  // in the bin
  while (counts[bin] < rank) rank -= counts[bin++];
  Split parts = split(pairs, bin);
  const int64_t ones = bin == bin_of(kOneKey) ? absent : 0;
  const uint32_t key = select(parts.inside, ones, rank);
  Bin inside;
  for (const uint32_t other : parts.inside)
    if (other < key) inside.add(other);
  for (int i = 0; i < bin; ++i) found.sum += parts.bins[i].sum(i);
  found.sum += inside.sum(bin);
  found.ties = rank - inside.count - (key > kOneKey ? ones : 0);
  found.largest = float_bits_of(key);
  return found;
}

}  // namespace

size_t smallest_workspace(const Distances&) { return 0; }

void smallest(const Distances& distances, double fraction, Smallest* out, void*, Stream) {
  if (distances.indptr.data == nullptr) {
    *out = run(DensePairs{distances}, true, fraction);
    return;
  }
  check_graph(kOp, distances);
  *out = distances.indices.dtype == Dtype::int32
             ? run(SparsePairs<int32_t>{distances}, false, fraction)
             : run(SparsePairs<int64_t>{distances}, false, fraction);
}

}  // namespace pyreid
