#include "cpu/group.h"

#include <algorithm>
#include <array>

namespace pyreid {
namespace {

struct Item {
  uint64_t key;  // the id, shifted so that unsigned order is the order of ids
  int64_t position;
};

// Stable, one byte of the key at a time; far quicker than comparing once there are many. Bytes that
// are the same in all keys take no pass.
void radix_sort(std::vector<Item>& items) {
  uint64_t varying = 0;
  for (const Item& item : items) varying |= item.key ^ items[0].key;
  std::vector<Item> other(items.size());
  for (int shift = 0; shift < 64; shift += 8) {
    if ((varying >> shift & 255) == 0) continue;
    std::array<int64_t, 257> starts{};
    for (const Item& item : items) ++starts[(item.key >> shift & 255) + 1];
    for (int digit = 0; digit < 256; ++digit) starts[digit + 1] += starts[digit];
    for (const Item& item : items) other[starts[item.key >> shift & 255]++] = item;
    items.swap(other);
  }
}

}  // namespace

Groups group(std::initializer_list<Ids> keys) {
  constexpr int64_t kFew = 1024;
  const int64_t count = keys.begin()->size;
  std::vector<Item> items(count);
  for (int64_t i = 0; i < count; ++i) items[i].position = i;
  for (const Ids* ids = keys.end(); ids-- != keys.begin();) {
    for (Item& item : items) item.key = uint64_t(id_at(*ids, item.position)) ^ uint64_t(1) << 63;
    if (count > kFew) {
      radix_sort(items);
    } else {
      std::stable_sort(items.begin(), items.end(),
                       [](const Item& a, const Item& b) { return a.key < b.key; });
    }
  }
  const auto differ = [&](int64_t a, int64_t b) {
    return std::any_of(keys.begin(), keys.end(),
                       [=](const Ids& ids) { return id_at(ids, a) != id_at(ids, b); });
  };
  Groups groups;
  groups.positions.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || differ(items[i - 1].position, items[i].position)) groups.starts.push_back(i);
    groups.positions.push_back(items[i].position);
  }
  groups.starts.push_back(count);
  return groups;
}

}  // namespace pyreid
