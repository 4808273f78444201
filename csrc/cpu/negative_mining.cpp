// Streaming top-k: a column whose score does not exceed the worst of the k best so far costs one
// comparison, made for many columns at a time. What passes is put aside; when the room for it is
// full, all but the k best are dropped.

#include <algorithm>
#include <cmath>

#include "cpu/best_keys.h"
#include "cpu/group.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace pyreid {
namespace {

BestKeys best_of(const MineState& state, int64_t query) {
  // Full early, selected early: the sooner there is a bound, the fewer candidates pass it.
  const int64_t room = std::min(state.capacity, state.keep + std::max<int64_t>(state.keep, 128));
  return {state.keep, room, state.candidates + query * state.capacity, state.thresholds[query],
          state.counts[query]};
}

struct Rules {
  const MineRules& rules;
  int64_t self_row, group, camera;

  Rules(const MineRules& rules, int64_t query)
      : rules(rules),
        self_row(rules.self_rows.data ? id_at(rules.self_rows, query) : -1),
        group(rules.query_groups.data ? id_at(rules.query_groups, query) : -1),
        camera(rules.query_cameras.data ? id_at(rules.query_cameras, query) : 0) {}

  bool excludes(int64_t row) const {
    return row == self_row || (group >= 0 && id_at(rules.bank_groups, row) == group);
  }
  float penalty(int64_t row) const {
    if (rules.query_cameras.data == nullptr) return 0.f;
    return id_at(rules.bank_cameras, row) == camera ? rules.camera_penalty : 0.f;
  }
};

void scan(const float* scores, int64_t columns, int64_t first_row, const Rules& rules,
          BestKeys& best) {
  constexpr int64_t kBlock = 64;
  // A penalty below zero is a bonus: then the bare score says nothing about the bound.
  const bool filter = !(rules.rules.camera_penalty < 0.f);
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, columns);
    const float bound = best.bound();
    if (filter) {
      int passing = 0;
      for (int64_t i = begin; i < end; ++i) passing += scores[i] > bound;
      if (passing == 0) continue;
    }
    for (int64_t i = begin; i < end; ++i) {
      if (filter && !(scores[i] > bound)) continue;
      const int64_t row = first_row + i;
      const float score = scores[i] - rules.penalty(row) + 0.f;  // + 0: -0 and 0 are a tie
      if (score > -INFINITY && !rules.excludes(row)) best.add(score, row);
    }
  }
}

}  // namespace

void mine_panel(const float* scores, int64_t columns, int64_t first_row, const MineRules& rules,
                const MineState& state, Stream) {
  parallel_for(state.queries, 1 + 65536 / std::max<int64_t>(columns, 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   BestKeys best = best_of(state, i);
                   if (first_row == 0) best.start();
                   scan(scores + i * columns, columns, first_row, Rules(rules, i), best);
                 }
               });
}

void mine_finish(const MineState& state, int64_t skip, float* scores, int64_t* rows, Stream) {
  const int64_t k = state.keep - skip;
  parallel_for(state.queries, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      best_of(state, i).finish(skip, scores + i * k, rows + i * k);
  });
}

}  // namespace pyreid
