// The k-th smallest distance by its digits from the top: each pass counts, of the distances that
// begin with the digits found so far, how many have which next digit. Then one pass adds up those
// below it, row by row, and the rows in order: the same sum for any number of threads.

#include <array>
#include <cmath>
#include <mutex>
#include <vector>

#include "cpu/graph.h"
#include "cpu/parallel.h"
#include "half.h"
#include "mine_key.h"
#include "ops.h"
#include "smallest_digits.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "mean_smallest";

// visit(distance) for the row's pairs in the strict upper triangle.
template <class Visit>
void each_above(const Distances& distances, int64_t row, Visit visit) {
  if (distances.indptr.data == nullptr) {
    const float* const values = distances.values + row * distances.samples;
    for (int64_t i = row + 1; i < distances.samples; ++i) visit(values[i]);
    return;
  }
  const auto [begin, end] = row_at(distances, row);
  for (int64_t i = begin; i < end; ++i)
    if (id_at(distances.indices, i) > row) visit(distances.values[i]);
}

template <class Body>
void parallel_rows(const Distances& distances, Body body) {
  constexpr int64_t kWorthAThread = 1 << 15;  // distances
  const int64_t each = distances.indptr.data == nullptr
                           ? distances.samples
                           : distances.indices.size / std::max<int64_t>(distances.samples, 1);
  parallel_for(distances.samples, 1 + kWorthAThread / (1 + each), body);
}

struct Histogram {
  std::array<int64_t, kDigits> counts{};
  int64_t zeros = 0;
};

Histogram count_digits(const Distances& distances, int pass, uint32_t prefix) {
  Histogram total;
  std::mutex mutex;
  parallel_rows(distances, [&](int64_t begin, int64_t end) {
    Histogram mine;
    for (int64_t row = begin; row < end; ++row)
      each_above(distances, row, [&](float distance) {
        const uint32_t key = distance_key(float_bits(distance));
        mine.zeros += distance == 0.f;
        mine.counts[digit_of(key, pass)] += distance != 0.f && begins_with(key, prefix, pass);
      });
    const std::lock_guard<std::mutex> lock(mutex);
    total.zeros += mine.zeros;
    for (int digit = 0; digit < kDigits; ++digit) total.counts[digit] += mine.counts[digit];
  });
  return total;
}

double sum_below(const Distances& distances, uint32_t key) {
  std::vector<double> sums(distances.samples);
  parallel_rows(distances, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      double sum = 0;
      each_above(distances, row, [&](float distance) {
        if (distance != 0.f && distance_key(float_bits(distance)) < key) sum += distance;
      });
      sums[row] = sum;
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace

size_t smallest_workspace(const Distances&) { return 0; }

void smallest(const Distances& distances, double fraction, Smallest* out, void*, Stream) {
  const bool dense = distances.indptr.data == nullptr;
  if (!dense) check_graph(kOp, distances);
  Smallest found{};
  uint32_t prefix = 0;
  int64_t absent = 0, rank = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    Histogram histogram = count_digits(distances, pass, prefix);
    if (pass == 0) {
      for (const int64_t count : histogram.counts) found.stored += count;
      found.counted = dense ? found.stored : pairs_of(distances.samples) - histogram.zeros;
      found.taken = int64_t(std::rint(fraction * double(found.counted)));
      absent = found.counted - found.stored;
      rank = found.taken;
    }
    if (begins_with(kOneKey, prefix, pass)) histogram.counts[digit_of(kOneKey, pass)] += absent;
    int digit = 0;
    while (digit < kDigits - 1 && histogram.counts[digit] < rank) rank -= histogram.counts[digit++];
    prefix |= uint32_t(digit) << digit_shift(pass);
  }
  found.ties = rank;
  found.largest = float_bits_of(prefix);
  found.sum = sum_below(distances, prefix);
  *out = found;
}

}  // namespace pyreid
