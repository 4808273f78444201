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

// --- dbscan ------------------------------------------------------------------------------------

// How far samples are from one another: the kept pairs of a CSR graph, or all of them.
struct Distances {
  int64_t samples;      // N
  const float* values;  // (entries,), or, where indptr.data is null, the dense matrix (N, N)
  Ids indptr;           // (N + 1,)
  Ids indices;          // (entries,) columns, in any order inside a row, none twice
};

constexpr int kMostEps = 64;

// labels (count, N), each row as scikit-learn numbers them for that eps. A neighbour is at most eps
// away; in a graph everybody is a neighbour of himself unless the diagonal says otherwise. Core
// samples have at least min_samples neighbours. What a core sample reaches through neighbours of
// core samples takes its label; labels follow the smallest core sample of each cluster, and whom
// two clusters reach belongs to the first; -1: nobody does. Distances need not be symmetric: row i
// holds the neighbours of i. Entries outside the graph: on the CPU std::invalid_argument before
// anything is written; on CUDA they are left out. `workspace` holds dbscan_workspace(task) bytes,
// aligned to 256.
struct Dbscan {
  Distances distances;
  int count;            // of eps
  float eps[kMostEps];  // each at least 0; a distance that is NaN is beyond all of them
  int64_t min_samples;
  int64_t* labels;  // (count, N)
};

size_t dbscan_workspace(const Dbscan& task);
void dbscan(const Dbscan& task, void* workspace, Stream stream);

// For each of N samples: how many share both its labels, its first, and its second one. A negative
// label is a cluster of one. `workspace` holds cluster_overlap_workspace(N) bytes, aligned to 256.
struct ClusterOverlap {
  Ids first, second;  // (N,)
  int64_t* shared;    // (N,)
  int64_t* sizes[2];  // (N,) of the first and of the second label
};

size_t cluster_overlap_workspace(int64_t samples);
void cluster_overlap(const ClusterOverlap& task, void* workspace, Stream stream);

// What the mean of the smallest distances is made of. Of a graph's strict upper triangle, pairs
// that are not stored count as 1; zeros do not count.
struct Smallest {
  int64_t counted;   // pairs that count
  int64_t taken;     // round(fraction * counted), halves to even: the smallest ones
  int64_t stored;    // pairs that count and are stored
  int64_t ties;      // how many of the taken ones equal the largest of them, at least one
  uint32_t largest;  // its bits
  uint32_t unused;
  double sum;  // of those stored below it, in a fixed order
};

// Writes one Smallest, which means nothing but its counts where none is taken. `workspace` holds
// smallest_workspace(distances) bytes, aligned to 256.
size_t smallest_workspace(const Distances& distances);
void smallest(const Distances& distances, double fraction, Smallest* out, void* workspace,
              Stream stream);

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
