#include <string>
#include <tuple>
#include <utility>

#include "bind/array.h"
#include "bind/module.h"

namespace pyreid {
namespace {

uint64_t read_seed(Args& args, py::handle seed) {
  const uint64_t value = PyLong_Check(seed.ptr()) ? PyLong_AsUnsignedLongLong(seed.ptr()) : 0;
  const bool failed = PyErr_Occurred() != nullptr;
  PyErr_Clear();
  args.require(PyLong_Check(seed.ptr()) && !failed, "seed", "be an integer in [0, 2**64)", seed);
  return value;
}

int64_t read_count(Args& args, const char* name, py::handle count) {
  const int64_t value = PyLong_Check(count.ptr()) ? PyLong_AsLongLong(count.ptr()) : -1;
  PyErr_Clear();
  args.require(value >= 0 && value <= INT32_MAX, name, "be an integer in [0, 2**31)", count);
  return value;
}

// `empty(shape, dtype)` makes the results, once the arguments are known to be good.
py::tuple bind(py::handle groups, py::handle targets, py::handle exclude_self, py::handle positives,
               py::handle negatives, py::handle seed, py::handle empty, py::handle allocate,
               uintptr_t stream) {
  Args args("sample_rows");
  RowSampling sampling{};
  sampling.groups = args.ids("groups", groups, -1);
  sampling.targets = args.ids("targets", targets, -1);
  if (!exclude_self.is_none())
    sampling.exclude = args.ids("exclude_self", exclude_self, sampling.targets.size);
  for (const auto& [name, ids] :
       {std::pair("groups", sampling.groups), {"targets", sampling.targets}})
    if (ids.size > INT32_MAX)
      args.fail(name, "hold fewer than 2**31 ids", std::to_string(ids.size));
  sampling.positives = read_count(args, "positives", positives);
  sampling.negatives = read_count(args, "negatives", negatives);
  sampling.seed = read_seed(args, seed);

  const auto rows = [&](const char* name, int64_t count) {
    const py::object array = empty(py::make_tuple(sampling.targets.size, count), "int64");
    const Array view = args.array(name, array, {Dtype::int64}, {sampling.targets.size, count});
    return std::pair(array, static_cast<int64_t*>(view.data));
  };
  py::object positive_rows, negative_rows;
  std::tie(positive_rows, sampling.positive_rows) = rows("positive_rows", sampling.positives);
  std::tie(negative_rows, sampling.negative_rows) = rows("negative_rows", sampling.negatives);
  const Scratch scratch(allocate, row_sampling_workspace(sampling));
  {
    const py::gil_scoped_release released;
    row_sampling(sampling, scratch.data(), {args.device(), reinterpret_cast<void*>(stream)});
  }
  return py::make_tuple(positive_rows, negative_rows);
}

}  // namespace

void bind_row_sampling(py::module_& module) { module.def("row_sampling", bind); }

}  // namespace pyreid
