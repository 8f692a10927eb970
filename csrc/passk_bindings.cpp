// Pass@K tables and curves as Python functions: checks, conversions and the GIL, no mathematics.
#include "arrays.h"
#include "passk.h"

namespace medbridge {
namespace {

// What the functions that give a table take.
struct Request {
  Counts n, c, ks;
  Values out;
  Request(const py::object& n_in, const py::object& c_in, const py::object& ks_in)
      : n(counts(n_in, "n")), c(counts(c_in, "c")), ks(counts(ks_in, "ks")) {
    same_length(n, c, "c");
    out = Values({n.size(), ks.size()});
  }
  std::size_t n_items() const { return static_cast<std::size_t>(n.size()); }
  std::size_t n_ks() const { return static_cast<std::size_t>(ks.size()); }
};

using Table = void (*)(const std::int64_t*, const std::int64_t*, std::size_t, const std::int64_t*, std::size_t, double*);

template <Table function>
Values table_array(const py::object& n, const py::object& c, const py::object& ks) {
  Request request(n, c, ks);
  double* const out = request.out.mutable_data();
  {
    py::gil_scoped_release release;
    function(request.n.data(), request.c.data(), request.n_items(), request.ks.data(), request.n_ks(), out);
  }
  return request.out;
}

double one_real(const py::object& object, const char* name) {
  py::array array = py::array::ensure(object);
  if (!array || array.ndim() != 0) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " must be one number" + (array ? ", got shape " + shape_of(array) : ""));
  }
  return reals(array.reshape({1}), name).data()[0];
}

Values g_pass_at_k_array(const py::object& n, const py::object& c, const py::object& ks, const py::object& tau_in) {
  Request request(n, c, ks);
  const double tau = one_real(tau_in, "tau");
  double* const out = request.out.mutable_data();
  {
    py::gil_scoped_release release;
    g_pass_at_k(request.n.data(), request.c.data(), request.n_items(), request.ks.data(), request.n_ks(), tau, out);
  }
  return request.out;
}

Values reached_at_k_array(const py::object& n, const py::object& c, const py::object& ks, const py::object& floor_in) {
  Request request(n, c, ks);
  const Values floor = reals(floor_in, "floor");
  same_length(request.n, floor, "floor");
  double* const out = request.out.mutable_data();
  {
    py::gil_scoped_release release;
    reached_at_k(request.n.data(), request.c.data(), floor.data(), request.n_items(), request.ks.data(), request.n_ks(),
                 out);
  }
  return request.out;
}

Values mean_curve_array(const py::object& n_in, const py::object& c_in, const py::object& ks_in,
                        const py::object& weights_in) {
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
  double* const means = out.mutable_data();
  {
    py::gil_scoped_release release;
    mean_curve(n.data(), c.data(), weight, static_cast<std::size_t>(n.size()), ks.data(), static_cast<std::size_t>(ks.size()),
               means);
  }
  return out;
}

}  // namespace

void bind_passk(py::module_& m) {
  m.def("pass_at_k", &table_array<pass_at_k>, py::arg("n"), py::arg("c"), py::arg("ks"),
        "See medbridge.support.tables.pass_at_k.");
  m.def("pass_hat_k", &table_array<pass_hat_k>, py::arg("n"), py::arg("c"), py::arg("ks"),
        "See medbridge.support.tables.pass_hat_k.");
  m.def("g_pass_at_k", &g_pass_at_k_array, py::arg("n"), py::arg("c"), py::arg("ks"), py::arg("tau"),
        "See medbridge.support.tables.g_pass_at_k.");
  m.def("reached_at_k", &reached_at_k_array, py::arg("n"), py::arg("c"), py::arg("ks"), py::arg("floor"),
        "See medbridge.support.tables.reached_at_k.");
  m.def("mean_curve", &mean_curve_array, py::arg("n"), py::arg("c"), py::arg("ks"), py::arg("weights") = py::none(),
        "See medbridge.support.tables.mean_curve.");
}

}  // namespace medbridge
