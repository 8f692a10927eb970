// numpy arrays in: dtype and shape checks with errors that name the argument and the first bad index.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace medbridge {

namespace py = pybind11;

using Counts = py::array_t<std::int64_t, py::array::c_style>;
using Values = py::array_t<double, py::array::c_style>;

std::string shape_of(const py::array& array);

// `object` as an integer array with `dimensions` dimensions; floats, booleans and values that don't fit in int64 are refused.
Counts counts(const py::object& object, const char* name, int dimensions = 1);

// `object` as a real array with `dimensions` dimensions. NaN passes; what it means is for the callee to say.
Values reals(const py::object& object, const char* name, int dimensions = 1);

// Throws unless `other` has one value per item, as `n` has.
void same_length(const py::array& n, const py::array& other, const char* name);

// Each adds the functions of one part of the extension to the module.
void bind_passk(py::module_& m);
void bind_votes(py::module_& m);
void bind_rewards(py::module_& m);
void bind_bootstrap(py::module_& m);
void bind_spectrum(py::module_& m);

}  // namespace medbridge
