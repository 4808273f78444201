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

// --- products ---

// scores (B, N) = dot products of queries (B, D) and rows (N, D), accumulated in float32. Only
// where has_product(): on CUDA the array library's own product is the better one.
bool has_product();
void product(const ConstMatrix& queries, const ConstMatrix& rows, float* scores, Stream stream);

// --- jaccard -----------------------------------------------------------------------------------

// Neighbour lists, best first; an id outside [0, rows) is no neighbour.
struct RankLists {
  const int32_t* ids;  // (rows, stride)
  int64_t rows, stride;
};

// Rows of entries: those of row i are starts[i], ..., starts[i + 1] - 1, ids ascending and
// distinct.
struct SparseRows {
  int64_t rows;
  const int64_t* starts;  // (rows + 1,)
  const int32_t* ids;
  const float* values;
};

// Where rows of entries go. A first call, with `counts`, says how many entries each row has; a
// second one, with `starts`, writes them. In between, a row that has no more than `slots` entries
// is kept where it need only be copied from; `slots` may be 0, and is for jaccard_rows alone.
struct SparseSink {
  int32_t* counts;        // (rows,), or null
  const int64_t* starts;  // (rows + 1,)
  int32_t* ids;
  float* values;
  int64_t slots;
  int32_t* slot_ids;   // (rows, slots)
  float* slot_values;  // (rows, slots)
};

// Which columns of a list are asked for reciprocity: j is a reciprocal neighbour of i if i is in
// the same section of j's list as j is in i's, [0, split) or [split, columns). The first `half`
// columns are asked among themselves too; 0: there is no expansion by half-size sets.
struct Reciprocity {
  int columns, split, half;

  int words() const { return (columns + 31) / 32 + (half + 31) / 32; }
};

// What weights are made of: (norms_i + norms_j - 2 dot - low_i) / (high_i - low_i), 0 where nothing
// lies between low and high. Null: norms 1, low 0, high 1.
struct Distances {
  const float *norms, *low, *high;  // (N,)
};

// The last stage's arithmetic: distances below 0 made 0, and rounding to float16 at each step.
struct MinSum {
  float max_distance;  // a pair that lies further apart is left out, as is one at distance 1
  bool clip, half;
};

// scores and rows (N, k): for each row the k rows with the largest dot product - bias[row], itself
// among them, ties by the lower row, then -inf and -1. `lowest` (N,): the smallest of these
// differences. Both may be null. Only where has_knn(): each product is computed once and serves two
// rows.
bool has_knn();
void knn(const ConstMatrix& features, const float* bias, int64_t k, float* scores, int64_t* rows,
         float* lowest, Stream stream);

// norms (N,) = squared norms. On the CPU std::invalid_argument where one is not finite.
void squared_norms(const char* op, const char* name, const ConstMatrix& features, float* norms,
                   Stream stream);

// masks (N, words): bit c % 32 of word c / 32 says whether column c is a reciprocal neighbour; from
// word (columns + 31) / 32 on, the same of the half-size sets. On the CPU std::invalid_argument for
// an id outside [-1, N).
void reciprocal(const char* op, const RankLists& lists, const Reciprocity& rule, uint32_t* masks,
                Stream stream);

// The set of each row: its reciprocal neighbours R and, for each j in R, the half-size set H(j) if
// 3 |H(j) and R| > 2 |H(j)|. Ids only. `workspace` holds expand_workspace() bytes.
size_t expand_workspace(const RankLists& lists, const Reciprocity& rule);
void expand(const char* op, const RankLists& lists, const Reciprocity& rule, const uint32_t* masks,
            const SparseSink& sets, void* workspace, Stream stream);

// values of the sets' entries: softmax of the negative distances over each row.
void jaccard_weights(const char* op, const ConstMatrix& features, const Distances& distances,
                     bool half, const SparseRows& sets, float* values, Stream stream);

// Row i = mean of the weights of the first `columns` rows in list i, added in the list's order.
void average(const char* op, const RankLists& lists, int64_t columns, const SparseRows& weights,
             bool half, const SparseSink& means, Stream stream);

// The transpose of `weights`, ids ascending. `workspace` holds transpose_workspace() bytes.
size_t transpose_workspace(int64_t entries);
void transpose(const char* op, const SparseRows& weights, int64_t entries, int64_t* starts,
               int32_t* ids, float* values, void* workspace, Stream stream);

// Jaccard distance 1 - t / (2 - t), t = sum over columns, in ascending order, of the smaller of the
// two weights. jaccard_rows: the pairs that are near enough. jaccard_block: all pairs of the first
// `rows` rows and of `columns` columns from `column` on.
void jaccard_rows(const char* op, const SparseRows& weights, const SparseRows& transposed,
                  const MinSum& rule, const SparseSink& graph, Stream stream);
void jaccard_block(const char* op, const SparseRows& weights, const SparseRows& transposed,
                   const MinSum& rule, int64_t rows, int64_t column, int64_t columns,
                   float* distances, Stream stream);

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
