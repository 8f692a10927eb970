// Pass@K by sums of log1p, with compensated summation and one evaluation per distinct (n, c).
#include "passk.h"

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
// exp(-37.5) < 2^-54: 1 minus anything smaller rounds to 1, so the sum of logarithms may stop there.
constexpr double kLogNegligible = -37.5;
// Below this much work (logarithms, copied values; a few milliseconds of either) threads aren't worth starting: on a busy
// machine the wait for the last of them costs a whole time slice.
constexpr std::size_t kParallelLogs = std::size_t{1} << 18;
constexpr std::size_t kParallelCopies = std::size_t{1} << 21;
// Values of the rows that mean_curve holds at a time (16 MB).
constexpr std::size_t kBlockValues = std::size_t{1} << 21;

// Neumaier's compensated sum.
struct Sum {
  double value = 0.0;
  double lost = 0.0;
  void add(double x) {
    const double next = value + x;
    lost += std::fabs(value) >= std::fabs(x) ? (value - next) + x : (x - next) + value;
    value = next;
  }
  double total() const { return value + lost; }
};

struct Group {  // all items that have the same n and c
  std::int64_t n = 0;
  std::int64_t c = 0;
  std::size_t leader = 0;  // the first of them
  double weight = 0.0;     // sum of their weights
};

struct Grouping {
  std::vector<Group> groups;
  std::vector<std::size_t> group_of;  // [items]
};

std::string at(const char* name, std::size_t index, std::int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "] = " + std::to_string(value);
}

void check(const std::int64_t* n, const std::int64_t* c, std::size_t n_items, const std::int64_t* ks, std::size_t n_ks) {
  for (std::size_t i = 0; i < n_items; ++i) {
    if (n[i] < 0) throw std::invalid_argument(at("n", i, n[i]) + " is negative: n counts the samples of an item");
    if (n[i] > kMaxSamples) {
      throw std::invalid_argument(at("n", i, n[i]) + " is above the largest accepted count, " + std::to_string(kMaxSamples));
    }
    if (c[i] < 0) throw std::invalid_argument(at("c", i, c[i]) + " is negative: c counts the correct samples of an item");
    if (c[i] > n[i]) {
      throw std::invalid_argument(at("c", i, c[i]) + " is above " + at("n", i, n[i]) +
                                  ": an item can't have more correct samples than samples");
    }
  }
  for (std::size_t j = 0; j < n_ks; ++j) {
    if (ks[j] < 1) throw std::invalid_argument(at("ks", j, ks[j]) + " is below 1: at least one sample must be drawn");
  }
}

// The items grouped by (n, c), in the order of (n, c). Most runs sample every item equally often, so that there are
// far fewer groups than items.
Grouping group_items(const std::int64_t* n, const std::int64_t* c, const double* weights, std::size_t n_items) {
  // n and c fit in 31 bits, so that one integer orders the pairs.
  std::vector<std::pair<std::uint64_t, std::size_t>> order(n_items);
  for (std::size_t i = 0; i < n_items; ++i) {
    order[i] = {static_cast<std::uint64_t>(n[i]) << 32 | static_cast<std::uint64_t>(c[i]), i};
  }
  std::sort(order.begin(), order.end());
  Grouping result;
  result.group_of.resize(n_items);
  Sum weight;
  for (std::size_t at = 0; at < n_items; ++at) {
    const auto [key, i] = order[at];
    if (at == 0 || key != order[at - 1].first) {
      result.groups.push_back({n[i], c[i], i, 0.0});
      weight = Sum{};
    }
    weight.add(weights == nullptr ? 1.0 : weights[i]);
    result.groups.back().weight = weight.total();
    result.group_of[i] = result.groups.size() - 1;
  }
  return result;
}

// 1 - C(n - c, k) / C(n, k) for 1 <= k <= n. The ratio is symmetric in c and k, so that the shorter product is taken:
//   prod_{i < a} (1 - b / (n - i)),  a = min(c, k), b = max(c, k).
// The rounding of the terms reaches the result with a weight of at most one in all, since
// sum_i x_i prod_{j != i} (1 - x_j) <= 1 - prod_j (1 - x_j): no cancellation, whether the result is near 0 or near 1.
double pass_at_one_k(std::int64_t n, std::int64_t c, std::int64_t k) {
  if (c == 0) return 0.0;
  if (c + k > n) return 1.0;
  const std::int64_t a = std::min(c, k);
  const double b = static_cast<double>(std::max(c, k));
  if (a == 1) return b / static_cast<double>(n);
  Sum log_miss;
  for (std::int64_t i = 0; i < a && log_miss.value > kLogNegligible; ++i) {
    log_miss.add(std::log1p(-b / static_cast<double>(n - i)));
  }
  return -std::expm1(log_miss.total());
}

// The ks in increasing order, with the place of each in the caller's array.
struct Ks {
  std::vector<std::int64_t> value;
  std::vector<std::size_t> place;
  Ks(const std::int64_t* ks, std::size_t n_ks) : value(n_ks), place(n_ks) {
    std::iota(place.begin(), place.end(), std::size_t{0});
    std::sort(place.begin(), place.end(), [ks](std::size_t x, std::size_t y) { return ks[x] < ks[y]; });
    for (std::size_t j = 0; j < n_ks; ++j) value[j] = ks[place[j]];
  }
};

// One row of the table. When many ks are asked for, one sweep of partial sums over i = 0 .. max k - 1 serves them all; when
// few are, the shorter product of each is cheaper. Both have the same error bound.
void fill_row(std::int64_t n, std::int64_t c, const Ks& ks, double* row) {
  const std::size_t n_ks = ks.value.size();
  std::int64_t sweep_cost = 0;
  std::int64_t direct_cost = 0;
  for (const std::int64_t k : ks.value) {
    if (k > n) break;
    sweep_cost = k;
    direct_cost += std::min(k, c);
  }
  const bool sweep = c > 0 && sweep_cost < direct_cost;
  Sum log_miss;
  std::int64_t done = 0;
  for (std::size_t j = 0; j < n_ks; ++j) {
    const std::int64_t k = ks.value[j];
    double& out = row[ks.place[j]];
    if (k > n) {
      out = kNaN;
    } else if (!sweep || k == 1 || c + k > n) {
      out = pass_at_one_k(n, c, k);
    } else {
      for (; done < k && log_miss.value > kLogNegligible; ++done) {
        log_miss.add(std::log1p(-static_cast<double>(c) / static_cast<double>(n - done)));
      }
      out = -std::expm1(log_miss.total());
    }
  }
}

}  // namespace

void pass_at_k(const std::int64_t* n, const std::int64_t* c, std::size_t n_items, const std::int64_t* ks,
               std::size_t n_ks, double* out) {
  check(n, c, n_items, ks, n_ks);
  if (n_items == 0 || n_ks == 0) return;
  const Ks sorted(ks, n_ks);
  const Grouping grouping = group_items(n, c, nullptr, n_items);
  // OpenMP 2 compilers want signed loop counters.
  const auto n_groups = static_cast<std::int64_t>(grouping.groups.size());
#pragma omp parallel for schedule(dynamic, 16) if (grouping.groups.size() * n_ks > kParallelLogs)
  for (std::int64_t g = 0; g < n_groups; ++g) {
    const Group& group = grouping.groups[static_cast<std::size_t>(g)];
    fill_row(group.n, group.c, sorted, out + group.leader * n_ks);
  }
#pragma omp parallel for schedule(static) if (n_items * n_ks > kParallelCopies)
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(n_items); ++i) {
    const auto item = static_cast<std::size_t>(i);
    const std::size_t leader = grouping.groups[grouping.group_of[item]].leader;
    if (leader != item) std::copy_n(out + leader * n_ks, n_ks, out + item * n_ks);
  }
}

void mean_curve(const std::int64_t* n, const std::int64_t* c, const double* weights, std::size_t n_items,
                const std::int64_t* ks, std::size_t n_ks, double* out) {
  check(n, c, n_items, ks, n_ks);
  if (weights != nullptr) {
    for (std::size_t i = 0; i < n_items; ++i) {
      if (!(weights[i] >= 0.0) || std::isinf(weights[i])) {
        throw std::invalid_argument("weights[" + std::to_string(i) + "] = " + std::to_string(weights[i]) +
                                    ": weights must be finite and at least 0");
      }
    }
  }
  Grouping grouping = group_items(n, c, weights, n_items);
  auto& groups = grouping.groups;
  groups.erase(std::remove_if(groups.begin(), groups.end(), [](const Group& g) { return g.weight == 0.0; }), groups.end());
  if (n_items > 0 && groups.empty()) throw std::invalid_argument("all weights are 0: a mean needs at least one item that counts");
  if (groups.empty()) {
    std::fill_n(out, n_ks, kNaN);
    return;
  }
  const Ks sorted(ks, n_ks);
  Sum total_weight;
  for (const Group& group : groups) total_weight.add(group.weight);
  std::vector<Sum> sums(n_ks);
  // Rows are computed by all threads, a block at a time so that memory stays small, and added in the order of the groups.
  const std::size_t most_rows = std::max<std::size_t>(1, kBlockValues / std::max<std::size_t>(1, n_ks));
  std::vector<double> block(std::min(most_rows, groups.size()) * n_ks);
  for (std::size_t start = 0; start < groups.size(); start += most_rows) {
    const std::size_t rows = std::min(most_rows, groups.size() - start);
#pragma omp parallel for schedule(dynamic, 16) if (rows * n_ks > kParallelLogs)
    for (std::int64_t r = 0; r < static_cast<std::int64_t>(rows); ++r) {
      const auto row = static_cast<std::size_t>(r);
      fill_row(groups[start + row].n, groups[start + row].c, sorted, block.data() + row * n_ks);
    }
    for (std::size_t row = 0; row < rows; ++row) {
      const double weight = groups[start + row].weight;
      for (std::size_t j = 0; j < n_ks; ++j) sums[j].add(weight * block[row * n_ks + j]);
    }
  }
  for (std::size_t j = 0; j < n_ks; ++j) out[j] = sums[j].total() / total_weight.total();
}

}  // namespace medbridge
