#include "bind/array.h"
#include "bind/module.h"

namespace pyreid {
namespace {

void bind(py::handle queries, py::handle rows, py::handle scores, uintptr_t stream) {
  Args args("product");
  const ConstMatrix right = args.const_matrix("rows", rows, -1, -1);
  const ConstMatrix left = args.const_matrix("queries", queries, -1, right.cols);
  float* const out = static_cast<float*>(
      args.array("scores", scores, {Dtype::float32}, {left.rows, right.rows}).data);
  const py::gil_scoped_release released;
  product(left, right, out, {args.device(), reinterpret_cast<void*>(stream)});
}

}  // namespace

void bind_products(py::module_& module) {
  module.attr("has_product") = has_product();
  module.def("product", bind);
}

}  // namespace pyreid
