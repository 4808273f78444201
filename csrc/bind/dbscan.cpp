#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <vector>

#include "bind/array.h"
#include "bind/module.h"

namespace pyreid {
namespace {

// Samples are numbered by 31 bits, of which the last number means none.
constexpr int64_t kMostSamples = INT32_MAX - 1;

Distances distances_of(Args& args, py::handle distances, py::handle indptr, py::handle indices) {
  Distances out{};
  const bool dense = indptr.is_none();
  const Array values = dense ? args.array("distance", distances, {Dtype::float32}, {-1, -1})
                             : args.array("distances", distances, {Dtype::float32}, {-1});
  out.values = static_cast<const float*>(values.data);
  if (dense) {
    out.samples = values.shape[0];
    args.array("distance", distances, {Dtype::float32}, {out.samples, out.samples});
  } else {
    out.indptr = args.ids("indptr", indptr, -1);
    if (out.indptr.size == 0) args.fail("indptr", "have shape (N + 1,)", "(0,)");
    out.samples = out.indptr.size - 1;
    out.indices = args.ids("indices", indices, values.shape[0]);
  }
  if (out.samples > kMostSamples)
    args.fail(dense ? "distance" : "indptr", "name fewer than 2**31 - 1 samples",
              std::to_string(out.samples));
  return out;
}

void bind_search(py::handle distances, py::handle indptr, py::handle indices,
                 const std::vector<double>& eps, int64_t min_samples, py::handle labels,
                 py::handle allocate, uintptr_t stream) {
  Args args("dbscan");
  Dbscan task{};
  task.distances = distances_of(args, distances, indptr, indices);
  if (eps.empty() || eps.size() > size_t(kMostEps))
    args.fail("eps", "hold 1 to " + std::to_string(kMostEps) + " values",
              std::to_string(eps.size()));
  for (const double value : eps) {
    args.require(std::isfinite(value) && value >= 0, "eps", "be finite and at least 0",
                 py::float_(value));
    task.eps[task.count++] = float(value);
  }
  if (min_samples < 1) args.fail("min_samples", "be at least 1", std::to_string(min_samples));
  task.min_samples = min_samples;
  task.labels = static_cast<int64_t*>(
      args.array("labels", labels, {Dtype::int64}, {task.count, task.distances.samples}).data);
  const Scratch scratch(allocate, dbscan_workspace(task));
  const py::gil_scoped_release released;
  dbscan(task, scratch.data(), {args.device(), reinterpret_cast<void*>(stream)});
}

void bind_overlap(py::handle a, py::handle b, py::handle shared, py::handle size_a,
                  py::handle size_b, py::handle allocate, uintptr_t stream) {
  Args args("cluster_overlap");
  ClusterOverlap task{};
  task.first = args.ids("a", a, -1);
  const int64_t samples = task.first.size;
  if (samples > kMostSamples)
    args.fail("a", "hold fewer than 2**31 - 1 labels", std::to_string(samples));
  task.second = args.ids("b", b, samples);
  const auto out = [&](const char* name, py::handle array) {
    return static_cast<int64_t*>(args.array(name, array, {Dtype::int64}, {samples}).data);
  };
  task.shared = out("intersection", shared);
  task.sizes[0] = out("size_a", size_a);
  task.sizes[1] = out("size_b", size_b);
  const Scratch scratch(allocate, cluster_overlap_workspace(samples));
  const py::gil_scoped_release released;
  cluster_overlap(task, scratch.data(), {args.device(), reinterpret_cast<void*>(stream)});
}

void bind_smallest(py::handle distances, py::handle indptr, py::handle indices, double fraction,
                   py::handle out, py::handle allocate, uintptr_t stream) {
  Args args("mean_smallest");
  const Distances graph = distances_of(args, distances, indptr, indices);
  args.require(fraction > 0 && fraction <= 1, "fraction", "lie in (0, 1]", py::float_(fraction));
  static_assert(sizeof(Smallest) == 6 * sizeof(int64_t));
  auto* const found = static_cast<Smallest*>(args.array("out", out, {Dtype::int64}, {6}).data);
  const Scratch scratch(allocate, smallest_workspace(graph));
  const py::gil_scoped_release released;
  smallest(graph, fraction, found, scratch.data(),
           {args.device(), reinterpret_cast<void*>(stream)});
}

}  // namespace

void bind_dbscan(py::module_& module) {
  module.def("dbscan", bind_search);
  module.def("cluster_overlap", bind_overlap);
  module.def("smallest", bind_smallest);
}

}  // namespace pyreid
