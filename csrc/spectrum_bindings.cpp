// Mixture fits as Python functions: checks, conversions and the GIL, no mathematics.
#include "arrays.h"
#include "spectrum.h"

#include <cmath>
#include <vector>

namespace medbridge {
namespace {

std::size_t size_of(const py::array& array) { return static_cast<std::size_t>(array.size()); }

Counts as_array(const std::vector<std::int64_t>& values) {
  return Counts(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple distinct_counts_arrays(const py::object& n_in, const py::object& c_in) {
  const Counts n = counts(n_in, "n");
  const Counts c = counts(c_in, "c");
  same_length(n, c, "c");
  DistinctCounts distinct;
  {
    py::gil_scoped_release release;
    distinct = distinct_counts(n.data(), c.data(), size_of(n));
  }
  return py::make_tuple(as_array(distinct.n), as_array(distinct.c), as_array(distinct.row_of));
}

// Pairs as distinct_counts gives them.
struct Pairs {
  Counts n;
  Counts c;
  Pairs(const py::object& n_in, const py::object& c_in) : n(counts(n_in, "n")), c(counts(c_in, "c")) {
    same_length(n, c, "c");
    distinct_counts(n.data(), c.data(), size_of(n));  // refuses impossible counts
  }
};

Values grid_of(const py::object& grid_in) {
  const Values grid = reals(grid_in, "grid");
  for (py::ssize_t j = 0; j < grid.size(); ++j) {
    if (!(grid.at(j) >= 0.0 && grid.at(j) <= 1.0)) {
      throw py::value_error("grid[" + std::to_string(j) + "] = " + std::to_string(grid.at(j)) +
                            ": a probability is from 0 to 1");
    }
  }
  return grid;
}

Values binomial_likelihood_array(const py::object& n_in, const py::object& c_in, const py::object& grid_in) {
  const Pairs pairs(n_in, c_in);
  const Counts& n = pairs.n;
  const Counts& c = pairs.c;
  const Values grid = grid_of(grid_in);
  Values likelihood({n.size(), grid.size()});
  std::vector<double> log_peak(size_of(n));
  {
    py::gil_scoped_release release;
    binomial_likelihood(n.data(), c.data(), size_of(n), grid.data(), size_of(grid), likelihood.mutable_data(),
                        log_peak.data());
  }
  return likelihood;
}

void check_weights(const Values& weights, py::ssize_t n_rows) {
  if (weights.shape(1) != n_rows || n_rows == 0) {
    throw py::value_error("weights has shape " + shape_of(weights) + " for " + std::to_string(n_rows) +
                          " distinct pairs of counts: it must have one column for each of at least one pair");
  }
  for (py::ssize_t b = 0; b < weights.shape(0); ++b) {
    double total = 0.0;
    for (py::ssize_t r = 0; r < n_rows; ++r) {
      const double weight = weights.at(b, r);
      if (!(weight >= 0.0) || std::isinf(weight)) {
        throw py::value_error("weights[" + std::to_string(b) + ", " + std::to_string(r) + "] = " + std::to_string(weight) +
                              ": weights must be finite and at least 0");
      }
      total += weight;
    }
    if (!(total > 0.0) || std::isinf(total)) {
      throw py::value_error("weights[" + std::to_string(b) + "] sums to " + std::to_string(total) +
                            ": a fit needs a positive, finite sum");
    }
  }
}

py::tuple fit_spectra(const py::object& n_in, const py::object& c_in, const py::object& weights_in,
                      const py::object& grid_in, double tolerance, std::int64_t max_iterations) {
  const Pairs pairs(n_in, c_in);
  const Counts& n = pairs.n;
  const Counts& c = pairs.c;
  const Values grid = grid_of(grid_in);
  if (grid.size() == 0) throw py::value_error("grid is empty: it needs at least one point");
  const Values weights = reals(weights_in, "weights", 2);
  check_weights(weights, n.size());
  const auto n_fits = static_cast<std::size_t>(weights.shape(0));
  Values mass({weights.shape(0), grid.size()});
  Values gap(weights.shape(0));
  Values log_likelihood(weights.shape(0));
  std::vector<MixtureFit> fits(n_fits);
  {
    py::gil_scoped_release release;
    std::vector<double> likelihood(size_of(n) * size_of(grid));
    std::vector<double> log_peak(size_of(n));
    binomial_likelihood(n.data(), c.data(), size_of(n), grid.data(), size_of(grid), likelihood.data(), log_peak.data());
    fit_mixtures(likelihood.data(), log_peak.data(), size_of(n), size_of(grid), weights.data(), n_fits, tolerance,
                 max_iterations, mass.mutable_data(), fits.data());
  }
  for (std::size_t b = 0; b < n_fits; ++b) {
    gap.mutable_data()[b] = fits[b].gap;
    log_likelihood.mutable_data()[b] = fits[b].log_likelihood;
  }
  return py::make_tuple(mass, gap, log_likelihood);
}

}  // namespace

void bind_spectrum(py::module_& m) {
  m.def("distinct_counts", &distinct_counts_arrays, py::arg("n"), py::arg("c"),
        "The distinct pairs (n, c) as two arrays, and the place of each item's pair among them.");
  m.def("binomial_likelihood", &binomial_likelihood_array, py::arg("n"), py::arg("c"), py::arg("grid"),
        "Likelihood of each pair at each grid point, float64 [pairs, grid], each row divided by its largest value.");
  m.def("fit_spectra", &fit_spectra, py::arg("n"), py::arg("c"), py::arg("weights"), py::arg("grid"), py::arg("tolerance"),
        py::arg("max_iterations"),
        "For each row of weights [fits, pairs] the mass [fits, grid], the gap [fits] and the log-likelihood [fits]. "
        "See medbridge.support.spectra.spectrum.");
}

}  // namespace medbridge
