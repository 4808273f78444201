#include <string>

#include "bind/array.h"
#include "bind/module.h"

namespace pyreid {
namespace {

bool overlap(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  const auto a_begin = reinterpret_cast<uintptr_t>(a), b_begin = reinterpret_cast<uintptr_t>(b);
  return a_begin < b_begin + b_bytes && b_begin < a_begin + a_bytes && a_bytes > 0 && b_bytes > 0;
}

void bind(py::handle bank, py::handle features, py::handle rows, py::handle momentum,
          const std::string& repeats, py::handle parts, bool normalize, py::handle allocate,
          uintptr_t stream) {
  Args args("memory_update_");
  MemoryUpdate update{};
  update.bank = args.matrix("bank", bank, -1, -1);
  update.features = args.const_matrix("features", features, -1, update.bank.cols);
  update.rows = args.ids("rows", rows, update.features.rows);
  if (update.features.dtype != update.bank.dtype && update.features.dtype != Dtype::float32 &&
      update.bank.dtype != Dtype::float32)
    args.fail("features", "be float32 or of the bank's dtype", "the other half precision");
  const int64_t bank_bytes = update.bank.rows * update.bank.cols * size_of(update.bank.dtype);
  const int64_t feature_bytes =
      update.features.rows * update.features.cols * size_of(update.features.dtype);
  if (overlap(update.bank.data, bank_bytes, update.features.data, feature_bytes))
    args.fail("features", "not share memory with bank", "a view of it");
  constexpr int64_t kMaxRows = int64_t(UINT32_MAX) - 1, kMaxEvents = 1 << 30;
  if (update.bank.rows > kMaxRows || update.bank.cols > INT32_MAX)
    args.fail("bank", "have fewer than 2**32 - 1 rows and 2**31 columns",
              std::to_string(update.bank.rows) + " x " + std::to_string(update.bank.cols));
  if (update.rows.size > kMaxEvents)
    args.fail("rows", "hold at most 2**30 events", std::to_string(update.rows.size));

  if (Args::is_array(momentum)) {
    update.momenta = static_cast<const float*>(
        args.array("momentum", momentum, {Dtype::float32}, {update.rows.size}).data);
  } else {
    const double keep =
        args.number("momentum", momentum, "be a number or a float32 array of one per event");
    args.require(keep >= 0 && keep <= 1, "momentum", "lie in [0, 1]", momentum);
    update.keep = float(keep);
    update.take = float(1 - keep);
  }
  update.repeats =
      Repeats(args.choice("repeats", repeats, {"sequential", "last", "hardest", "mean"}));
  update.parts = args.parts("parts", parts, update.bank.cols);
  update.normalize = normalize;

  const Scratch scratch(allocate, memory_update_workspace(update));
  const py::gil_scoped_release released;
  memory_update(update, scratch.data(), {args.device(), reinterpret_cast<void*>(stream)});
}

}  // namespace

void bind_memory_update(py::module_& module) { module.def("memory_update", bind); }

}  // namespace pyreid
