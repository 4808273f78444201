// The native API on one page. Each function here has one definition per floor (cpu/, cuda/), and
// one check of its arguments (bind/), so that the floors may trust what they are given.
//
// Everything is borrowed: outputs and scratch come from the caller. Nothing synchronises the
// device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace pyreid {

// --- memory_update -----------------------------------------------------------------------------

// What happens to a row that several events of one call name.
enum class Repeats : uint8_t {
  sequential,  // one event after another, in batch order, normalising after each
  last,        // every event starts from the old row; the last one in the batch wins
  hardest,     // the event with the smallest dot product to the old row, once; first on ties
  mean,        // the mean of what each event alone would make of the old row, normalised once
};

// Columns are normalised in consecutive parts: `count` parts of `size` columns each, or, where
// `size` is 0, parts that end at ends[0], ends[1], ..., ends[count - 1] = number of columns.
struct Parts {
  static constexpr int kMaxUnequal = 64;
  int count;
  int size;
  int ends[kMaxUnequal];
};

struct MemoryUpdate {
  Matrix bank;           // (N, D), changed in place
  ConstMatrix features;  // (E, D); element types: equal, or one of the two float32
  Ids rows;              // (E,) bank row of each event
  const float* momenta;  // (E,) weight of the old row per event, or null:
  float keep, take;      // weights of the old row and of the feature, for all events
  Repeats repeats;
  Parts parts;
  bool normalize;
};

// Event e moves bank[rows[e]] to keep * old + take * features[e], then divides each part by its L2
// norm (at least 1e-12). Arithmetic is float32; a half-precision row is rounded once, when it is
// written. A row out of range: on the CPU std::invalid_argument before anything is written; on CUDA
// the event is left out. `workspace` holds memory_update_workspace(update) bytes, aligned to 256.
size_t memory_update_workspace(const MemoryUpdate& update);
void memory_update(const MemoryUpdate& update, void* workspace, Stream stream);

// --- negative_mining ---------------------------------------------------------------------------

// Who may be mined, and at what price. A null `data` means: no such rule.
struct MineRules {
  Ids self_rows;  // (B,) the bank row that is left out; outside [0, N): none
  Ids query_groups,
      bank_groups;  // (B,), (N,) equal ones are left out; a negative one equals nothing
  Ids query_cameras, bank_cameras;  // (B,), (N,) equal ones lose camera_penalty
  float camera_penalty;
};

// The best rows so far of each query, as keys: score above, complement of the row below, so that a
// larger key is a better row and ties go to the lower one. No order among them.
struct MineState {
  int64_t queries;       // B
  int64_t keep;          // how many count in the end
  int64_t capacity;      // at least keep + max(keep, 1024)
  uint64_t* candidates;  // (B, capacity)
  uint64_t* thresholds;  // (B,) keys at or below this one cannot count any more
  int32_t* counts;       // (B,) candidates held
};

// Takes in scores (B, columns): products of the queries with bank rows first_row, first_row + 1,
// ... Panels come in ascending order; the first one, first_row = 0, starts the state. A score that
// is NaN or -inf does not qualify.
void mine_panel(const float* scores, int64_t columns, int64_t first_row, const MineRules& rules,
                const MineState& state, Stream stream);

// Ranks skip, ..., keep - 1 into scores and rows (B, keep - skip), best first, then -inf and -1.
void mine_finish(const MineState& state, int64_t skip, float* scores, int64_t* rows, Stream stream);

// --- ranking -----------------------------------------------------------------------------------

// A gallery to be ranked for each query: the largest score first, or the smallest distance; equal
// ones by gallery row; NaN is as bad as can be. Rows with a negative id are no part of it, nor, for
// a query, are rows that have both its id and its camera.
struct RankInput {
  const float* scores;  // (Q, G)
  bool are_distances;
  Ids query_ids, query_cameras;      // (Q,)
  Ids gallery_ids, gallery_cameras;  // (G,)
};

// Of the positions 1, 2, ... that the rows of the query's id take. All 0 where there is no such
// row, or where the query's id is negative.
struct RankOutput {
  int64_t* first;  // (Q,) the first of them
  float* ap;       // (Q,) mean over them of (how many up to this one / this one)
  float* inp;      // (Q,) how many / the last of them
};

// Positions are counted, never sorted: that of a row is one more than the rows ahead of it.
void rank_matches(const RankInput& input, const RankOutput& output, Stream stream);

// --- products ---

// scores (B, N) = dot products of queries (B, D) and rows (N, D), accumulated in float32. Only
// where has_product(): on CUDA the array library's own product is the better one.
bool has_product();
void product(const ConstMatrix& queries, const ConstMatrix& rows, float* scores, Stream stream);

// --- the floor itself --------------------------------------------------------------------------

// Whether arrays of this floor live in CUDA memory.
bool floor_is_cuda();

// Named integers of a floor ("threads" on the CPU, "schedule" on the emulator); null where there is
// none.
struct Setting {
  int64_t (*get)();
  void (*set)(int64_t value);
};
const Setting* floor_setting(const char* name);

}  // namespace pyreid
