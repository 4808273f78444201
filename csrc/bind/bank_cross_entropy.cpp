#include <string>

#include "bind/array.h"
#include "bind/module.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "bank_cross_entropy";

// One call of the op: its arguments, checked once, for all the panels that follow. The arrays are
// borrowed; the caller keeps them alive.
class Loss {
 public:
  Loss(py::handle queries, py::handle bank, py::handle targets, py::handle labels, py::handle scale,
       const std::string& reduce, py::handle label_smoothing, uintptr_t stream) {
    Args args(kOp);
    const ConstMatrix rows = args.const_matrix("queries", queries, -1, -1);
    loss_.bank = args.const_matrix("bank", bank, -1, rows.cols);
    if (loss_.bank.rows < 1 || loss_.bank.rows > kMaxRows || loss_.bank.cols > INT32_MAX)
      args.fail("bank", "have 1 to 2**30 rows and fewer than 2**31 columns",
                std::to_string(loss_.bank.rows) + " x " + std::to_string(loss_.bank.cols));
    loss_.targets = args.ids("targets", targets, rows.rows);
    loss_.reduce = Reduce(args.choice("reduce", reduce, {"row", "cluster_mean", "label_uniform"}));
    const std::string place = "where reduce is '" + reduce + "'";
    if (loss_.reduce == Reduce::row) {
      if (!labels.is_none()) args.fail("labels", "be None " + place, "labels");
    } else {
      if (labels.is_none()) args.fail("labels", "be given " + place, "None");
      loss_.labels = args.ids("labels", labels, loss_.bank.rows);
    }
    loss_.scale = args.scale(scale);
    const double smoothing = args.number("label_smoothing", label_smoothing);
    args.require(smoothing >= 0 && smoothing <= 1, "label_smoothing", "lie in [0, 1]",
                 label_smoothing);
    loss_.smoothing = float(smoothing);
    stream_ = {args.device(), reinterpret_cast<void*>(stream)};
  }

  // The caller keeps `groups` and `target_columns` for the calls that follow.
  void group_labels(py::handle groups, py::handle target_columns, py::handle allocate) {
    Args args(kOp);
    loss_.groups = words(args, "groups", groups, group_words(loss_.bank.rows));
    loss_.target_columns = words(args, "target_columns", target_columns, loss_.targets.size);
    const Scratch scratch(allocate, group_labels_workspace(loss_));
    const py::gil_scoped_release released;
    pyreid::group_labels(loss_, scratch.data(), stream_);
  }

  int64_t label_columns() const { return pyreid::label_columns(loss_); }

  void label_means(int64_t first, py::handle means) const {
    Args args(kOp);
    const Matrix matrix = args.matrix("means", means, -1, loss_.bank.cols);
    const py::gil_scoped_release released;
    pyreid::label_means(loss_, first, matrix, stream_);
  }

  // sums: None where no gradients are wanted.
  void fold_scores(int64_t first, py::handle scores, py::handle running, py::handle sums) const {
    Args args(kOp);
    const Array array = args.array("scores", scores, {Dtype::float32}, {-1, -1});
    const ScorePanel panel{static_cast<float*>(array.data), array.shape[0], first, array.shape[1]};
    RunningSoftmax* const state = this->running(args, running, panel.queries);
    float* const rows = this->sums(args, sums, panel.queries);
    const py::gil_scoped_release released;
    pyreid::fold_scores(loss_, panel, state, rows, stream_);
  }

  void finish_losses(py::handle running, py::handle losses, py::handle sums) const {
    Args args(kOp);
    const int64_t batch = loss_.targets.size, queries = batch + (loss_.smoothing > 0 ? 1 : 0);
    const RunningSoftmax* const state = this->running(args, running, queries);
    float* const values = floats(args, "losses", losses, {batch});
    float* const rows = this->sums(args, sums, queries);
    const py::gil_scoped_release released;
    pyreid::finish_losses(loss_, state, values, rows, stream_);
  }

 private:
  static constexpr int64_t kMaxRows = 1 << 30;
  static constexpr int64_t kRunning = sizeof(RunningSoftmax) / sizeof(float);

  static float* floats(Args& args, const char* name, py::handle array,
                       std::initializer_list<int64_t> shape) {
    return static_cast<float*>(args.array(name, array, {Dtype::float32}, shape).data);
  }
  static int32_t* words(Args& args, const char* name, py::handle array, int64_t size) {
    return static_cast<int32_t*>(args.array(name, array, {Dtype::int32}, {size}).data);
  }
  static RunningSoftmax* running(Args& args, py::handle array, int64_t queries) {
    return reinterpret_cast<RunningSoftmax*>(floats(args, "running", array, {queries, kRunning}));
  }
  float* sums(Args& args, py::handle array, int64_t queries) const {
    return array.is_none() ? nullptr : floats(args, "sums", array, {queries, loss_.bank.cols});
  }

  BankCrossEntropy loss_{};
  Stream stream_{};
};

}  // namespace

void bind_bank_cross_entropy(py::module_& module) {
  // Local to the module: every floor has a class of this name.
  py::class_<Loss>(module, "BankCrossEntropy", py::module_local())
      .def(py::init<py::handle, py::handle, py::handle, py::handle, py::handle, const std::string&,
                    py::handle, uintptr_t>())
      .def("group_labels", &Loss::group_labels)
      .def("label_columns", &Loss::label_columns)
      .def("label_means", &Loss::label_means)
      .def("fold_scores", &Loss::fold_scores)
      .def("finish_losses", &Loss::finish_losses);
}

}  // namespace pyreid
