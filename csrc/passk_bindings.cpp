// Pass@K tables and curves as Python functions: checks, conversions and the GIL, no mathematics.
#include "arrays.h"
#include "passk.h"

namespace medbridge {
namespace {

Values pass_at_k_array(const py::object& n_in, const py::object& c_in, const py::object& ks_in) {
  const Counts n = counts(n_in, "n");
  const Counts c = counts(c_in, "c");
  const Counts ks = counts(ks_in, "ks");
  same_length(n, c, "c");
  Values out({n.size(), ks.size()});
  {
    py::gil_scoped_release release;
    pass_at_k(n.data(), c.data(), static_cast<std::size_t>(n.size()), ks.data(), static_cast<std::size_t>(ks.size()),
                         out.mutable_data());
  }
  return out;
}

Values mean_curve_array(const py::object& n_in, const py::object& c_in, const py::object& ks_in, const py::object& weights_in) {
  const Counts n = counts(n_in, "n");
  const Counts c = counts(c_in, "c");
  const Counts ks = counts(ks_in, "ks");
  same_length(n, c, "c");
  Values weights(0);
  const double* weight = nullptr;
  if (!weights_in.is_none()) {
    weights = reals(weights_in, "weights");
    same_length(n, weights, "weights");
    weight = weights.data();
  }
  Values out(ks.size());
  {
    py::gil_scoped_release release;
    mean_curve(n.data(), c.data(), weight, static_cast<std::size_t>(n.size()), ks.data(),
                          static_cast<std::size_t>(ks.size()), out.mutable_data());
  }
  return out;
}

}  // namespace

void bind_passk(py::module_& m) {
  m.def("pass_at_k", &pass_at_k_array, py::arg("n"), py::arg("c"), py::arg("ks"), "See medbridge.support.passk.pass_at_k.");
  m.def("mean_curve", &mean_curve_array, py::arg("n"), py::arg("c"), py::arg("ks"), py::arg("weights") = py::none(),
        "See medbridge.support.passk.mean_curve.");
}

}  // namespace medbridge
