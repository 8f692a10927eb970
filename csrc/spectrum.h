// Nonparametric maximum likelihood of a mixing distribution on a grid: binomial likelihoods of counts, and weights of the
// grid points that maximise the mixture's likelihood. Nothing here knows Python or numpy, or what it is read for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace medbridge {

// Largest sample count per item that is accepted (2^31 - 1), so that a pair of counts fits in one integer.
constexpr std::int64_t kMostTrials = 2147483647;

// The distinct pairs (n, c) in the order of (n, c), and the place of each item's pair among them.
struct DistinctCounts {
  std::vector<std::int64_t> n;
  std::vector<std::int64_t> c;
  std::vector<std::int64_t> row_of;  // [items]
};

// Throws std::invalid_argument naming the first bad index if n < 0, n > kMostTrials, c < 0 or c > n.
DistinctCounts distinct_counts(const std::int64_t* n, const std::int64_t* c, std::size_t n_items);

// likelihood[r * n_points + j] = p_j^c_r (1 - p_j)^(n_r - c_r) / exp(log_peak[r]), where log_peak[r] is the logarithm of
// the row's largest value: the largest entry of each row is 1, however large n is. 0^0 = 1.
// Throws std::invalid_argument if the grid isn't strictly increasing within [0, 1], or a row is impossible at every point.
void binomial_likelihood(const std::int64_t* n, const std::int64_t* c, std::size_t n_rows, const double* grid,
                         std::size_t n_points, double* likelihood, double* log_peak);

struct MixtureFit {
  double gap = 0.0;             // max_j sum_r w_r likelihood_rj / f_r - 1, with f = likelihood . mass and sum_r w_r = 1
  double log_likelihood = 0.0;  // sum_r weights_r (log f_r + log_peak_r), with the weights as given
  std::int64_t iterations = 0;
};

// mass [n_points] maximises sum_r weights_r log (sum_j likelihood_rj mass_j) over mass >= 0, sum mass = 1, until
// gap <= tolerance; the gap bounds what is missing from the maximum, per unit of weight (Lindsay 1983). After
// max_iterations, or where rounding stops it, the state with the smallest gap is given, and its gap.
// Every row must hold a positive likelihood, the weights must be finite, at least 0 and not all 0.
// Threaded over the linear algebra of large problems; the result doesn't depend on the number of threads.
MixtureFit fit_mixture(const double* likelihood, const double* log_peak, std::size_t n_rows, std::size_t n_points,
                       const double* weights, double tolerance, std::int64_t max_iterations, double* mass);

// fit_mixture for each of n_fits rows of weights [n_fits, n_rows], threaded over the fits where there are several.
void fit_mixtures(const double* likelihood, const double* log_peak, std::size_t n_rows, std::size_t n_points,
                  const double* weights, std::size_t n_fits, double tolerance, std::int64_t max_iterations, double* mass,
                  MixtureFit* fits);

}  // namespace medbridge
