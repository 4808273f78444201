// The native API on one page. Each function here has one definition per floor (cpu/, cuda/), and
// one check of its arguments (bind/), so that the floors may trust what they are given.
//
// Everything is borrowed: outputs and scratch come from the caller. Nothing synchronises the
// device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

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

// --- set_contrast ------------------------------------------------------------------------------

// What each of B query rows is compared with: its positives, then its negatives. A row of -1 is a
// pad: it counts nothing.
struct ContrastList {
  ConstMatrix bank;  // (N, D)
  Ids positives;     // (B, num_positives) bank rows
  Ids negatives;     // (B, num_negatives) bank rows
  int64_t batch, num_positives, num_negatives;
  int64_t count;  // num_positives + num_negatives
};

struct SetContrast {
  ContrastList candidates;
  const float* queries;  // (Q, B, D): Q sets of queries share the candidates
  int64_t sets;          // Q
  const float* weights;  // (B, num_positives) or (num_positives,); null: 1 / the row's positives
  bool weights_per_row;
  float scale;
  bool own;       // a softmax for each positive, with the negatives; else one over all
  float* loss;    // (Q, B), written
  float* slopes;  // (Q, B, num_positives + num_negatives), written: d loss / d dot product
};

struct SetContrastBackward {
  ContrastList candidates;
  int64_t sets;
  const float* grad_loss;  // (Q, B)
  const float* slopes;     // of the forward
  float* grad_queries;     // (Q, B, D), written
};

// With scores s = scale * <query, bank row>: loss = sum over positives of weight * (lse - s), where
// lse is the log-sum-exp of all candidates' scores, or, with `own`, of this positive's and the
// negatives'. A row without positives: loss 0, slopes 0. The gradient is grad_loss times the sum of
// slopes times bank rows, in candidate order. A bank row out of range: on the CPU
// std::invalid_argument before anything is written (in the forward); on CUDA a pad. `workspace`
// holds as many bytes as its function says, aligned to 256.
void set_contrast(const SetContrast& contrast, Stream stream);
size_t set_contrast_backward_workspace(const SetContrastBackward& backward);
void set_contrast_backward(const SetContrastBackward& backward, void* workspace, Stream stream);

// --- class_means -------------------------------------------------------------------------------

struct Classes {
  ConstMatrix features;  // (N, D)
  Ids labels;            // (N,) any values; a row whose label is negative is left out
  Ids cameras;           // (N,) any values; data is null: classes are labels alone
};

// For `classes` classes, ordered by camera, then label.
struct Means {
  int64_t classes;   // M
  bool normalize;    // divide each mean by its L2 norm (at least 1e-12)
  float* means;      // (M, D)
  int64_t* labels;   // (M,)
  int64_t* cameras;  // (M,), or null where cameras are
  int64_t* counts;   // (M,) rows of each class, at least one
};

// How many classes there are only the data knows. class_means_count groups the rows and writes M to
// `count`; the caller reads it, allocates, and calls class_means_fill with the same workspace of
// class_means_workspace(classes) bytes, aligned to 256.
//
// Rows of a class are summed in ascending order, in float32: 32 rows at a time, and those sums one
// after another with compensation, so that a class of any size is exact to a few units in the last
// place (of the mean of the absolute values).
size_t class_means_workspace(const Classes& classes);
void class_means_count(const Classes& classes, int64_t* count, void* workspace, Stream stream);
void class_means_fill(const Classes& classes, const Means& means, void* workspace, Stream stream);

// --- row_sampling ------------------------------------------------------------------------------

struct RowSampling {
  Ids groups;         // (N,) any values; a negative one is no group: it equals nothing
  Ids targets;        // (B,) the group of each sample
  Ids exclude;        // (B,) a row that each sample does not draw; data is null: none
  int64_t positives;  // P
  int64_t negatives;  // K
  uint64_t seed;
  int64_t* positive_rows;  // (B, P)
  int64_t* negative_rows;  // (B, K)
};

// Draws rows uniformly: positives from the sample's group, negatives from all other rows. Let the
// rows be sorted by group, stably, and `order` be a RandomOrder (philox.h) of the n rows that the
// sample may draw: the j-th row drawn is the order(j % n)-th of them. So none repeats before all
// have been drawn. Where there is none to draw, -1; where a group holds nothing but the excluded
// row, that row. An excluded row out of range: on the CPU std::invalid_argument; on CUDA nothing is
// excluded. `workspace` holds row_sampling_workspace(sampling) bytes, aligned to 256.
size_t row_sampling_workspace(const RowSampling& sampling);
void row_sampling(const RowSampling& sampling, void* workspace, Stream stream);

// --- bank_cross_entropy ------------------------------------------------------------------------

// What the softmax runs over, its columns, and what a target is.
enum class Reduce : uint8_t {
  row,            // columns: bank rows; a target is a row
  cluster_mean,   // columns: the mean rows of the labels present; a target is a label
  label_uniform,  // columns: bank rows; the target is spread over the rows of a label
};

struct BankCrossEntropy {
  ConstMatrix bank;  // (N, D), N >= 1
  Ids targets;       // (B,)
  Ids labels;        // (N,) of the rows; a negative one is no label. Not where reduce is row
  Reduce reduce;
  float scale, smoothing;
  // The rows brought together by label, where there are labels: filled in by group_labels.
  int32_t* groups;          // (group_words(N),), laid out as the floor likes
  int32_t* target_columns;  // (B,) place of the label of each target, -1 where no row has it
};

// What one query has seen so far of its columns; s are the dot products, z = scale * s.
struct RunningSoftmax {
  float max;      // of z
  float sum;      // of exp(z - max); without the target where that is one column
  float total;    // of s; with smoothing only
  float target;   // of s, over the columns of the target
  float matched;  // number of columns of the target
  float columns;  // number of columns
};

// Dot products of the queries with columns first, first + 1, ..., first + size - 1. Queries from B
// on have no target.
struct ScorePanel {
  float* scores;  // (queries, size)
  int64_t queries, first, size;
};

// The loss of a query is the sum over columns of y * (logsumexp(z) - z), where y is
// (1 - smoothing) / (number of columns of the target) on those, plus smoothing / (number of
// columns) on all. The caller multiplies, panel after panel:
//
//   group_labels, where there are labels
//   for each panel of columns: rows of the bank, or what label_means makes of them
//     scores = queries @ panel.T
//     fold_scores: scores become weights
//     sums += weights @ panel, for gradients
//   finish_losses
//
// A target out of range, or a label that no row has: on the CPU std::invalid_argument; on CUDA loss
// and gradient of that query are 0. Labels are below 2^31 - 1: std::invalid_argument on the CPU, on
// CUDA no label.
constexpr int64_t group_words(int64_t rows) { return 2 * rows + 2; }
size_t group_labels_workspace(const BankCrossEntropy& loss);
void group_labels(const BankCrossEntropy& loss, void* workspace, Stream stream);

// How many columns of cluster_mean there are to work through: on the CPU one per label present, in
// ascending order; on CUDA, where that number is not known to the host, one per row, of which those
// that are no label's are masked.
int64_t label_columns(const BankCrossEntropy& loss);

// means[i] becomes the mean row of column first + i, float32 sums in ascending order of rows, 32 at
// a time. A masked column's row becomes 0.
void label_means(const BankCrossEntropy& loss, int64_t first, Matrix means, Stream stream);

// Takes a panel in and leaves exp(z - max) in place of its scores, 0 where `sum` leaves a column
// out. `sums` (queries, D), or null, are brought to the new maximum. The panel that starts with
// column 0 comes first, and begins `running` (queries,) and `sums`.
void fold_scores(const BankCrossEntropy& loss, const ScorePanel& panel, RunningSoftmax* running,
                 float* sums, Stream stream);

// losses[i] becomes the loss of query i, and the first B rows of `sums`, unless null, the gradients
// of the losses by the queries. With smoothing, `sums` has one more row: that of a query of zeros,
// which has weighed all columns alike.
void finish_losses(const BankCrossEntropy& loss, const RunningSoftmax* running, float* losses,
                   float* sums, Stream stream);

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

// Rows first, first + 1, ..., first + count - 1 of all: what one call does. Its sink holds these
// alone.
struct RowRange {
  int64_t first, count;
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
struct DistanceTerms {
  const float* norms;       // (N,)
  const float *low, *high;  // of the rows that have weights
};

// The last stage's arithmetic: distances below 0 made 0, and rounding to float16 at each step.
struct MinSum {
  float max_distance;  // a pair that lies further apart is left out, as is one at distance 1
  bool clip, half;
};

// scores and rows (N, k): for each row the k rows with the largest dot product - bias[row], itself
// among them, ties by the lower row, then -inf and -1. `lowest` (N,): the smallest of these
// differences. Both may be null. Only where has_knn(): each product is computed once and serves two
// rows. `passed`, unless empty, is told now and then, on the calling thread, how many rows have met
// all others.
bool has_knn();
void knn(const ConstMatrix& features, const float* bias, int64_t k, float* scores, int64_t* rows,
         float* lowest, const std::function<void(int64_t)>& passed, Stream stream);

// A search in panels, of products of rows rounded to float16, that is exact all the same. Only
// where has_half_filter(). The caller multiplies:
//
//   half_rows: of the features, and of the queries
//   for each panel: mine_panel(float32 products of half queries and half features)
//   mine_finish: the best m > k of each query
//   refine
bool has_half_filter();

// Rows (N, D) times a power of two, which brings the longest to between 2^12 and 2^14, rounded.
struct HalfRows {
  Matrix values;   // (N, D) float16
  float* lengths;  // (N,) at least the length of a row before it is rounded; infinity if any row's
                   // is beyond reason: `largest` outside [2^-60, 2^60]
  float* rests;    // (N,) at least the length of what rounding takes away
};

// `largest` (1,): the largest squared norm of the rows.
void half_rows(const ConstMatrix& rows, const float* largest, const HalfRows& half, Stream stream);

struct Refinement {
  ConstMatrix queries;                  // (B, D) float32
  ConstMatrix features;                 // (N, D)
  const float* products;                // (B, m) those found by half rows, and their
  const int64_t* near;                  // (B, m) rows, best first, -1 where there are fewer
  int64_t listed;                       // m, at most 4096
  const float *lengths, *rests;         // (B,) of the queries
  const float *longest, *largest_rest;  // (1,) of the features
};

// scores and rows (B, k) by float32 products. failed (B,): 1 where half rows left it open which
// rows these are, so that all rows were compared with the query, else 0. `state`, for as many
// queries, is scratch.
void refine(const Refinement& found, int64_t k, float* scores, int64_t* rows, int32_t* failed,
            const MineState& state, Stream stream);

// norms (N,) = squared norms. On the CPU std::invalid_argument where one is not finite, which
// counts rows from `first` on.
void squared_norms(const char* op, const char* name, const ConstMatrix& features, int64_t first,
                   float* norms, Stream stream);

// masks (N, words): bit c % 32 of word c / 32 says whether column c is a reciprocal neighbour; from
// word (columns + 31) / 32 on, the same of the half-size sets. On the CPU std::invalid_argument for
// an id outside [-1, N).
void reciprocal(const char* op, const RankLists& lists, const Reciprocity& rule, uint32_t* masks,
                Stream stream);

// The set of each row: its reciprocal neighbours R and, for each j in R, the half-size set H(j) if
// 3 |H(j) and R| > 2 |H(j)|. Ids only. `workspace` holds expand_workspace() bytes.
size_t expand_workspace(const RankLists& lists, const Reciprocity& rule);
void expand(const char* op, const RankLists& lists, const Reciprocity& rule, const uint32_t* masks,
            const RowRange& rows, const SparseSink& sets, void* workspace, Stream stream);

// values of the sets' entries: softmax of the negative distances over each row. The first of the
// sets is that of features' row `first`, and so on.
void jaccard_weights(const char* op, const ConstMatrix& features, const DistanceTerms& distances,
                     bool half, const SparseRows& sets, int64_t first, float* values,
                     Stream stream);

// Row i = mean of the weights of the first `columns` rows in list i, added in the list's order.
void average(const char* op, const RankLists& lists, int64_t columns, const SparseRows& weights,
             bool half, const RowRange& rows, const SparseSink& means, Stream stream);

// The transpose of `weights`, ids ascending. `workspace` holds transpose_workspace() bytes.
size_t transpose_workspace(int64_t entries);
void transpose(const char* op, const SparseRows& weights, int64_t entries, int64_t* starts,
               int32_t* ids, float* values, void* workspace, Stream stream);

// Jaccard distance 1 - t / (2 - t), t = sum over columns, in ascending order, of the smaller of the
// two weights. jaccard_rows: the pairs that are near enough. jaccard_block: all pairs of the rows
// and of `columns` columns from `column` on.
void jaccard_rows(const char* op, const SparseRows& weights, const SparseRows& transposed,
                  const MinSum& rule, const RowRange& rows, const SparseSink& graph, Stream stream);
void jaccard_block(const char* op, const SparseRows& weights, const SparseRows& transposed,
                   const MinSum& rule, const RowRange& rows, int64_t column, int64_t columns,
                   float* distances, Stream stream);

// --- joint_distance ----------------------------------------------------------------------------

// When and where images were taken: (N,) each. An image whose frame is negative has no known time.
// A camera outside [0, cameras): on the CPU std::invalid_argument; on CUDA its images have none.
struct Sightings {
  Ids cameras, frames;
};

struct TimeHistogram {
  Ids clusters;  // (N,) in [0, count); an image of another one is left out
  int64_t count;
  Sightings seen;
  int64_t cameras;  // C
  int64_t bin;      // frames
  int64_t bins;
  double sigma;   // of the smoothing, in bins
  int64_t reach;  // bins to each side that it takes in
};

// histogram (C, C, bins): how long people take from the earlier of two cameras, the second index,
// to the later one, the first. With m the mean frame of a cluster's images in a camera, n their
// number and f the smallest of their frames,
//
//   for each cluster and each pair of cameras a < b that it has images in:
//     d = m_a - m_b; 1 more in [a][b] at d if d > 0, else in [b][a] at -d
//   for each cluster and camera a, for each of its images there:
//     n more in [a][a] at its frame - f
//
// where "at t" is bin floor(t / bin), and what lies beyond the last bin is left out. Then each
// [later][earlier] is smoothed, bin i <- sum over j of counts[j] exp(-(i - j)^2 / (2 sigma^2)),
// |i - j| <= reach, and divided by its sum; what has no counts stays 0. In float64. `workspace`
// holds time_histogram_workspace(task) bytes, aligned to 256.
size_t time_histogram_workspace(const TimeHistogram& task);
void time_histogram(const TimeHistogram& task, float* histogram, void* workspace, Stream stream);

struct JointTerms {
  const float* histogram;  // (C, C, bins)
  int64_t cameras, bin, bins;
  float gamma, visual, temporal;  // temporal: lambda_t
};

// distances[i, column + j] = 1 - 1 / (1 + visual e^(-gamma s)) * 1 / (1 + temporal e^(-gamma t)),
// s = scores[i, j], t = histogram[later camera][earlier camera] at the difference of the frames.
// Of two images of one frame, the one of the larger camera is the later. t = 0 beyond the last bin,
// and where a time is not known. Powers of e are at most e^88.
void joint_block(const char* op, const float* scores, const Sightings& queries,
                 const Sightings& gallery, const JointTerms& terms, float* distances,
                 int64_t stride, int64_t column, Stream stream);

// --- the floor itself --------------------------------------------------------------------------

// Whether arrays of this floor live in CUDA memory.
bool floor_is_cuda();

// Named integers of a floor ("threads" and "knn_filter" on the CPU, "schedule" on the emulator);
// null where there is none.
struct Setting {
  int64_t (*get)();
  void (*set)(int64_t value);
};
const Setting* floor_setting(const char* name);

}  // namespace pyreid
