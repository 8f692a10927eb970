#include "arrays.h"

#include <cmath>
#include <limits>
#include <vector>

namespace medbridge {

std::string shape_of(const py::array& array) { return py::str(array.attr("shape")); }

namespace {

// C order, native byte order and aligned, whatever was given.
constexpr int kPlain = py::array::c_style | py::array::forcecast | py::detail::npy_api::NPY_ARRAY_ALIGNED_;

py::array with_dimensions(const py::object& object, const char* name, int dimensions) {
  py::array array = py::array::ensure(object);
  if (!array) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " can't be read as a numpy array");
  }
  if (array.ndim() != dimensions) {
    throw py::value_error(std::string(name) + " must have " + (dimensions == 1 ? "one dimension" : "two dimensions") +
                          ", got shape " + shape_of(array));
  }
  return array;
}

// A dtype that isn't integer: name the first value that couldn't be a count (NaN, infinite, fractional), else the first value.
[[noreturn]] void refuse_dtype(const py::array& array, const char* name) {
  py::ssize_t index = 0;
  if (array.dtype().kind() == 'f') {
    const auto values = py::array_t<double, kPlain>::ensure(array);
    for (py::ssize_t i = 0; i < values.size(); ++i) {
      if (!std::isfinite(values.data()[i]) || values.data()[i] != std::floor(values.data()[i])) {
        index = i;
        break;
      }
    }
  }
  const py::object value = array.attr("flat")[py::int_(index)];
  throw py::value_error(std::string(name) + " must hold integers, got dtype " + std::string(py::str(array.dtype())) + " with " +
                        name + "[" + std::to_string(index) + "] = " + std::string(py::str(value)));
}

}  // namespace

Counts counts(const py::object& object, const char* name, int dimensions) {
  const py::array array = with_dimensions(object, name, dimensions);
  if (array.size() == 0) {  // numpy gives an empty list a float dtype
    return Counts(std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()));
  }
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u') refuse_dtype(array, name);
  if (kind == 'u' && array.itemsize() == 8) {
    const auto wide = py::array_t<std::uint64_t, kPlain>::ensure(array);
    for (py::ssize_t i = 0; i < wide.size(); ++i) {
      if (wide.data()[i] > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        throw py::value_error(std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(wide.data()[i]) +
                              " doesn't fit in int64");
      }
    }
  }
  return py::array_t<std::int64_t, kPlain>::ensure(array);
}

Values reals(const py::object& object, const char* name, int dimensions) {
  const py::array array = with_dimensions(object, name, dimensions);
  const char kind = array.dtype().kind();
  if (kind != 'f' && kind != 'i' && kind != 'u') {
    throw py::value_error(std::string(name) + " must hold real numbers, got dtype " + std::string(py::str(array.dtype())));
  }
  return py::array_t<double, kPlain>::ensure(array);
}

void same_length(const py::array& n, const py::array& other, const char* name) {
  if (n.size() != other.size()) {
    throw py::value_error("n has shape " + shape_of(n) + " and " + name + " has shape " + shape_of(other) +
                          ": they must have one value per item");
  }
}

}  // namespace medbridge
