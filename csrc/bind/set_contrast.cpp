#include <string>
#include <vector>

#include "bind/array.h"
#include "bind/module.h"

namespace pyreid {
namespace {

Ids id_lists(Args& args, const char* name, py::handle object, int64_t batch, int64_t& length) {
  const Array array = args.array(name, object, {Dtype::int64, Dtype::int32}, {batch, -1});
  length = array.shape[1];
  return {array.data, *array.dtype, array.size()};
}

// The arguments that forward and backward share; `batch` query rows.
ContrastList candidates_of(Args& args, py::handle bank, py::handle positives, py::handle negatives,
                           int64_t batch, int64_t dim) {
  ContrastList candidates{};
  candidates.batch = batch;
  candidates.bank = args.const_matrix("bank", bank, -1, dim);
  candidates.positives = id_lists(args, "positives", positives, batch, candidates.num_positives);
  candidates.negatives = {nullptr, Dtype::int64, 0};
  if (!negatives.is_none())
    candidates.negatives = id_lists(args, "negatives", negatives, batch, candidates.num_negatives);
  candidates.count = candidates.num_positives + candidates.num_negatives;
  if (candidates.bank.cols > INT32_MAX)
    args.fail("bank", "have fewer than 2**31 columns", std::to_string(candidates.bank.cols));
  constexpr int64_t kMaxCount = 1 << 30;
  if (candidates.count > kMaxCount)
    args.fail("positives", "and negatives hold at most 2**30 rows for a query",
              std::to_string(candidates.count));
  return candidates;
}

py::tuple forward(py::handle queries, py::handle bank, py::handle positives, py::handle negatives,
                  py::handle weights, py::handle scale, const std::string& denominator,
                  py::handle allocate, uintptr_t stream) {
  Args args("set_contrast");
  const Array query =
      args.array_of_shapes("queries", queries, {Dtype::float32, Dtype::float16, Dtype::bfloat16},
                           {{-1, -1}, {-1, -1, -1}});
  if (query.dtype != Dtype::float32)
    args.fail("queries", "be widened to float32 here", "half precision");
  const int64_t batch = query.shape[query.ndim - 2], dim = query.shape[query.ndim - 1];

  SetContrast contrast{};
  contrast.queries = static_cast<const float*>(query.data);
  contrast.sets = query.ndim == 3 ? query.shape[0] : 1;
  contrast.candidates = candidates_of(args, bank, positives, negatives, batch, dim);
  if (!weights.is_none()) {
    const int64_t length = contrast.candidates.num_positives;
    const Array array =
        args.array_of_shapes("weights", weights, {Dtype::float32}, {{length}, {batch, length}});
    contrast.weights = static_cast<const float*>(array.data);
    contrast.weights_per_row = array.ndim == 2;
  }
  contrast.scale = args.scale(scale);
  contrast.own = args.choice("denominator", denominator, {"joint", "own"}) == 1;

  std::vector<int64_t> shape(query.shape, query.shape + query.ndim - 1);
  const NewArray loss(allocate, shape, Dtype::float32);
  shape.push_back(contrast.candidates.count);
  const NewArray slopes(allocate, shape, Dtype::float32);
  contrast.loss = static_cast<float*>(loss.data);
  contrast.slopes = static_cast<float*>(slopes.data);
  {
    const py::gil_scoped_release released;
    set_contrast(contrast, {args.device(), reinterpret_cast<void*>(stream)});
  }
  return py::make_tuple(loss.array, slopes.array);
}

py::object backward(py::handle grad_loss, py::handle slopes, py::handle bank, py::handle positives,
                    py::handle negatives, py::handle allocate, uintptr_t stream) {
  Args args("set_contrast");
  const Array slope =
      args.array_of_shapes("slopes", slopes, {Dtype::float32}, {{-1, -1}, {-1, -1, -1}});
  const int64_t batch = slope.shape[slope.ndim - 2];

  SetContrastBackward task{};
  task.sets = slope.ndim == 3 ? slope.shape[0] : 1;
  task.slopes = static_cast<const float*>(slope.data);
  const auto grad = slope.ndim == 3
                        ? args.array("grad_loss", grad_loss, {Dtype::float32}, {task.sets, batch})
                        : args.array("grad_loss", grad_loss, {Dtype::float32}, {batch});
  task.grad_loss = static_cast<const float*>(grad.data);
  task.candidates = candidates_of(args, bank, positives, negatives, batch, -1);
  if (task.candidates.count != slope.shape[slope.ndim - 1])
    args.fail("slopes", "hold one per candidate, " + std::to_string(task.candidates.count),
              std::to_string(slope.shape[slope.ndim - 1]));

  std::vector<int64_t> shape(slope.shape, slope.shape + slope.ndim);
  shape.back() = task.candidates.bank.cols;
  const NewArray grad_queries(allocate, shape, Dtype::float32);
  task.grad_queries = static_cast<float*>(grad_queries.data);
  const NewArray workspace(allocate, {int64_t(set_contrast_backward_workspace(task))},
                           Dtype::uint8);
  {
    const py::gil_scoped_release released;
    set_contrast_backward(task, workspace.data, {args.device(), reinterpret_cast<void*>(stream)});
  }
  return grad_queries.array;
}

}  // namespace

void bind_set_contrast(py::module_& module) {
  module.def("set_contrast", forward);
  module.def("set_contrast_backward", backward);
}

}  // namespace pyreid
