#include "bind/array.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace pyreid {
namespace {

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return "float32";
    case Dtype::float16:
      return "float16";
    case Dtype::bfloat16:
      return "bfloat16";
    case Dtype::int32:
      return "int32";
    case Dtype::int64:
      return "int64";
    case Dtype::uint8:
      return "uint8";
  }
  return "";
}

void set_dtype(Array& array, const std::string& name) {
  for (const Dtype dtype :
       {Dtype::float32, Dtype::float16, Dtype::bfloat16, Dtype::int32, Dtype::int64, Dtype::uint8})
    if (name == name_of(dtype)) array.dtype = dtype;
  if (!array.dtype) array.dtype_name = name;
}

// C-contiguous in the sense of NumPy and torch: strides of axes of length one, and of empty arrays,
// are arbitrary. `strides` counts elements; null means C-contiguous.
bool is_contiguous(const Array& array, const int64_t* strides) {
  if (strides == nullptr || array.size() == 0) return true;
  int64_t expected = 1;
  for (int axis = array.ndim - 1; axis >= 0; --axis) {
    if (array.shape[axis] != 1 && strides[axis] != expected) return false;
    expected *= array.shape[axis];
  }
  return true;
}

// The few types of array, and the few torch dtypes, that a process uses: looked up by identity,
// because asking Python for their names takes longer than many an op. Entries are kept alive.
template <class Value>
struct IdentityCache {
  std::vector<std::pair<PyObject*, Value>> entries;

  template <class Make>
  const Value& get(PyObject* key, Make make) {
    for (const auto& entry : entries)
      if (entry.first == key) return entry.second;
    Value value = make();
    Py_INCREF(key);
    entries.emplace_back(key, std::move(value));
    return entries.back().second;
  }
};

Library library_of(py::handle object) {
  static IdentityCache<Library> cache;
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return cache.get(type, [&] {
    for (const py::handle base : py::handle(type).attr("__mro__")) {
      const std::string name =
          py::str("{}.{}").format(base.attr("__module__"), base.attr("__name__"));
      if (name == "torch.Tensor") return Library::torch;
      if (name == "numpy.ndarray") return Library::numpy;
    }
    return Library::other;
  });
}

struct TorchNames {
  py::object data_ptr{py::str("data_ptr")}, dtype{py::str("dtype")}, shape{py::str("shape")},
      is_contiguous{py::str("is_contiguous")}, is_cuda{py::str("is_cuda")},
      device{py::str("device")}, get_device{py::str("get_device")};
};

py::object attribute(py::handle object, const py::object& name) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), name.ptr());
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object call_method(py::handle object, const py::object& name) {
  PyObject* const value = PyObject_CallMethodNoArgs(object.ptr(), name.ptr());
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

struct TorchDtype {
  std::optional<Dtype> dtype;
  std::string name;
};

Array view_torch(py::handle tensor) {
  static const TorchNames& names = *new TorchNames;  // never freed: the interpreter may end first
  static IdentityCache<TorchDtype> dtypes;
  Array array;
  array.library = Library::torch;
  const py::object shape = attribute(tensor, names.shape);
  array.ndim = int(PyTuple_GET_SIZE(shape.ptr()));
  for (int axis = 0; axis < std::min(array.ndim, 8); ++axis)
    array.shape[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), axis));
  const py::object dtype = attribute(tensor, names.dtype);
  const TorchDtype& known = dtypes.get(dtype.ptr(), [&] {
    Array probe;
    set_dtype(probe, std::string(py::str(dtype)).substr(std::strlen("torch.")));
    return TorchDtype{probe.dtype, probe.dtype_name};
  });
  array.dtype = known.dtype;
  array.dtype_name = known.name;
  array.contiguous = call_method(tensor, names.is_contiguous).ptr() == Py_True;
  array.cuda = attribute(tensor, names.is_cuda).ptr() == Py_True;
  array.device = array.cuda ? call_method(tensor, names.get_device).cast<int>() : 0;
  if (!array.cuda) {
    const py::object device = attribute(tensor, names.device);
    const std::string kind = py::str(device.attr("type"));
    if (kind != "cpu")
      throw py::value_error("tensors on device '" + kind +
                            "' have no floor in pyreid: move them to "
                            "the CPU or to CUDA");
  }
  array.data = reinterpret_cast<void*>(call_method(tensor, names.data_ptr).cast<uintptr_t>());
  return array;
}

struct Buffer {
  Py_buffer view{};
  ~Buffer() { PyBuffer_Release(&view); }
};

Array view_numpy(py::handle ndarray) {
  Array array;
  array.library = Library::numpy;
  Buffer buffer;
  py::object bits;  // NumPy exports no buffer of foreign dtypes such as ml_dtypes.bfloat16
  if (PyObject_GetBuffer(ndarray.ptr(), &buffer.view, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    PyErr_Clear();
    bits = ndarray.attr("view")(
        "uint" + std::to_string(8 * ndarray.attr("dtype").attr("itemsize").cast<int>()));
    if (PyObject_GetBuffer(bits.ptr(), &buffer.view, PyBUF_STRIDES) != 0)
      throw py::error_already_set();
  }
  const Py_buffer& view = buffer.view;
  array.data = view.buf;
  array.read_only = view.readonly != 0;
  array.ndim = view.ndim;
  int64_t strides[8];
  for (int axis = 0; axis < std::min(array.ndim, 8); ++axis) {
    array.shape[axis] = view.shape[axis];
    strides[axis] = view.itemsize > 0 ? view.strides[axis] / view.itemsize : 0;
  }
  array.contiguous = is_contiguous(array, strides);
  const std::string format = bits || view.format == nullptr ? "" : view.format;
  if (format == "f") {
    array.dtype = Dtype::float32;
  } else if (format == "e") {
    array.dtype = Dtype::float16;
  } else if (format == "l" || format == "q") {
    array.dtype = view.itemsize == 8 ? Dtype::int64 : Dtype::int32;
  } else if (format == "i") {
    array.dtype = Dtype::int32;
  } else if (format == "B") {
    array.dtype = Dtype::uint8;
  } else {
    set_dtype(array, py::str(ndarray.attr("dtype")));
  }
  return array;
}

// The parts of the DLPack ABI (version 0, the unversioned capsule) that are read here.
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

Array view_dlpack(py::handle object) {
  constexpr int kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13;
  const int device_type = object.attr("__dlpack_device__")().cast<py::tuple>()[0].cast<int>();
  const bool cuda = device_type == kCuda || device_type == kCudaManaged;
  if (!cuda && device_type != kCpu && device_type != kCudaHost)
    throw py::value_error("arrays of DLPack device type " + std::to_string(device_type) +
                          " have no floor in pyreid: move them to the CPU or to CUDA");
  // Stream -1: the producer must not synchronise. The capsule stays unconsumed and frees itself.
  const py::object capsule =
      cuda ? object.attr("__dlpack__")(py::arg("stream") = -1) : object.attr("__dlpack__")();
  const auto* tensor =
      static_cast<const DLTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (tensor == nullptr) throw py::error_already_set();
  Array array;
  array.cuda = cuda;
  array.device = tensor->device.id;
  array.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  array.ndim = tensor->ndim;
  std::copy_n(tensor->shape, std::min(array.ndim, 8), array.shape);
  array.contiguous = is_contiguous(array, tensor->strides);
  static const char* const kinds[] = {"int",    "uint",    "float", "handle",
                                      "bfloat", "complex", "bool"};
  const int code = tensor->dtype.code;
  set_dtype(array, (code < 7 ? kinds[code] : "type") + std::to_string(tensor->dtype.bits));
  return array;
}

void* data_of(py::handle array) {
  switch (library_of(array)) {
    case Library::torch:
      return view_torch(array).data;
    case Library::numpy:
      return view_numpy(array).data;
    default:
      return view_dlpack(array).data;
  }
}

std::string shown(py::handle object) { return py::str(py::repr(object)); }

std::string text(const std::vector<int64_t>& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i)
    out += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  return out + (shape.size() == 1 ? ",)" : ")");
}

std::string text(const Array& array) {
  return text(std::vector<int64_t>(array.shape, array.shape + std::min(array.ndim, 8)));
}

// Before item `index` of "a, b or c".
std::string separator(size_t index, size_t count) {
  return index == 0 ? "" : index + 1 == count ? " or " : ", ";
}

std::string place(const Array& array) {
  const char* const libraries[] = {"torch", "numpy", "other"};
  const std::string device = array.cuda ? "cuda:" + std::to_string(array.device) : "cpu";
  return array.library == Library::other
             ? device
             : std::string(libraries[int(array.library)]) + " on " + device;
}

}  // namespace

void Args::fail(const std::string& name, const std::string& rule, const std::string& value) {
  throw py::value_error(std::string(op_) + ": " + name + " must " + rule + ", got " + value);
}

bool Args::is_array(py::handle object) {
  return library_of(object) != Library::other || py::hasattr(object, "__dlpack_device__");
}

void Args::require(bool holds, const char* name, const char* rule, py::handle value) {
  if (!holds) fail(name, rule, shown(value));
}

double Args::number(const char* name, py::handle object, const char* rule) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (PyErr_Occurred() == nullptr) return value;
  PyErr_Clear();
  fail(name, rule, shown(object));
}

float Args::scale(py::handle object) {
  constexpr const char* kRule = "be a positive, finite number";
  const float scale = float(number("scale", object, kRule));
  require(std::isfinite(scale) && scale > 0, "scale", kRule, object);
  return scale;
}

int Args::choice(const char* name, const std::string& value,
                 std::initializer_list<const char*> names) {
  const auto found = std::find(names.begin(), names.end(), value);
  if (found != names.end()) return int(found - names.begin());
  std::string rule = "be ";
  for (auto each = names.begin(); each != names.end(); ++each)
    rule += separator(each - names.begin(), names.size()) + ("'" + std::string(*each) + "'");
  fail(name, rule, "'" + value + "'");
}

Array Args::view(const char* name, py::handle object) {
  Array array;
  try {
    const Library library = library_of(object);
    if (library == Library::torch) {
      array = view_torch(object);
    } else if (library == Library::numpy) {
      array = view_numpy(object);
    } else if (py::hasattr(object, "__dlpack_device__")) {
      array = view_dlpack(object);
    } else {
      fail(name, "be an array of torch, CuPy or NumPy",
           py::str(py::type::of(object).attr("__name__")));
    }
  } catch (const py::value_error& error) {
    const std::string message = error.what();
    if (message.rfind(op_, 0) == 0) throw;
    throw py::value_error(std::string(op_) + ": " + name + ": " + message);
  }
  if (array.ndim > 8) fail(name, "have at most 8 axes", std::to_string(array.ndim));
  if (first_name_.empty()) {
    if (array.cuda != floor_is_cuda())
      fail(name, floor_is_cuda() ? "be on a CUDA device" : "be on the CPU", place(array));
    first_name_ = name;
    first_ = array;
  } else if (array.library != first_.library || array.cuda != first_.cuda ||
             array.device != first_.device) {
    fail(name,
         "be of one library and on one device with " + first_name_ + " (" + place(first_) + ")",
         place(array));
  }
  return array;
}

Array Args::array(const char* name, py::handle object, std::initializer_list<Dtype> dtypes,
                  std::initializer_list<int64_t> shape) {
  return array_of_shapes(name, object, dtypes, {shape});
}

Array Args::array_of_shapes(const char* name, py::handle object,
                            std::initializer_list<Dtype> dtypes,
                            std::initializer_list<std::initializer_list<int64_t>> shapes) {
  const Array array = view(name, object);
  if (!array.dtype || std::find(dtypes.begin(), dtypes.end(), *array.dtype) == dtypes.end()) {
    std::string rule = "be ";
    for (auto each = dtypes.begin(); each != dtypes.end(); ++each)
      rule += separator(each - dtypes.begin(), dtypes.size()) + name_of(*each);
    fail(name, rule, array.dtype ? name_of(*array.dtype) : array.dtype_name);
  }
  const auto fits = [&](std::initializer_list<int64_t> shape) {
    return array.ndim == int(shape.size()) &&
           std::equal(shape.begin(), shape.end(), array.shape,
                      [](int64_t wanted, int64_t size) { return wanted < 0 || wanted == size; });
  };
  if (std::none_of(shapes.begin(), shapes.end(), fits)) {
    std::string rule = "have shape ";
    for (auto shape = shapes.begin(); shape != shapes.end(); ++shape)
      rule += (shape == shapes.begin() ? "" : " or ") + text(std::vector<int64_t>(*shape));
    fail(name, rule, text(array));
  }
  if (!array.contiguous) fail(name, "be C-contiguous", "a strided view of shape " + text(array));
  return array;
}

Matrix Args::matrix(const char* name, py::handle object, int64_t rows, int64_t cols) {
  const Array array =
      this->array(name, object, {Dtype::float32, Dtype::float16, Dtype::bfloat16}, {rows, cols});
  if (array.read_only) fail(name, "be writable", "a read-only array");
  return {array.data, *array.dtype, array.shape[0], array.shape[1]};
}

ConstMatrix Args::const_matrix(const char* name, py::handle object, int64_t rows, int64_t cols) {
  const Array array =
      this->array(name, object, {Dtype::float32, Dtype::float16, Dtype::bfloat16}, {rows, cols});
  return {array.data, *array.dtype, array.shape[0], array.shape[1]};
}

Ids Args::ids(const char* name, py::handle object, int64_t size) {
  const Array array = this->array(name, object, {Dtype::int64, Dtype::int32}, {size});
  return {array.data, *array.dtype, array.shape[0]};
}

Parts Args::parts(const char* name, py::handle object, int64_t cols) {
  Parts parts{};
  if (PyLong_Check(object.ptr())) {
    const int64_t count = PyLong_AsLongLong(object.ptr());
    PyErr_Clear();
    if (count < 1 || (cols > 0 && cols % count != 0))
      fail(name, "be a count that divides the " + std::to_string(cols) + " columns, or their sizes",
           shown(object));
    parts.count = int(count);
    parts.size = int(cols / count);
    return parts;
  }
  if (!PyTuple_Check(object.ptr()) && !PyList_Check(object.ptr()))
    fail(name, "be a count or a tuple of sizes", shown(object));
  int64_t total = 0, first = 0;
  bool equal = true;
  const int64_t count = int64_t(py::len(object));
  for (const py::handle item : object) {
    const int64_t size = PyLong_Check(item.ptr()) ? PyLong_AsLongLong(item.ptr()) : 0;
    PyErr_Clear();
    if (size < 1) fail(name, "hold positive sizes", shown(object));
    first = parts.count == 0 ? size : first;
    equal = equal && size == first;
    if (!equal && count > Parts::kMaxUnequal)
      fail(name, "hold at most " + std::to_string(Parts::kMaxUnequal) + " unequal sizes",
           std::to_string(count));
    total += size;
    if (parts.count < Parts::kMaxUnequal)
      parts.ends[parts.count] = int(std::min<int64_t>(total, INT32_MAX));
    ++parts.count;
  }
  if (total != cols)
    fail(name, "sum to the " + std::to_string(cols) + " columns",
         shown(object) + " = " + std::to_string(total));
  if (equal) parts.size = int(first);
  return parts;
}

Scratch::Scratch(py::handle allocate, size_t bytes)
    : Scratch(bytes > 0 ? py::object(allocate(bytes)) : py::none()) {}

Scratch::Scratch(py::object array) : array_(std::move(array)) {
  if (!array_.is_none()) data_ = data_of(array_);
}

NewArray::NewArray(py::handle allocate, const std::vector<int64_t>& shape, Dtype dtype) {
  py::tuple sizes(shape.size());
  for (size_t axis = 0; axis < shape.size(); ++axis) sizes[axis] = shape[axis];
  array = allocate(sizes, name_of(dtype));
  data = data_of(array);
}

}  // namespace pyreid
