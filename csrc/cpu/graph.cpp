#include "cpu/graph.h"

#include <stdexcept>
#include <string>

#include "cpu/parallel.h"

namespace pyreid {
namespace {

[[noreturn]] void fail(const char* op, const std::string& rule, int64_t value, int64_t position) {
  throw std::invalid_argument(std::string(op) + ": " + rule + ", got " + std::to_string(value) +
                              " at position " + std::to_string(position));
}

// The first of the entries whose column is no sample; end: none.
template <class Index>
int64_t first_outside(const Distances& graph, int64_t begin, int64_t end) {
  const auto* const indices = static_cast<const Index*>(graph.indices.data);
  const auto outside = [&](int64_t i) { return uint64_t(indices[i]) >= uint64_t(graph.samples); };
  bool any = false;  // counted to the end, as vectors do
  for (int64_t i = begin; i < end; ++i) any |= outside(i);
  if (!any) return end;
  while (!outside(begin)) ++begin;
  return begin;
}

}  // namespace

void check_graph(const char* op, const Distances& graph) {
  const int64_t entries = graph.indices.size;
  const auto check_indptr = [&](int64_t i, int64_t low, int64_t high) {
    const int64_t value = id_at(graph.indptr, i);
    if (value < low || value > high)
      fail(op, "indptr must ascend from 0 to the " + std::to_string(entries) + " entries", value,
           i);
  };
  check_indptr(0, 0, 0);
  for (int64_t i = 1; i < graph.samples; ++i) check_indptr(i, id_at(graph.indptr, i - 1), entries);
  check_indptr(graph.samples, entries, entries);
  constexpr int64_t kGrain = 1 << 16;
  parallel_for(entries, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t bad = graph.indices.dtype == Dtype::int32
                            ? first_outside<int32_t>(graph, begin, end)
                            : first_outside<int64_t>(graph, begin, end);
    if (bad < end)
      fail(op, "indices must lie in [0, " + std::to_string(graph.samples) + ")",
           id_at(graph.indices, bad), bad);
  });
}

}  // namespace pyreid
