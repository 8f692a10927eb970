// The bootstrap as a Python function: checks, conversions and the GIL, no mathematics. Names that begin with an underscore
// are for tests.
#include <pybind11/stl.h>

#include <limits>

#include "arrays.h"
#include "bootstrap.h"
#include "philox.h"

namespace medbridge {
namespace {

std::uint64_t whole(const py::object& object, const char* name, std::uint64_t least, std::uint64_t most) {
  const auto number = py::reinterpret_steal<py::int_>(PyNumber_Index(object.ptr()));
  if (!number) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " = " + std::string(py::repr(object)) + ", must be an integer");
  }
  if (number < py::int_(least) || number > py::int_(most)) {
    throw py::value_error(std::string(name) + " = " + std::string(py::str(number)) + ", must be from " +
                          std::to_string(least) + " to " + std::to_string(most));
  }
  return number.cast<std::uint64_t>();
}

double share(const py::object& object, const char* name) {
  const double value = PyFloat_AsDouble(object.ptr());
  const bool is_number = PyErr_Occurred() == nullptr;
  PyErr_Clear();
  if (!is_number || !(value > 0.0 && value < 1.0)) {
    throw py::value_error(std::string(name) + " = " + std::string(py::repr(object)) + ", must be above 0 and below 1");
  }
  return value;
}

// Returns the curves [ks] in the order of CurveIntervals, then the replicates [replicates, ks].
py::tuple bootstrap_curve_arrays(const py::object& n_in, const py::object& c_in, const py::object& ks_in,
                                 const py::object& groups_in, const py::object& replicates, const py::object& seed,
                                 const py::object& confidence, bool portable) {
  const Counts n = counts(n_in, "n");
  const Counts c = counts(c_in, "c");
  const Counts ks = counts(ks_in, "ks");
  same_length(n, c, "c");
  Counts groups(0);
  const std::int64_t* labels = nullptr;
  if (!groups_in.is_none()) {
    groups = counts(groups_in, "groups");
    same_length(n, groups, "groups");
    labels = groups.data();
  }
  const BootstrapSettings settings{static_cast<std::int64_t>(whole(replicates, "replicates", 1, kMaxReplicates)),
                                   whole(seed, "seed", 0, std::numeric_limits<std::uint64_t>::max()),
                                   share(confidence, "confidence"), portable};
  Values curves[6];
  for (Values& curve : curves) curve = Values(ks.size());
  const CurveIntervals out{curves[0].mutable_data(), curves[1].mutable_data(), curves[2].mutable_data(),
                           curves[3].mutable_data(), curves[4].mutable_data(), curves[5].mutable_data()};
  Values values({ks.size(), static_cast<py::ssize_t>(settings.replicates)});
  {
    py::gil_scoped_release release;
    bootstrap_curve(n.data(), c.data(), labels, static_cast<std::size_t>(n.size()), ks.data(),
                    static_cast<std::size_t>(ks.size()), settings, values.mutable_data(), out);
  }
  return py::make_tuple(curves[0], curves[1], curves[2], curves[3], curves[4], curves[5], values.attr("T"));
}

py::array_t<std::uint32_t> resample_counts_array(const py::array_t<std::uint32_t, py::array::c_style>& multiplicity,
                                                 std::int64_t replicates, std::uint64_t seed) {
  py::array_t<std::uint32_t> out({static_cast<py::ssize_t>(replicates), multiplicity.size()});
  resample_counts(multiplicity.data(), static_cast<std::size_t>(multiplicity.size()), {replicates, seed, 0.5, false},
                  out.mutable_data());
  return out;
}

py::array_t<std::uint32_t> philox_words_array(std::uint64_t seed, std::uint64_t stream, std::size_t words, bool portable) {
  py::array_t<std::uint32_t> out(static_cast<py::ssize_t>(words));
  philox_words({1, seed, 0.5, portable}, stream, words, out.mutable_data());
  return out;
}

}  // namespace

void bind_bootstrap(py::module_& m) {
  m.def("bootstrap_curve", &bootstrap_curve_arrays, py::arg("n"), py::arg("c"), py::arg("ks"), py::arg("groups"),
        py::arg("replicates"), py::arg("seed"), py::arg("confidence"), py::arg("portable") = false,
        "See medbridge.support.bootstrap.bootstrap_curve.");
  m.def("_resample_counts", &resample_counts_array, py::arg("multiplicity"), py::arg("replicates"), py::arg("seed"));
  m.def("_philox_block", &philox_block, py::arg("counter"), py::arg("key0"), py::arg("key1"));
  m.def("_philox_words", &philox_words_array, py::arg("seed"), py::arg("stream"), py::arg("words"), py::arg("portable"));
  m.def("_normal_quantile", &normal_quantile, py::arg("p"));
}

}  // namespace medbridge
