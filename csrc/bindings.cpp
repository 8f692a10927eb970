// The Python module medbridge._native: checks dtypes and shapes, converts to plain arrays and releases the GIL.
// It holds no mathematics.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "passk.h"

namespace py = pybind11;

namespace {

using Counts = py::array_t<std::int64_t, py::array::c_style>;
using Values = py::array_t<double, py::array::c_style>;

std::string shape_of(const py::array& array) { return py::str(array.attr("shape")); }

py::array one_dimensional(const py::object& object, const char* name) {
  py::array array = py::array::ensure(object);
  if (!array) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " can't be read as a numpy array");
  }
  if (array.ndim() != 1) {
    throw py::value_error(std::string(name) + " must have one dimension, got shape " + shape_of(array));
  }
  return array;
}

// A dtype that isn't integer: name the first value that couldn't be a count (NaN, infinite, fractional), else the first value.
[[noreturn]] void refuse_dtype(const py::array& array, const char* name) {
  py::ssize_t index = 0;
  if (array.dtype().kind() == 'f') {
    const auto values = py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(array);
    for (py::ssize_t i = 0; i < values.size(); ++i) {
      if (!std::isfinite(values.at(i)) || values.at(i) != std::floor(values.at(i))) {
        index = i;
        break;
      }
    }
  }
  const py::object value = array[py::int_(index)];
  throw py::value_error(std::string(name) + " must hold integers, got dtype " + std::string(py::str(array.dtype())) + " with " +
                        name + "[" + std::to_string(index) + "] = " + std::string(py::str(value)));
}

Counts counts(const py::object& object, const char* name) {
  const py::array array = one_dimensional(object, name);
  if (array.size() == 0) return Counts(0);  // numpy gives an empty list a float dtype
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u') refuse_dtype(array, name);
  if (kind == 'u' && array.itemsize() == 8) {
    const auto wide = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>::ensure(array);
    for (py::ssize_t i = 0; i < wide.size(); ++i) {
      if (wide.at(i) > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        throw py::value_error(std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(wide.at(i)) +
                              " doesn't fit in int64");
      }
    }
  }
  return py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
}

Values weights_of(const py::object& object) {
  const py::array array = one_dimensional(object, "weights");
  const char kind = array.dtype().kind();
  if (kind != 'f' && kind != 'i' && kind != 'u') {
    throw py::value_error("weights must hold real numbers, got dtype " + std::string(py::str(array.dtype())));
  }
  return py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(array);
}

void same_length(const py::array& n, const py::array& other, const char* name) {
  if (n.size() != other.size()) {
    throw py::value_error("n has shape " + shape_of(n) + " and " + name + " has shape " + shape_of(other) +
                          ": they must have one value per item");
  }
}

Values pass_at_k(const py::object& n_in, const py::object& c_in, const py::object& ks_in) {
  const Counts n = counts(n_in, "n");
  const Counts c = counts(c_in, "c");
  const Counts ks = counts(ks_in, "ks");
  same_length(n, c, "c");
  Values out({n.size(), ks.size()});
  {
    py::gil_scoped_release release;
    medbridge::pass_at_k(n.data(), c.data(), static_cast<std::size_t>(n.size()), ks.data(), static_cast<std::size_t>(ks.size()),
                         out.mutable_data());
  }
  return out;
}

Values mean_curve(const py::object& n_in, const py::object& c_in, const py::object& ks_in, const py::object& weights_in) {
  const Counts n = counts(n_in, "n");
  const Counts c = counts(c_in, "c");
  const Counts ks = counts(ks_in, "ks");
  same_length(n, c, "c");
  Values weights(0);
  const double* weight = nullptr;
  if (!weights_in.is_none()) {
    weights = weights_of(weights_in);
    same_length(n, weights, "weights");
    weight = weights.data();
  }
  Values out(ks.size());
  {
    py::gil_scoped_release release;
    medbridge::mean_curve(n.data(), c.data(), weight, static_cast<std::size_t>(n.size()), ks.data(),
                          static_cast<std::size_t>(ks.size()), out.mutable_data());
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native routines of medbridge; use them through medbridge.support.";
  m.def("pass_at_k", &pass_at_k, py::arg("n"), py::arg("c"), py::arg("ks"), "See medbridge.support.passk.pass_at_k.");
  m.def("mean_curve", &mean_curve, py::arg("n"), py::arg("c"), py::arg("ks"), py::arg("weights") = py::none(),
        "See medbridge.support.passk.mean_curve.");
}
