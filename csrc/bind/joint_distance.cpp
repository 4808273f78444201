#include <cmath>
#include <string>

#include "bind/array.h"
#include "bind/module.h"

namespace pyreid {
namespace {

void check_bin(Args& args, int64_t bin) {
  if (bin < 1 || bin > INT32_MAX)
    args.fail("bin", "be at least 1 and less than 2**31", std::to_string(bin));
}

// What the user gave, before cameras are counted.
void check(py::handle labels, py::handle cameras, py::handle frames, py::handle num_cameras,
           int64_t bin, int64_t bins, double sigma, double cut) {
  Args args("time_histogram");
  const Array ids = args.array("labels", labels, {Dtype::int64, Dtype::int32}, {-1});
  args.ids("cameras", cameras, ids.shape[0]);
  args.ids("frames", frames, ids.shape[0]);
  if (!num_cameras.is_none())
    args.require(num_cameras.cast<int64_t>() >= 0, "num_cameras", "not be negative", num_cameras);
  check_bin(args, bin);
  if (bins < 1) args.fail("bins", "be at least 1", std::to_string(bins));
  if (!(sigma >= 0 && std::isfinite(sigma)))
    args.fail("sigma", "be at least 0", std::to_string(sigma));
  if (!(cut >= 0 && std::isfinite(cut))) args.fail("cut", "be at least 0", std::to_string(cut));
}

void fill(py::handle clusters, int64_t count, py::handle cameras, py::handle frames, int64_t bin,
          double sigma, int64_t reach, py::handle histogram, py::handle allocate,
          uintptr_t stream) {
  Args args("time_histogram");
  const Array ids = args.array("labels", clusters, {Dtype::int64, Dtype::int32}, {-1});
  const int64_t size = ids.shape[0];
  const Array out = args.array("histogram", histogram, {Dtype::float32}, {-1, -1, -1});
  const TimeHistogram task{args.ids("labels", clusters, size),
                           count,
                           {args.ids("cameras", cameras, size), args.ids("frames", frames, size)},
                           out.shape[0],
                           bin,
                           out.shape[2],
                           sigma,
                           reach};
  const Scratch scratch(allocate, time_histogram_workspace(task));
  const py::gil_scoped_release released;
  time_histogram(task, static_cast<float*>(out.data), scratch.data(),
                 {args.device(), reinterpret_cast<void*>(stream)});
}

Array read_histogram(Args& args, py::handle histogram) {
  const Array values = args.array("histogram", histogram, {Dtype::float32}, {-1, -1, -1});
  if (values.shape[0] != values.shape[1])
    args.fail("histogram", "be as long as it is wide",
              std::to_string(values.shape[0]) + " x " + std::to_string(values.shape[1]));
  return values;
}

// What the user gave, once.
void joint_check(py::handle features, py::handle cameras, py::handle frames, py::handle histogram,
                 py::handle queries, py::handle query_cameras, py::handle query_frames, int64_t bin,
                 double gamma, double visual, double temporal) {
  Args args("joint_distance");
  const ConstMatrix rows = args.const_matrix("features", features, -1, -1);
  args.ids("cameras", cameras, rows.rows);
  args.ids("frames", frames, rows.rows);
  read_histogram(args, histogram);
  const py::handle given[] = {queries, query_cameras, query_frames};
  const char* const names[] = {"queries", "query_cameras", "query_frames"};
  for (int k = 0; k < 3; ++k)
    if (given[k].is_none() != queries.is_none())
      args.fail(given[k].is_none() ? names[k] : "queries", "be given with the other two", "None");
  if (!queries.is_none()) {
    const int64_t batch = args.const_matrix("queries", queries, -1, rows.cols).rows;
    args.ids("query_cameras", query_cameras, batch);
    args.ids("query_frames", query_frames, batch);
  }
  check_bin(args, bin);
  if (!std::isfinite(gamma)) args.fail("gamma", "be finite", std::to_string(gamma));
  for (const double weight : {visual, temporal})
    if (!(weight >= 0 && std::isfinite(weight)))
      args.fail("lambdas", "be at least 0", std::to_string(weight));
}

// `queries` and `gallery`: (cameras, frames); `terms`: (histogram, bin, gamma, visual, temporal).
void block(py::handle scores, const py::tuple& queries, const py::tuple& gallery,
           const py::tuple& terms, py::handle distances, int64_t column, uintptr_t stream) {
  Args args("joint_distance");
  const Array products = args.array("scores", scores, {Dtype::float32}, {-1, -1});
  const int64_t batch = products.shape[0], size = products.shape[1];
  const Array out = args.array("distances", distances, {Dtype::float32}, {batch, -1});
  if (column < 0 || column + size > out.shape[1])
    args.fail("column", "be one of the distances", std::to_string(column));
  const Sightings own{args.ids("query_cameras", queries[0], batch),
                      args.ids("query_frames", queries[1], batch)};
  const Sightings their{args.ids("cameras", gallery[0], size),
                        args.ids("frames", gallery[1], size)};
  const Array histogram = read_histogram(args, terms[0]);
  const JointTerms joint{static_cast<const float*>(histogram.data),
                         histogram.shape[0],
                         terms[1].cast<int64_t>(),
                         histogram.shape[2],
                         terms[2].cast<float>(),
                         terms[3].cast<float>(),
                         terms[4].cast<float>()};
  const py::gil_scoped_release released;
  joint_block("joint_distance", static_cast<const float*>(products.data), own, their, joint,
              static_cast<float*>(out.data), out.shape[1], column,
              {args.device(), reinterpret_cast<void*>(stream)});
}

}  // namespace

void bind_joint_distance(py::module_& module) {
  module.def("time_histogram_check", check);
  module.def("time_histogram", fill);
  module.def("joint_check", joint_check);
  module.def("joint_block", block);
}

}  // namespace pyreid
