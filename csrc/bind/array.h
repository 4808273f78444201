// Arrays of other libraries as borrowed views, and checks that name the argument they speak of.
//
// torch tensors are read by their attributes (their own DLPack export costs microseconds), NumPy
// arrays by the buffer protocol (it also tells read-only ones), everything else by DLPack. Nothing
// is copied, owned or synchronised: the caller's stream orders the work.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "ops.h"

namespace pyreid {

namespace py = pybind11;

enum class Library : uint8_t { torch, numpy, other };

struct Array {
  void* data = nullptr;
  std::optional<Dtype> dtype;  // none: one that no op takes
  std::string dtype_name;      // filled in where dtype is none
  int ndim = 0;
  int64_t shape[8] = {};
  Library library = Library::other;
  bool cuda = false;
  int device = 0;
  bool contiguous = true;
  bool read_only = false;

  int64_t size() const {
    int64_t product = 1;
    for (int i = 0; i < ndim; ++i) product *= shape[i];
    return product;
  }
  int64_t bytes() const { return size() * size_of(*dtype); }
};

// Reads arguments of one call of one op. All arrays must be of the library and on the device of the
// first.
class Args {
 public:
  explicit Args(const char* op) : op_(op) {}

  // `shape`: -1 allows any length.
  Array array(const char* name, py::handle object, std::initializer_list<Dtype> dtypes,
              std::initializer_list<int64_t> shape);
  Array array_of_shapes(const char* name, py::handle object, std::initializer_list<Dtype> dtypes,
                        std::initializer_list<std::initializer_list<int64_t>> shapes);
  Matrix matrix(const char* name, py::handle object, int64_t rows, int64_t cols);  // written to
  ConstMatrix const_matrix(const char* name, py::handle object, int64_t rows, int64_t cols);
  Ids ids(const char* name, py::handle object, int64_t size);
  Parts parts(const char* name, py::handle object, int64_t cols);
  double number(const char* name, py::handle object, const char* rule = "be a number");
  float scale(py::handle object);  // of logits: one over a temperature
  // Index of `value` among the names that an option may have.
  int choice(const char* name, const std::string& value, std::initializer_list<const char*> names);
  static bool is_array(py::handle object);
  int device() const { return first_.device; }

  // Raises ValueError "op: argument must rule, got value".
  [[noreturn]] void fail(const std::string& name, const std::string& rule,
                         const std::string& value);
  void require(bool holds, const char* name, const char* rule, py::handle value);

 private:
  Array view(const char* name, py::handle object);

  const char* op_;
  std::string first_name_;
  Array first_;
};

// Scratch memory from the caller's library: `allocate(bytes)` returns an array of that many uint8.
class Scratch {
 public:
  Scratch(py::handle allocate, size_t bytes);
  explicit Scratch(py::object array);  // what array() of an earlier call returned
  void* data() const { return data_; }
  const py::object& array() const { return array_; }

 private:
  py::object array_ = py::none();
  void* data_ = nullptr;
};

// A new array of the caller's library: what `allocate(shape, dtype name)` returns.
struct NewArray {
  NewArray(py::handle allocate, const std::vector<int64_t>& shape, Dtype dtype);
  py::object array;
  void* data;
};

// (B, capacity) and twice (B,): scratch of whatever keeps the best of B queries.
MineState state_of(Args& args, py::handle candidates, py::handle thresholds, py::handle counts,
                   int64_t keep);

}  // namespace pyreid
