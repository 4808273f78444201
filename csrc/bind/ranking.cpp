#include <string>

#include "bind/array.h"
#include "bind/module.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "evaluate_ranking";

RankInput read_ids(Args& args, py::handle query_ids, py::handle gallery_ids,
                   py::handle query_cameras, py::handle gallery_cameras, int64_t queries,
                   int64_t size) {
  RankInput input{};
  input.query_ids = args.ids("query_ids", query_ids, queries);
  input.gallery_ids = args.ids("gallery_ids", gallery_ids, size);
  input.query_cameras = args.ids("query_cameras", query_cameras, queries);
  input.gallery_cameras = args.ids("gallery_cameras", gallery_cameras, size);
  return input;
}

// What the user gave, checked once.
void check(py::handle queries, py::handle gallery, py::handle distance, py::handle query_ids,
           py::handle gallery_ids, py::handle query_cameras, py::handle gallery_cameras,
           py::handle max_rank) {
  Args args(kOp);
  int64_t count, size;
  if (!distance.is_none()) {
    const Array given = args.array("distance", distance, {Dtype::float32}, {-1, -1});
    count = given.shape[0];
    size = given.shape[1];
  } else {
    for (const auto& [name, features] : {std::pair("queries", queries), {"gallery", gallery}})
      if (features.is_none()) args.fail(name, "be given where distance is not", "None");
    const ConstMatrix rows = args.const_matrix("gallery", gallery, -1, -1);
    count = args.const_matrix("queries", queries, -1, rows.cols).rows;
    size = rows.rows;
  }
  if (size > INT32_MAX) args.fail("gallery", "have fewer than 2**31 rows", std::to_string(size));
  read_ids(args, query_ids, gallery_ids, query_cameras, gallery_cameras, count, size);
  const bool counts = PyLong_Check(max_rank.ptr()) && PyLong_AsLongLong(max_rank.ptr()) >= 1;
  PyErr_Clear();
  args.require(counts, "max_rank", "be a count of at least 1", max_rank);
}

void bind(py::handle scores, bool are_distances, py::handle query_ids, py::handle gallery_ids,
          py::handle query_cameras, py::handle gallery_cameras, py::handle first, py::handle ap,
          py::handle inp, uintptr_t stream) {
  Args args(kOp);
  const Array values = args.array("scores", scores, {Dtype::float32}, {-1, -1});
  const int64_t queries = values.shape[0];
  RankInput input = read_ids(args, query_ids, gallery_ids, query_cameras, gallery_cameras, queries,
                             values.shape[1]);
  input.scores = static_cast<const float*>(values.data);
  input.are_distances = are_distances;
  const auto per_query = [&](const char* name, py::handle object, Dtype dtype) {
    return args.array(name, object, {dtype}, {queries}).data;
  };
  const RankOutput output{static_cast<int64_t*>(per_query("first", first, Dtype::int64)),
                          static_cast<float*>(per_query("ap", ap, Dtype::float32)),
                          static_cast<float*>(per_query("inp", inp, Dtype::float32))};
  const py::gil_scoped_release released;
  rank_matches(input, output, {args.device(), reinterpret_cast<void*>(stream)});
}

}  // namespace

void bind_ranking(py::module_& module) {
  module.def("rank_check", check);
  module.def("rank_matches", bind);
}

}  // namespace pyreid
