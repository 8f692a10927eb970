// Rewards of an item sorted ascending, g_1 <= .. <= g_n, with gaps D_j = g_{j+1} - g_j >= 0: every expectation of a
// maximum is a sum over gaps, E[max] = g_1 + sum_j D_j P(max > g_j), whose terms have one sign. Ties have gap 0, so that
// tied samples get the same bits and equal rewards get exactly 0.
#include "rewards.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace medbridge {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// Below this many rewards (about a millisecond of sorting) threads aren't worth starting.
constexpr std::size_t kParallelRewards = std::size_t{1} << 14;

// For a draw of k of n samples that holds a given one of the j lowest, or of the rest:
//   below[j] = C(j - 1, k - 1) / C(n - 1, k - 1), the chance that the other k - 1 are among the j lowest too,
//   above[j] = 1 - below[j].
// By recurrence from j = n down, in which all terms are positive. It is kept from one item to the next of the same size.
struct Chances {
  std::size_t n = 0;
  std::vector<double> below, above;  // [n + 1], [0] unused

  void prepare(std::size_t new_n, std::size_t k) {
    if (n == new_n) return;
    n = new_n;
    below.assign(n + 1, 0.0);
    above.assign(n + 1, 1.0);
    below[n] = 1.0;
    above[n] = 0.0;
    for (std::size_t j = n - 1; j >= k; --j) {
      const auto others = static_cast<double>(j);
      below[j] = below[j + 1] * (static_cast<double>(j + 1 - k) / others);
      above[j] = above[j + 1] + below[j + 1] * (static_cast<double>(k - 1) / others);
    }
  }
};

// One item at a time, with memory that is kept between items.
class Item {
 public:
  void sort(const double* rewards, std::size_t n) {
    order_.resize(n);
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    std::sort(order_.begin(), order_.end(), [rewards](std::size_t a, std::size_t b) { return rewards[a] < rewards[b]; });
    sorted_.resize(n);
    gaps_.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
      sorted_[i] = rewards[order_[i]];
      gaps_[i] = i > 0 ? sorted_[i] - sorted_[i - 1] : 0.0;
    }
    chosen_.resize(n);
  }

  // g_k + sum_{j >= k} D_j P(max > g_j): the maximum of k is at least the k-th lowest. P by recurrence from j = n down.
  double mean_max(std::size_t k) const {
    double below = 1.0, above = 0.0, sum = 0.0;
    for (std::size_t j = size(); j > k; --j) {
      const auto lowest = static_cast<double>(j);
      above += below * (static_cast<double>(k) / lowest);
      below *= static_cast<double>(j - k) / lowest;
      sum += gaps_[j - 1] * above;
    }
    return std::min(sorted_[k - 1] + sum, sorted_.back());
  }

  // (k/n) E[max I_i] = (k/n) (g_i + sum_{j >= i} D_j above_j).
  void weights_without_baseline(std::size_t k, const Chances& chances, double* out) {
    fill([](std::size_t) { return 0.0; }, [&](std::size_t j) { return -chances.above[j]; });
    for (std::size_t i = 0; i < size(); ++i) chosen_[i] += sorted_[i];
    give(share(k), out);
  }

  // (k/n) (sum_{j < i} D_j j below_j - sum_{j >= i} D_j (n - j) below_j) / (n - k).
  void weights_leave_one_out(std::size_t k, const Chances& chances, double* out) {
    fill([&](std::size_t j) { return static_cast<double>(j) * chances.below[j]; },
         [&](std::size_t j) { return static_cast<double>(size() - j) * chances.below[j]; });
    give(share(k) / static_cast<double>(size() - k), out);
  }

  // (k/n) E[(g_i - max J)^+] = (k/n) sum_{j < i} D_j C(j, k - 1) / C(n - 1, k - 1).
  void weights_leave_one_out_minus_one(std::size_t k, const Chances& chances, double* out) {
    fill([&](std::size_t j) { return chances.below[j + 1]; }, [](std::size_t) { return 0.0; });
    give(share(k), out);
  }

  // With F_j = P(max <= g_j) = below_j j / n over all k-subsets:
  //   E[max I_i] - mean = sum_{j < i} D_j F_j - sum_{j >= i} D_j below_j (n - j) / n,
  //   sd^2 = sum_l D_l (1 - F_l) (D_l F_l + 2 sum_{j < l} D_j F_j).
  void advantages(std::size_t k, const Chances& chances, double* out) {
    // Gaps as shares of the range that a maximum can have, from g_k on: squares neither over- nor underflow.
    const double range = sorted_.back() - sorted_[k - 1];
    const auto n = static_cast<double>(size());
    for (std::size_t j = 0; j < size(); ++j) gaps_[j] = j < k || range == 0.0 ? 0.0 : gaps_[j] / range;
    double variance = 0.0, under = 0.0;
    above_.assign(size() + 1, 0.0);  // 1 - F
    for (std::size_t j = size(); j-- > k;) above_[j] = above_[j + 1] + share(k) * chances.below[j + 1];
    for (std::size_t l = k; l < size(); ++l) {
      const double here = gaps_[l] * chances.below[l] * (static_cast<double>(l) / n);
      variance += gaps_[l] * above_[l] * (here + 2.0 * under);
      under += here;
    }
    if (variance == 0.0) {
      std::fill_n(out, size(), 0.0);
      return;
    }
    fill([&](std::size_t j) { return chances.below[j] * (static_cast<double>(j) / n); },
         [&](std::size_t j) { return chances.below[j] * (static_cast<double>(size() - j) / n); });
    give(1.0 / std::sqrt(variance), out);
  }

 private:
  std::size_t size() const { return sorted_.size(); }
  double share(std::size_t k) const { return static_cast<double>(k) / static_cast<double>(size()); }

  // chosen_ of the i-th lowest = sum_{j < i} D_j won(j) - sum_{j >= i} D_j lost(j).
  template <class Won, class Lost>
  void fill(Won won, Lost lost) {
    double sum = 0.0;
    for (std::size_t i = 1; i <= size(); ++i) {
      chosen_[i - 1] = sum;
      if (i < size()) sum += gaps_[i] * won(i);
    }
    sum = 0.0;
    for (std::size_t i = size(); i > 0; --i) {
      if (i < size()) sum += gaps_[i] * lost(i);
      chosen_[i - 1] -= sum;
    }
  }

  void give(double factor, double* out) const {
    for (std::size_t i = 0; i < size(); ++i) out[order_[i]] = factor * chosen_[i];
  }

  std::vector<std::size_t> order_;  // [n] place in the caller's array of the i-th lowest
  std::vector<double> sorted_;      // [n] g_1 .. g_n
  std::vector<double> gaps_;        // [n] D_j at [j], [0] unused
  std::vector<double> chosen_, above_;
};

void at_least_one(const std::string& name, std::int64_t k) {
  if (k >= 1) return;
  throw std::invalid_argument(name + " = " + std::to_string(k) + " is below 1: at least one sample must be drawn");
}

// Calls compute(item, chances, place) for each item with at least `least` samples, sorted; fills the others' with NaN.
template <class Compute>
void for_each_item(const Groups& groups, std::size_t k, std::size_t least, double* out, Compute compute) {
  const auto n_items = static_cast<std::int64_t>(groups.n_items);
  const auto total = static_cast<std::size_t>(groups.offsets[groups.n_items]);
#pragma omp parallel if (total > kParallelRewards)
  {
    Item item;
    Chances chances;
#pragma omp for schedule(dynamic, 16)
    for (std::int64_t i = 0; i < n_items; ++i) {
      const auto start = static_cast<std::size_t>(groups.offsets[i]);
      const std::size_t n = static_cast<std::size_t>(groups.offsets[i + 1]) - start;
      if (n < least) {
        std::fill_n(out + start, n, kNaN);
        continue;
      }
      item.sort(groups.rewards + start, n);
      chances.prepare(n, k);
      compute(item, chances, out + start);
    }
  }
}

}  // namespace

void max_at_k(const Groups& groups, const std::int64_t* ks, std::size_t n_ks, double* out) {
  for (std::size_t j = 0; j < n_ks; ++j) at_least_one("ks[" + std::to_string(j) + "]", ks[j]);
  const auto n_items = static_cast<std::int64_t>(groups.n_items);
  const auto total = static_cast<std::size_t>(groups.offsets[groups.n_items]);
#pragma omp parallel if (total * n_ks > kParallelRewards)
  {
    Item item;
#pragma omp for schedule(dynamic, 16)
    for (std::int64_t i = 0; i < n_items; ++i) {
      const auto start = static_cast<std::size_t>(groups.offsets[i]);
      const std::size_t n = static_cast<std::size_t>(groups.offsets[i + 1]) - start;
      item.sort(groups.rewards + start, n);
      double* row = out + static_cast<std::size_t>(i) * n_ks;
      for (std::size_t j = 0; j < n_ks; ++j) {
        const auto k = static_cast<std::size_t>(ks[j]);
        row[j] = k > n ? kNaN : item.mean_max(k);
      }
    }
  }
}

void pass_at_k_weights(const Groups& groups, std::int64_t k_in, Baseline baseline, double* out) {
  at_least_one("k", k_in);
  if (baseline == Baseline::kLeaveOneOutMinusOne && k_in == 1) {
    throw std::invalid_argument("k = 1: the loo_minus_one baseline draws k - 1 other samples and needs k of at least 2");
  }
  const auto k = static_cast<std::size_t>(k_in);
  const std::size_t least = baseline == Baseline::kLeaveOneOut ? k + 1 : k;
  for_each_item(groups, k, least, out, [&](Item& item, const Chances& chances, double* place) {
    switch (baseline) {
      case Baseline::kNone: return item.weights_without_baseline(k, chances, place);
      case Baseline::kLeaveOneOut: return item.weights_leave_one_out(k, chances, place);
      case Baseline::kLeaveOneOutMinusOne: return item.weights_leave_one_out_minus_one(k, chances, place);
    }
  });
}

void pass_at_k_advantages(const Groups& groups, std::int64_t k_in, double* out) {
  at_least_one("k", k_in);
  const auto k = static_cast<std::size_t>(k_in);
  for_each_item(groups, k, k, out,
                [&](Item& item, const Chances& chances, double* place) { item.advantages(k, chances, place); });
}

}  // namespace medbridge
