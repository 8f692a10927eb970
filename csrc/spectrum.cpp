// The mixture's likelihood is concave in the weights, and EM climbs it, but needs tens of thousands of steps for a gap of
// 1e-6, with SQUAREM too: near the optimum most weights decay at rates near 1. Here EM's fixed-point equations
//   mass_j (1 - sum_r w_r L_rj / f_r) = 0,   mass_j >= 0,   1 - sum_r w_r L_rj / f_r >= 0
// are solved by Newton steps along the central path instead (a primal-dual interior-point method with Mehrotra's predictor
// and corrector; Koenker and Mizera 2014 solve the same problem so): ten to fifteen steps, each with a linear system of the
// smaller of the two dimensions. Where several distributions are equally likely the path ends in the middle of them.
#include "spectrum.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace medbridge {
namespace {

// Share of the way to the boundary that a step may go. With 0.9995 a step now and then leaves the path so far off centre
// that those after it lead nowhere: 2 of 14,700 simulated fits never converged then, none with 0.95.
constexpr double kStepShare = 0.95;
// Slack given to every dual variable at the start, so that none begins on the boundary.
constexpr double kFirstSlack = 0.1;
// Columns of the scaled matrix that the Gram product holds in cache at a time.
constexpr std::size_t kChunk = 256;
// Below this many multiplications threads aren't worth starting.
constexpr std::size_t kParallelProducts = std::size_t{1} << 22;

std::string at(const char* name, std::size_t index, std::int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "] = " + std::to_string(value);
}

// Four running sums in a fixed order: as fast as vector code, and the same bits everywhere.
double dot(const double* x, const double* y, std::size_t size) {
  double lane[4] = {0.0, 0.0, 0.0, 0.0};
  std::size_t i = 0;
  for (; i + 4 <= size; i += 4) {
    for (std::size_t l = 0; l < 4; ++l) lane[l] += x[i + l] * y[i + l];
  }
  for (; i < size; ++i) lane[0] += x[i] * y[i];
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

void add_scaled(double scale, const double* x, std::size_t size, double* y) {
  for (std::size_t i = 0; i < size; ++i) y[i] += scale * x[i];
}

// The largest step, at most 1, that keeps x + step * dx above 0 by a share of the way.
double step_within(const std::vector<double>& x, const std::vector<double>& dx) {
  double step = 1.0;
  for (std::size_t j = 0; j < x.size(); ++j) {
    if (dx[j] < 0.0) step = std::min(step, -kStepShare * x[j] / dx[j]);
  }
  return step;
}

// (I + X^T X) y = b for a matrix X [rows, columns], by a Cholesky factor of I + X X^T or of I + X^T X, whichever is smaller.
// Both have eigenvalues of at least 1: the factor always exists.
class RegularisedGram {
 public:
  RegularisedGram(std::size_t n_rows, std::size_t n_columns)
      : rows_(n_rows), columns_(n_columns), size_(std::min(n_rows, n_columns)), length_(std::max(n_rows, n_columns)),
        matrix_(n_rows * n_columns), factor_(size_ * size_), work_(size_) {}

  // X[r, j], to be filled before factor(); kept with the smaller dimension first.
  double& at(std::size_t r, std::size_t j) { return by_rows() ? matrix_[r * length_ + j] : matrix_[j * length_ + r]; }

  void factor() {
    multiply();
    for (std::size_t i = 0; i < size_; ++i) {
      double* row = factor_.data() + i * size_;
      row[i] += 1.0;
      for (std::size_t k = 0; k < i; ++k) {
        const double* other = factor_.data() + k * size_;
        row[k] = (row[k] - dot(row, other, k)) / other[k];
      }
      row[i] = std::sqrt(row[i] - dot(row, row, i));
    }
  }

  // b becomes y.
  void solve(std::vector<double>& b) {
    if (!by_rows()) {
      substitute(b);
      return;
    }
    // Woodbury: (I + X^T X)^-1 b = b - X^T (I + X X^T)^-1 X b
    for (std::size_t i = 0; i < size_; ++i) work_[i] = dot(matrix_.data() + i * length_, b.data(), length_);
    substitute(work_);
    for (std::size_t i = 0; i < size_; ++i) add_scaled(-work_[i], matrix_.data() + i * length_, length_, b.data());
  }

 private:
  bool by_rows() const { return rows_ <= columns_; }

  // factor_ = lower triangle of M M^T for the stored matrix M [size, length]. One thread sums an entry, in one order.
  void multiply() {
    std::fill(factor_.begin(), factor_.end(), 0.0);
#pragma omp parallel if (size_ * size_ * length_ > kParallelProducts)
    for (std::size_t start = 0; start < length_; start += kChunk) {
      const std::size_t width = std::min(kChunk, length_ - start);
#pragma omp for schedule(static, 4) nowait
      for (std::int64_t row = 0; row < static_cast<std::int64_t>(size_); ++row) {
        const auto i = static_cast<std::size_t>(row);
        const double* x = matrix_.data() + i * length_ + start;
        for (std::size_t k = 0; k <= i; ++k) factor_[i * size_ + k] += dot(x, matrix_.data() + k * length_ + start, width);
      }
    }
  }

  void substitute(std::vector<double>& b) const {
    for (std::size_t i = 0; i < size_; ++i) {
      const double* row = factor_.data() + i * size_;
      b[i] = (b[i] - dot(row, b.data(), i)) / row[i];
    }
    for (std::size_t i = size_; i-- > 0;) {
      b[i] /= factor_[i * size_ + i];
      add_scaled(-b[i], factor_.data() + i * size_, i, b.data());
    }
  }

  std::size_t rows_, columns_, size_, length_;
  std::vector<double> matrix_, factor_, work_;
};

// One state of the path: the mixture's density f at each row and its directional derivatives at each point.
struct Mixture {
  const double* likelihood;
  std::size_t n_rows, n_points;
  const std::vector<double>& share;  // [rows], sum 1
  std::vector<double> density;       // f_r = sum_j L_rj mass_j
  std::vector<double> derivative;    // sum_r share_r L_rj / f_r

  Mixture(const double* table, std::size_t rows, std::size_t points, const std::vector<double>& shares)
      : likelihood(table), n_rows(rows), n_points(points), share(shares), density(rows), derivative(points) {}

  void evaluate(const double* mass) {
    std::fill(derivative.begin(), derivative.end(), 0.0);
    for (std::size_t r = 0; r < n_rows; ++r) {
      const double* row = likelihood + r * n_points;
      density[r] = dot(row, mass, n_points);
      if (share[r] > 0.0) add_scaled(share[r] / density[r], row, n_points, derivative.data());
    }
  }
  double largest_derivative() const { return *std::max_element(derivative.begin(), derivative.end()); }
};

}  // namespace

DistinctCounts distinct_counts(const std::int64_t* n, const std::int64_t* c, std::size_t n_items) {
  std::vector<std::pair<std::uint64_t, std::size_t>> order(n_items);
  for (std::size_t i = 0; i < n_items; ++i) {
    if (n[i] < 0) throw std::invalid_argument(at("n", i, n[i]) + " is negative: n counts the samples of an item");
    if (n[i] > kMostTrials) {
      throw std::invalid_argument(at("n", i, n[i]) + " is above the largest accepted count, " + std::to_string(kMostTrials));
    }
    if (c[i] < 0) throw std::invalid_argument(at("c", i, c[i]) + " is negative: c counts the correct samples of an item");
    if (c[i] > n[i]) {
      throw std::invalid_argument(at("c", i, c[i]) + " is above " + at("n", i, n[i]) +
                                  ": an item can't have more correct samples than samples");
    }
    order[i] = {static_cast<std::uint64_t>(n[i]) << 32 | static_cast<std::uint64_t>(c[i]), i};
  }
  std::sort(order.begin(), order.end());
  DistinctCounts result;
  result.row_of.resize(n_items);
  for (std::size_t k = 0; k < n_items; ++k) {
    const auto [key, i] = order[k];
    if (k == 0 || key != order[k - 1].first) {
      result.n.push_back(n[i]);
      result.c.push_back(c[i]);
    }
    result.row_of[i] = static_cast<std::int64_t>(result.n.size()) - 1;
  }
  return result;
}

void binomial_likelihood(const std::int64_t* n, const std::int64_t* c, std::size_t n_rows, const double* grid,
                         std::size_t n_points, double* likelihood, double* log_peak) {
  std::vector<double> log_right(n_points);
  std::vector<double> log_wrong(n_points);
  for (std::size_t j = 0; j < n_points; ++j) {
    if (!(grid[j] >= 0.0 && grid[j] <= 1.0) || (j > 0 && grid[j] <= grid[j - 1])) {
      throw std::invalid_argument("grid[" + std::to_string(j) + "] = " + std::to_string(grid[j]) +
                                  ": the grid must increase strictly within 0 and 1");
    }
    log_right[j] = std::log(grid[j]);
    log_wrong[j] = std::log1p(-grid[j]);
  }
  for (std::size_t r = 0; r < n_rows; ++r) {
    double* row = likelihood + r * n_points;
    const auto right = static_cast<double>(c[r]);
    const auto wrong = static_cast<double>(n[r] - c[r]);
    double peak = -std::numeric_limits<double>::infinity();
    for (std::size_t j = 0; j < n_points; ++j) {
      // 0 times the logarithm of 0 would be NaN
      row[j] = (c[r] > 0 ? right * log_right[j] : 0.0) + (c[r] < n[r] ? wrong * log_wrong[j] : 0.0);
      peak = std::max(peak, row[j]);
    }
    if (std::isinf(peak)) {
      throw std::invalid_argument("the grid has no point that could give " + std::to_string(c[r]) + " correct of " +
                                  std::to_string(n[r]) + " samples: it needs one strictly between 0 and 1");
    }
    for (std::size_t j = 0; j < n_points; ++j) row[j] = std::exp(row[j] - peak);
    log_peak[r] = peak;
  }
}

MixtureFit fit_mixture(const double* likelihood, const double* log_peak, std::size_t n_rows, std::size_t n_points,
                       const double* weights, double tolerance, std::int64_t max_iterations, double* mass) {
  double total = 0.0;
  for (std::size_t r = 0; r < n_rows; ++r) total += weights[r];
  std::vector<double> share(n_rows);
  for (std::size_t r = 0; r < n_rows; ++r) share[r] = weights[r] / total;

  Mixture mixture(likelihood, n_rows, n_points, share);
  RegularisedGram system(n_rows, n_points);
  const auto points = static_cast<double>(n_points);
  std::vector<double> primal(n_points, 1.0 / points);
  std::vector<double> dual(n_points), step(n_points), dual_step(n_points), product(n_points), best(primal);
  mixture.evaluate(primal.data());
  for (std::size_t j = 0; j < n_points; ++j) dual[j] = std::max(1.0 - mixture.derivative[j], 0.0) + kFirstSlack;

  MixtureFit fit;
  fit.gap = std::numeric_limits<double>::infinity();
  for (;;) {
    double sum = 0.0;
    for (const double x : primal) sum += x;
    // The derivative at primal / sum; the optimum of the problem without the constraint on the sum has sum 1.
    const double gap = mixture.largest_derivative() * sum - 1.0;
    if (!std::isfinite(gap)) break;  // rounding has the better of the steps: what was best stands
    if (gap < fit.gap) {
      fit.gap = gap;
      for (std::size_t j = 0; j < n_points; ++j) best[j] = primal[j] / sum;
    }
    if (fit.gap <= tolerance || fit.iterations == max_iterations) break;
    ++fit.iterations;

    for (std::size_t r = 0; r < n_rows; ++r) {
      const double* row = likelihood + r * n_points;
      const double scale = std::sqrt(share[r]) / mixture.density[r];
      for (std::size_t j = 0; j < n_points; ++j) system.at(r, j) = scale * row[j] * std::sqrt(primal[j] / dual[j]);
    }
    system.factor();
    // Solves sum_k H_jk step_k + dual_j / primal_j step_j = (target - product_j) / primal_j - 1 + derivative_j, and with it
    // primal_j dual_step_j + dual_j step_j = target - product_j - primal_j dual_j.
    const auto newton = [&](double target) {
      for (std::size_t j = 0; j < n_points; ++j) {
        step[j] = std::sqrt(primal[j] / dual[j]) * ((target - product[j]) / primal[j] - 1.0 + mixture.derivative[j]);
      }
      system.solve(step);
      for (std::size_t j = 0; j < n_points; ++j) {
        step[j] *= std::sqrt(primal[j] / dual[j]);
        dual_step[j] = (target - product[j] - dual[j] * step[j]) / primal[j] - dual[j];
      }
    };
    std::fill(product.begin(), product.end(), 0.0);
    newton(0.0);
    const double affine = step_within(primal, step);
    const double affine_dual = step_within(dual, dual_step);
    double path = 0.0;
    double reached = 0.0;
    for (std::size_t j = 0; j < n_points; ++j) {
      path += primal[j] * dual[j];
      reached += (primal[j] + affine * step[j]) * (dual[j] + affine_dual * dual_step[j]);
      product[j] = step[j] * dual_step[j];
    }
    newton(std::pow(reached / path, 3) * path / points);
    add_scaled(step_within(primal, step), step.data(), n_points, primal.data());
    add_scaled(step_within(dual, dual_step), dual_step.data(), n_points, dual.data());
    mixture.evaluate(primal.data());
  }

  std::copy(best.begin(), best.end(), mass);
  for (std::size_t r = 0; r < n_rows; ++r) {
    if (weights[r] > 0.0) {
      fit.log_likelihood += weights[r] * (std::log(dot(likelihood + r * n_points, mass, n_points)) + log_peak[r]);
    }
  }
  return fit;
}

void fit_mixtures(const double* likelihood, const double* log_peak, std::size_t n_rows, std::size_t n_points,
                  const double* weights, std::size_t n_fits, double tolerance, std::int64_t max_iterations, double* mass,
                  MixtureFit* fits) {
#pragma omp parallel for schedule(dynamic) if (n_fits > 1)
  for (std::int64_t b = 0; b < static_cast<std::int64_t>(n_fits); ++b) {
    const auto fit = static_cast<std::size_t>(b);
    fits[fit] = fit_mixture(likelihood, log_peak, n_rows, n_points, weights + fit * n_rows, tolerance, max_iterations,
                            mass + fit * n_points);
  }
}

}  // namespace medbridge
