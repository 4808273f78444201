// Three hash tables: of first labels, of second ones, and of pairs, a pair being named by the
// places of its labels in the other two.

#include <vector>

#include "cpu/group.h"
#include "ops.h"
#include "pair_key.h"

namespace pyreid {
namespace {

class Counts {
 public:
  explicit Counts(int64_t keys) : entries_(table_capacity(keys), Entry{-1, 0}) {}

  // Counts a key, which is not negative, and returns its place.
  uint32_t add(int64_t key) {
    const uint64_t mask = entries_.size() - 1;
    uint64_t place = mixed(uint64_t(key)) & mask;
    while (entries_[place].key != key && entries_[place].key >= 0) place = (place + 1) & mask;
    entries_[place].key = key;
    ++entries_[place].count;
    return uint32_t(place);
  }

  int64_t operator[](uint32_t place) const { return entries_[place].count; }

 private:
  struct Entry {
    int64_t key, count;
  };
  std::vector<Entry> entries_;
};

constexpr uint32_t kAlone = UINT32_MAX;

}  // namespace

size_t cluster_overlap_workspace(int64_t) { return 0; }

void cluster_overlap(const ClusterOverlap& task, void*, Stream) {
  const int64_t samples = task.first.size;
  std::vector<uint32_t> places[2], pair_places(samples, kAlone);
  for (int side = 0; side < 2; ++side) {
    const Ids& labels = side == 0 ? task.first : task.second;
    Counts sizes(samples);
    places[side].assign(samples, kAlone);
    for (int64_t i = 0; i < samples; ++i)
      if (const int64_t label = id_at(labels, i); label >= 0) places[side][i] = sizes.add(label);
    for (int64_t i = 0; i < samples; ++i)
      task.sizes[side][i] = places[side][i] == kAlone ? 1 : sizes[places[side][i]];
  }
  Counts pairs(samples);
  for (int64_t i = 0; i < samples; ++i)
    if (places[0][i] != kAlone && places[1][i] != kAlone)
      pair_places[i] = pairs.add(pair_key(places[0][i], places[1][i]));
  for (int64_t i = 0; i < samples; ++i)
    task.shared[i] = pair_places[i] == kAlone ? 1 : pairs[pair_places[i]];
}

}  // namespace pyreid
