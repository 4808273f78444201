#include <string>

#include "bind/array.h"
#include "bind/module.h"

namespace pyreid {
namespace {

Classes read_classes(Args& args, py::handle features, py::handle labels, py::handle cameras) {
  Classes classes{};
  classes.features = args.const_matrix("features", features, -1, -1);
  if (classes.features.rows > INT32_MAX || classes.features.cols > INT32_MAX)
    args.fail(
        "features", "have fewer than 2**31 rows and columns",
        std::to_string(classes.features.rows) + " x " + std::to_string(classes.features.cols));
  classes.labels = args.ids("labels", labels, classes.features.rows);
  if (!cameras.is_none()) classes.cameras = args.ids("cameras", cameras, classes.features.rows);
  return classes;
}

// Returns the workspace, for fill().
py::object count(py::handle features, py::handle labels, py::handle cameras, py::handle normalize,
                 py::handle count, py::handle allocate, uintptr_t stream) {
  Args args("class_means");
  const Classes classes = read_classes(args, features, labels, cameras);
  args.require(PyBool_Check(normalize.ptr()), "normalize", "be True or False", normalize);
  int64_t* const result =
      static_cast<int64_t*>(args.array("count", count, {Dtype::int64}, {}).data);
  const Scratch scratch(allocate, class_means_workspace(classes));
  {
    const py::gil_scoped_release released;
    class_means_count(classes, result, scratch.data(),
                      {args.device(), reinterpret_cast<void*>(stream)});
  }
  return scratch.array();
}

void fill(py::handle features, py::handle labels, py::handle cameras, bool normalize,
          py::handle means, py::handle mean_labels, py::handle mean_cameras, py::handle counts,
          const py::object& workspace, uintptr_t stream) {
  Args args("class_means");
  const Classes classes = read_classes(args, features, labels, cameras);
  const Matrix matrix = args.matrix("means", means, -1, classes.features.cols);
  const auto column = [&](const char* name, py::handle object) {
    return static_cast<int64_t*>(args.array(name, object, {Dtype::int64}, {matrix.rows}).data);
  };
  Means result{};
  result.classes = matrix.rows;
  result.normalize = normalize;
  result.means = static_cast<float*>(matrix.data);
  result.labels = column("mean_labels", mean_labels);
  if (!mean_cameras.is_none()) result.cameras = column("mean_cameras", mean_cameras);
  result.counts = column("counts", counts);
  const Scratch scratch(workspace);
  const py::gil_scoped_release released;
  class_means_fill(classes, result, scratch.data(),
                   {args.device(), reinterpret_cast<void*>(stream)});
}

}  // namespace

void bind_class_means(py::module_& module) {
  module.def("class_means_count", count);
  module.def("class_means_fill", fill);
}

}  // namespace pyreid
