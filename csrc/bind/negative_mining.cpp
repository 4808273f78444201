#include <cmath>
#include <string>

#include "bind/array.h"
#include "bind/module.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "mine_negatives";
constexpr int64_t kMostRanks = 65536;

// What the user gave, checked once. Returns the width of a buffer of candidates.
int64_t check(py::handle queries, py::handle bank, int64_t k, int64_t skip, py::handle self_rows,
              py::handle query_groups, py::handle bank_groups, py::handle query_cameras,
              py::handle bank_cameras, double camera_penalty, const std::string& precision) {
  Args args(kOp);
  const ConstMatrix rows = args.const_matrix("bank", bank, -1, -1);
  const int64_t batch = args.const_matrix("queries", queries, -1, rows.cols).rows;
  if (rows.rows >= UINT32_MAX)
    args.fail("bank", "have fewer than 2**32 - 1 rows", std::to_string(rows.rows));
  if (k < 1) args.fail("k", "be at least 1", std::to_string(k));
  if (skip < 0) args.fail("skip", "be at least 0", std::to_string(skip));
  if (k > kMostRanks || skip > kMostRanks || k + skip > kMostRanks)
    args.fail("k + skip", "be at most " + std::to_string(kMostRanks), std::to_string(k + skip));
  if (!self_rows.is_none()) args.ids("self_rows", self_rows, batch);
  const auto pair = [&](const char* query_name, py::handle query_ids, const char* bank_name,
                        py::handle bank_ids) {
    if (query_ids.is_none() != bank_ids.is_none())
      args.fail(query_ids.is_none() ? query_name : bank_name, "be given with the other of the two",
                "None");
    if (query_ids.is_none()) return;
    args.ids(query_name, query_ids, batch);
    args.ids(bank_name, bank_ids, rows.rows);
  };
  pair("query_groups", query_groups, "bank_groups", bank_groups);
  pair("query_cameras", query_cameras, "bank_cameras", bank_cameras);
  if (!std::isfinite(camera_penalty))
    args.fail("camera_penalty", "be finite", std::to_string(camera_penalty));
  if (camera_penalty != 0 && query_cameras.is_none())
    args.fail("camera_penalty", "be 0 without query_cameras and bank_cameras",
              std::to_string(camera_penalty));
  args.choice("precision", precision, {"exact", "fast"});
  constexpr int64_t kRoom =
      1024;  // a step of the kernel always fits after dropping what cannot count
  return k + skip + std::max(k + skip, kRoom);
}

void panel(py::handle scores, int64_t first_row, py::handle self_rows, py::handle query_groups,
           py::handle bank_groups, py::handle query_cameras, py::handle bank_cameras,
           float camera_penalty, py::handle candidates, py::handle thresholds, py::handle counts,
           int64_t keep, uintptr_t stream) {
  Args args(kOp);
  const MineState state = state_of(args, candidates, thresholds, counts, keep);
  const Array products = args.array("scores", scores, {Dtype::float32}, {state.queries, -1});
  const auto ids = [&](const char* name, py::handle object, int64_t size) {
    return object.is_none() ? Ids{} : args.ids(name, object, size);
  };
  const MineRules rules{ids("self_rows", self_rows, state.queries),
                        ids("query_groups", query_groups, state.queries),
                        ids("bank_groups", bank_groups, -1),
                        ids("query_cameras", query_cameras, state.queries),
                        ids("bank_cameras", bank_cameras, -1),
                        camera_penalty};
  const py::gil_scoped_release released;
  mine_panel(static_cast<const float*>(products.data), products.shape[1], first_row, rules, state,
             {args.device(), reinterpret_cast<void*>(stream)});
}

void finish(py::handle candidates, py::handle thresholds, py::handle counts, int64_t keep,
            int64_t skip, py::handle scores, py::handle rows, uintptr_t stream) {
  Args args(kOp);
  const MineState state = state_of(args, candidates, thresholds, counts, keep);
  float* const out_scores = static_cast<float*>(
      args.array("scores", scores, {Dtype::float32}, {state.queries, keep - skip}).data);
  int64_t* const out_rows = static_cast<int64_t*>(
      args.array("rows", rows, {Dtype::int64}, {state.queries, keep - skip}).data);
  const py::gil_scoped_release released;
  mine_finish(state, skip, out_scores, out_rows, {args.device(), reinterpret_cast<void*>(stream)});
}

}  // namespace

MineState state_of(Args& args, py::handle candidates, py::handle thresholds, py::handle counts,
                   int64_t keep) {
  const Array keys = args.array("candidates", candidates, {Dtype::int64}, {-1, -1});
  MineState state{};
  state.queries = keys.shape[0];
  state.capacity = keys.shape[1];
  state.keep = keep;
  state.candidates = static_cast<uint64_t*>(keys.data);
  state.thresholds = static_cast<uint64_t*>(
      args.array("thresholds", thresholds, {Dtype::int64}, {state.queries}).data);
  state.counts =
      static_cast<int32_t*>(args.array("counts", counts, {Dtype::int32}, {state.queries}).data);
  return state;
}

void bind_negative_mining(py::module_& module) {
  module.def("mine_check", check);
  module.def("mine_panel", panel);
  module.def("mine_finish", finish);
}

}  // namespace pyreid
