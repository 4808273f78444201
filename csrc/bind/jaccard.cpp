#include <cmath>
#include <string>

#include "bind/array.h"
#include "bind/module.h"

namespace pyreid {
namespace {

constexpr int64_t kMostNeighbours = 65536;

Stream queue(const Args& args, uintptr_t stream) {
  return {args.device(), reinterpret_cast<void*>(stream)};
}

void check_features(Args& args, const char* name, const ConstMatrix& features) {
  if (features.rows > INT32_MAX)
    args.fail(name, "have fewer than 2**31 rows", std::to_string(features.rows));
}

void check_count(Args& args, const char* name, int64_t value, int64_t least) {
  if (value < least) args.fail(name, "be at least " + std::to_string(least), std::to_string(value));
  if (value > kMostNeighbours)
    args.fail(name, "be at most " + std::to_string(kMostNeighbours), std::to_string(value));
}

void knn_check(py::handle features, py::handle queries, int64_t k, const std::string& precision) {
  Args args("knn");
  const ConstMatrix rows = args.const_matrix("features", features, -1, -1);
  check_features(args, "features", rows);
  if (!queries.is_none()) args.const_matrix("queries", queries, -1, rows.cols);
  check_count(args, "k", k, 1);
  if (precision != "exact" && precision != "fast")
    args.fail("precision", "be 'exact' or 'fast'", "'" + precision + "'");
}

// What users gave to one of the ops; `columns`: neighbours that ranks must hold, 0 without ranks.
void jaccard_check(const char* op, py::handle features, int64_t k1, int64_t k2,
                   py::handle max_distance, py::handle ranks, int64_t columns) {
  Args args(op);
  const ConstMatrix rows = args.const_matrix("features", features, -1, -1);
  check_features(args, "features", rows);
  check_count(args, "k1", k1, 1);
  check_count(args, "k2", k2, 1);
  if (!max_distance.is_none())
    args.require(max_distance.cast<double>() >= 0, "max_distance", "be at least 0 or None",
                 max_distance);
  if (ranks.is_none()) return;
  const Array lists = args.array("ranks", ranks, {Dtype::int64, Dtype::int32}, {rows.rows, -1});
  if (lists.shape[1] < columns)
    args.fail("ranks", "have at least " + std::to_string(columns) + " columns",
              std::to_string(lists.shape[1]));
}

void cameras_check(const char* op, py::handle features, py::handle cameras, int64_t intra_k1,
                   int64_t intra_k2, int64_t inter_k1, int64_t inter_k2) {
  Args args(op);
  const int64_t size = args.const_matrix("features", features, -1, -1).rows;
  args.ids("cameras", cameras, size);
  check_count(args, "intra_k[0]", intra_k1, 1);
  check_count(args, "intra_k[1]", intra_k2, 0);
  check_count(args, "inter_k[0]", inter_k1, 1);
  check_count(args, "inter_k[1]", inter_k2, 0);
  if (intra_k2 + inter_k2 == 0) args.fail("intra_k[1] + inter_k[1]", "be at least 1", "0");
}

void rerank_check(py::handle queries, py::handle gallery, int64_t k1, int64_t k2,
                  py::handle lambda_value) {
  Args args("rerank");
  const ConstMatrix left = args.const_matrix("queries", queries, -1, -1);
  const ConstMatrix right = args.const_matrix("gallery", gallery, -1, left.cols);
  if (left.dtype != right.dtype) args.fail("gallery", "be of the queries' dtype", "another");
  check_features(args, "gallery", {nullptr, right.dtype, left.rows + right.rows, right.cols});
  check_count(args, "k1", k1, 1);
  check_count(args, "k2", k2, 1);
  const double weight = lambda_value.cast<double>();
  args.require(weight >= 0 && weight <= 1, "lambda_value", "lie in [0, 1]", lambda_value);
}

template <class T>
T* values_of(Args& args, const char* name, py::handle object,
             std::initializer_list<int64_t> shape) {
  constexpr Dtype kDtype = std::is_same_v<std::remove_const_t<T>, float>     ? Dtype::float32
                           : std::is_same_v<std::remove_const_t<T>, int64_t> ? Dtype::int64
                                                                             : Dtype::int32;
  if (object.is_none()) return nullptr;
  return static_cast<T*>(args.array(name, object, {kDtype}, shape).data);
}

RankLists lists_of(Args& args, py::handle lists) {
  const Array ids = args.array("lists", lists, {Dtype::int32}, {-1, -1});
  return {static_cast<const int32_t*>(ids.data), ids.shape[0], ids.shape[1]};
}

SparseRows sparse(Args& args, const py::tuple& rows) {
  const Array starts = args.array("starts", rows[0], {Dtype::int64}, {-1});
  return {starts.shape[0] - 1, static_cast<const int64_t*>(starts.data),
          values_of<const int32_t>(args, "ids", rows[1], {-1}),
          values_of<const float>(args, "values", rows[2], {-1})};
}

// (counts, None, None, None, slot ids, slot values) or (None, starts, ids, values, slot ids, slot
// values): as many rows as there are slots.
SparseSink sink(Args& args, const py::tuple& rows) {
  const Array slots = args.array("slots", rows[4], {Dtype::int32}, {-1, -1});
  return {values_of<int32_t>(args, "counts", rows[0], {slots.shape[0]}),
          values_of<const int64_t>(args, "starts", rows[1], {slots.shape[0] + 1}),
          values_of<int32_t>(args, "ids", rows[2], {-1}),
          values_of<float>(args, "values", rows[3], {-1}),
          slots.shape[1],
          static_cast<int32_t*>(slots.data),
          values_of<float>(args, "slot values", rows[5], {slots.shape[0], slots.shape[1]})};
}

// Rows `first` on, as many as `sink` has, of `size`.
RowRange range(Args& args, const py::tuple& sink, int64_t first, int64_t size) {
  const int64_t count = args.array("slots", sink[4], {Dtype::int32}, {-1, -1}).shape[0];
  if (first < 0 || first + count > size) args.fail("first", "be a row", std::to_string(first));
  return {first, count};
}

void bind_knn(py::handle features, py::handle bias, int64_t k, py::handle scores, py::handle rows,
              py::handle lowest, const py::object& progress, uintptr_t stream) {
  Args args("knn");
  const ConstMatrix matrix = args.const_matrix("features", features, -1, -1);
  const int64_t size = matrix.rows;
  const auto* const subtract = values_of<const float>(args, "bias", bias, {size});
  float* const out_scores = values_of<float>(args, "scores", scores, {size, k});
  int64_t* const out_rows = values_of<int64_t>(args, "rows", rows, {size, k});
  float* const out_lowest = values_of<float>(args, "lowest", lowest, {size});
  std::function<void(int64_t)> passed;
  if (!progress.is_none())
    passed = [&progress](int64_t done) {
      const py::gil_scoped_acquire acquired;
      progress(done);
    };
  const py::gil_scoped_release released;
  knn(matrix, subtract, k, out_scores, out_rows, out_lowest, passed, queue(args, stream));
}

// (values, lengths, rests) of half_rows.
void bind_half_rows(py::handle features, py::handle largest, const py::tuple& half,
                    uintptr_t stream) {
  Args args("knn");
  const ConstMatrix matrix = args.const_matrix("features", features, -1, -1);
  const auto* const most = values_of<const float>(args, "largest", largest, {1});
  const Array values = args.array("values", half[0], {Dtype::float16}, {matrix.rows, matrix.cols});
  const HalfRows out{{values.data, Dtype::float16, matrix.rows, matrix.cols},
                     values_of<float>(args, "lengths", half[1], {matrix.rows}),
                     values_of<float>(args, "rests", half[2], {matrix.rows})};
  const py::gil_scoped_release released;
  half_rows(matrix, most, out, queue(args, stream));
}

// `found`: (products, near); `bounds`: (lengths, rests, longest, largest rest).
void bind_refine(py::handle queries, py::handle features, const py::tuple& found,
                 const py::tuple& bounds, py::handle scores, py::handle rows, py::handle failed,
                 const py::tuple& scratch, uintptr_t stream) {
  Args args("knn");
  const ConstMatrix bank = args.const_matrix("features", features, -1, -1);
  const ConstMatrix left = args.const_matrix("queries", queries, -1, bank.cols);
  const int64_t batch = left.rows;
  const Array products = args.array("products", found[0], {Dtype::float32}, {batch, -1});
  const int64_t listed = products.shape[1];
  const Array best = args.array("scores", scores, {Dtype::float32}, {batch, -1});
  const int64_t k = best.shape[1];
  const Refinement task{left,
                        bank,
                        static_cast<const float*>(products.data),
                        values_of<const int64_t>(args, "near", found[1], {batch, listed}),
                        listed,
                        values_of<const float>(args, "lengths", bounds[0], {batch}),
                        values_of<const float>(args, "rests", bounds[1], {batch}),
                        values_of<const float>(args, "longest", bounds[2], {1}),
                        values_of<const float>(args, "largest rest", bounds[3], {1})};
  auto* const out_rows = values_of<int64_t>(args, "rows", rows, {batch, k});
  auto* const out_failed = values_of<int32_t>(args, "failed", failed, {batch});
  const MineState state = state_of(args, scratch[0], scratch[1], scratch[2], k);
  const py::gil_scoped_release released;
  refine(task, k, static_cast<float*>(best.data), out_rows, out_failed, state, queue(args, stream));
}

void bind_norms(const char* op, const char* name, py::handle features, int64_t first,
                py::handle norms, uintptr_t stream) {
  Args args(op);
  const ConstMatrix matrix = args.const_matrix(name, features, -1, -1);
  float* const out = values_of<float>(args, "norms", norms, {matrix.rows});
  const py::gil_scoped_release released;
  squared_norms(op, name, matrix, first, out, queue(args, stream));
}

int64_t mask_words(int columns, int half) { return Reciprocity{columns, columns, half}.words(); }

void bind_reciprocal(const char* op, py::handle lists, int columns, int split, int half,
                     py::handle masks, uintptr_t stream) {
  Args args(op);
  const RankLists ranks = lists_of(args, lists);
  const Reciprocity rule{columns, split, half};
  auto* const out = reinterpret_cast<uint32_t*>(
      values_of<int32_t>(args, "masks", masks, {ranks.rows, rule.words()}));
  const py::gil_scoped_release released;
  reciprocal(op, ranks, rule, out, queue(args, stream));
}

void bind_expand(const char* op, py::handle lists, int columns, int split, int half,
                 py::handle masks, int64_t first, const py::tuple& sets, py::handle allocate,
                 uintptr_t stream) {
  Args args(op);
  const RankLists ranks = lists_of(args, lists);
  const Reciprocity rule{columns, split, half};
  const auto* const bits = reinterpret_cast<const uint32_t*>(
      values_of<int32_t>(args, "masks", masks, {ranks.rows, rule.words()}));
  const SparseSink out = sink(args, sets);
  const RowRange some = range(args, sets, first, ranks.rows);
  const Scratch scratch(allocate, expand_workspace(ranks, rule));
  const py::gil_scoped_release released;
  expand(op, ranks, rule, bits, some, out, scratch.data(), queue(args, stream));
}

void bind_weights(const char* op, py::handle features, py::handle norms, py::handle low,
                  py::handle high, bool half, const py::tuple& sets, int64_t first,
                  py::handle values, uintptr_t stream) {
  Args args(op);
  const ConstMatrix matrix = args.const_matrix("features", features, -1, -1);
  const SparseRows rows = sparse(args, sets);
  const DistanceTerms distances{values_of<const float>(args, "norms", norms, {matrix.rows}),
                                values_of<const float>(args, "low", low, {rows.rows}),
                                values_of<const float>(args, "high", high, {rows.rows})};
  if (first < 0 || first + rows.rows > matrix.rows)
    args.fail("first", "be a row", std::to_string(first));
  float* const out = values_of<float>(args, "values", values, {-1});
  const py::gil_scoped_release released;
  jaccard_weights(op, matrix, distances, half, rows, first, out, queue(args, stream));
}

void bind_average(const char* op, py::handle lists, int64_t columns, const py::tuple& weights,
                  bool half, int64_t first, const py::tuple& means, uintptr_t stream) {
  Args args(op);
  const RankLists ranks = lists_of(args, lists);
  const SparseRows rows = sparse(args, weights);
  const SparseSink out = sink(args, means);
  const RowRange some = range(args, means, first, ranks.rows);
  const py::gil_scoped_release released;
  average(op, ranks, columns, rows, half, some, out, queue(args, stream));
}

void bind_transpose(const char* op, const py::tuple& weights, int64_t entries,
                    const py::tuple& transposed, py::handle allocate, uintptr_t stream) {
  Args args(op);
  const SparseRows rows = sparse(args, weights);
  int64_t* const starts = values_of<int64_t>(args, "starts", transposed[0], {rows.rows + 1});
  int32_t* const ids = values_of<int32_t>(args, "ids", transposed[1], {entries});
  float* const values = values_of<float>(args, "values", transposed[2], {entries});
  const Scratch scratch(allocate, transpose_workspace(entries));
  const py::gil_scoped_release released;
  transpose(op, rows, entries, starts, ids, values, scratch.data(), queue(args, stream));
}

void bind_rows(const char* op, const py::tuple& weights, const py::tuple& transposed,
               py::handle max_distance, bool clip, bool half, int64_t first, const py::tuple& graph,
               uintptr_t stream) {
  Args args(op);
  const SparseRows rows = sparse(args, weights), columns = sparse(args, transposed);
  const SparseSink out = sink(args, graph);
  const RowRange some = range(args, graph, first, rows.rows);
  const MinSum rule{max_distance.is_none() ? 1.f : max_distance.cast<float>(), clip, half};
  const py::gil_scoped_release released;
  jaccard_rows(op, rows, columns, rule, some, out, queue(args, stream));
}

void bind_block(const char* op, const py::tuple& weights, const py::tuple& transposed, bool clip,
                bool half, int64_t first, int64_t column, py::handle distances, uintptr_t stream) {
  Args args(op);
  const SparseRows rows = sparse(args, weights), columns = sparse(args, transposed);
  const Array block = args.array("distances", distances, {Dtype::float32}, {-1, -1});
  const MinSum rule{1.f, clip, half};
  const py::gil_scoped_release released;
  jaccard_block(op, rows, columns, rule, {first, block.shape[0]}, column, block.shape[1],
                static_cast<float*>(block.data), queue(args, stream));
}

}  // namespace

void bind_jaccard(py::module_& module) {
  module.def("knn_check", knn_check);
  module.def("jaccard_check", jaccard_check);
  module.def("cameras_check", cameras_check);
  module.def("rerank_check", rerank_check);
  module.attr("has_knn") = has_knn();
  module.def("knn", bind_knn);
  module.attr("has_half_filter") = has_half_filter();
  module.def("half_rows", bind_half_rows);
  module.def("refine", bind_refine);
  module.def("squared_norms", bind_norms);
  module.def("mask_words", mask_words);
  module.def("reciprocal", bind_reciprocal);
  module.def("expand", bind_expand);
  module.def("jaccard_weights", bind_weights);
  module.def("average", bind_average);
  module.def("transpose", bind_transpose);
  module.def("jaccard_rows", bind_rows);
  module.def("jaccard_block", bind_block);
}

}  // namespace pyreid
