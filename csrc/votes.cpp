// Majority votes by generating functions. With x >= 1 votes drawn for the right option of r, a wrong option of v may have
// drawn y <= x; u counts those that tie:
//   sum_{x=1..r} C(r, x) z^x  prod_v ( sum_{y < x} C(v, y) z^y + u C(v, x) z^x )  (1 + z)^abstained,  u^t -> 1 / (t + 1).
// The coefficient of z^k over C(n, k) is the accuracy. All terms are positive, so that nothing cancels. A binomial C(v, y)
// is stored as C(v, y) 2^-floor(v/2): for n <= kMaxVoters every product then lies between 2^-512 and C(1024, 512) < 2^1019.
#include "votes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace medbridge {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// Below this much work (distinct items times n squared; a few milliseconds) threads aren't worth starting.
constexpr std::size_t kParallelWork = std::size_t{1} << 20;

// C(v, y) 2^-floor(v/2) for all v up to a largest one. Pascal's triangle with the rounding error carried along in a second
// double: each entry is the nearest double, or next to it.
class Binomials {
 public:
  explicit Binomials(std::size_t largest) : rows_((largest + 1) * (largest + 2) / 2) {
    std::vector<double> lost(largest + 1, 0.0);  // of the latest row
    rows_[0] = 1.0;
    for (std::size_t v = 1; v <= largest; ++v) {
      const double scale = v % 2 == 0 ? 0.5 : 1.0;
      const double* above = row(v - 1);
      double* here = rows_.data() + start(v);
      here[0] = scale * above[0];
      here[v] = scale * above[v - 1];
      for (std::size_t y = v - 1; y > 0; --y) {
        const double large = std::max(above[y], above[y - 1]), small = std::min(above[y], above[y - 1]);
        const double sum = large + small;
        const double rest = (large - sum) + small + (lost[y] + lost[y - 1]);
        here[y] = scale * (sum + rest);
        lost[y] = scale * ((sum - (sum + rest)) + rest);
      }
    }
  }
  const double* row(std::size_t v) const { return rows_.data() + start(v); }

 private:
  static std::size_t start(std::size_t v) { return v * (v + 1) / 2; }
  std::vector<double> rows_;
};

using Count = std::uint16_t;

// What the accuracy of an item depends on, from a row of numbers: right, abstained, wrong votes in decreasing order.
struct Profile {
  std::size_t right, abstained;
  const Count* wrong;
  std::size_t n_wrong;  // options with at least one vote
  std::size_t n;
  int halves;  // sum of floor(v/2) over all parts of n
  Profile(const Count* row, std::size_t width) : right(row[0]), abstained(row[1]), wrong(row + 2) {
    n_wrong = static_cast<std::size_t>(std::find(wrong, row + width, 0) - wrong);
    n = std::accumulate(row, row + width, std::size_t{0});
    halves = std::accumulate(row, row + width, 0, [](int sum, Count v) { return sum + v / 2; });
  }
};

// out[d] += sum_y a[d - y] b[y] for d < n_out.
void add_product(const double* a, std::size_t n_a, const double* b, std::size_t n_b, double* out, std::size_t n_out) {
  for (std::size_t y = 0; y < std::min(n_b, n_out); ++y) {
    const double factor = b[y];
    const std::size_t length = std::min(n_a, n_out - y);
    for (std::size_t d = 0; d < length; ++d) out[y + d] += factor * a[d];
  }
}

// Computes rows of one item after another, with memory that is kept between them.
class Voting {
 public:
  Voting(const Binomials& binomials, std::size_t largest_n, std::size_t most_wrong)
      : binomials_(binomials),
        stride_(largest_n + 1),
        wins_(stride_),
        product_(stride_),
        ties_(stride_ * (std::min(most_wrong, largest_n) + 1)),
        next_(ties_.size()) {}

  void fill_row(const Profile& item, const std::int64_t* ks, std::size_t n_ks, double* row) {
    const auto n = static_cast<std::int64_t>(item.n);
    std::int64_t top = 0;
    for (std::size_t j = 0; j < n_ks; ++j) {
      if (ks[j] <= n) top = std::max(top, ks[j]);
    }
    if (top > 0) count_wins(item, static_cast<std::size_t>(top));
    const double* all = binomials_.row(item.n);
    const int shift = item.halves - static_cast<int>(item.n / 2);
    for (std::size_t j = 0; j < n_ks; ++j) {
      row[j] = ks[j] > n ? kNaN : std::min(1.0, std::ldexp(wins_[static_cast<std::size_t>(ks[j])] / all[ks[j]], shift));
    }
  }

 private:
  // wins_[k] = sum over the draws of k samples of the right option's share, for k <= top.
  void count_wins(const Profile& item, std::size_t top) {
    std::fill_n(wins_.begin(), top + 1, 0.0);
    // From many votes for the right option to few. A wrong option that can't reach x takes any number of its votes: its
    // (1 + z)^v is common to all larger x, and multiplied in once, when x comes down to v.
    std::size_t rivals = 0;
    for (std::size_t x = std::min(item.right, top); x > 0; --x) {
      for (; rivals < item.n_wrong && item.wrong[rivals] >= x; ++rivals) {
        if (x < item.right) multiply(item.wrong[rivals], top);
      }
      add_wins_with(item, x, rivals, top);
    }
    multiply(item.abstained, top);
  }

  // wins_ *= (1 + z)^v.
  void multiply(std::size_t v, std::size_t top) {
    if (v == 0) return;
    std::fill_n(product_.begin(), top + 1, 0.0);
    add_product(wins_.data(), top + 1, binomials_.row(v), v + 1, product_.data(), top + 1);
    wins_.swap(product_);
  }

  // Adds the draws in which the right option has exactly x votes, and the first `rivals` wrong options at most x.
  // Row t of ties_ holds the draws with t ties, from degree (t + 1) x on: what is left are the votes of the options below x.
  void add_wins_with(const Profile& item, std::size_t x, std::size_t rivals, std::size_t top) {
    const std::size_t most_ties = std::min(rivals, top / x - 1);
    const auto length = [&](std::size_t done, std::size_t t) {
      return std::min((done - t) * (x - 1), top - (t + 1) * x) + 1;
    };
    ties_[0] = binomials_.row(item.right)[x];
    for (std::size_t done = 0; done < rivals; ++done) {
      const double* chosen = binomials_.row(item.wrong[done]);
      for (std::size_t t = 0; t <= std::min(done + 1, most_ties); ++t) {
        double* out = next_.data() + t * stride_;
        const std::size_t n_out = length(done + 1, t);
        std::fill_n(out, n_out, 0.0);
        if (t <= done) add_product(ties_.data() + t * stride_, length(done, t), chosen, x, out, n_out);
        if (t > 0) add_product(ties_.data() + (t - 1) * stride_, length(done, t - 1), chosen + x, 1, out, n_out);
      }
      ties_.swap(next_);
    }
    for (std::size_t t = 0; t <= most_ties; ++t) {
      const double share = 1.0 / static_cast<double>(t + 1);
      add_product(ties_.data() + t * stride_, length(rivals, t), &share, 1, wins_.data() + (t + 1) * x, length(rivals, t));
    }
  }

  const Binomials& binomials_;
  std::size_t stride_;
  std::vector<double> wins_, product_;  // [degree]
  std::vector<double> ties_, next_;     // [ties, degree]
};

std::string at(const char* name, std::size_t index, std::int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "] = " + std::to_string(value);
}

// The profiles of all items, [n_items, n_options + 2], after checking the input.
std::vector<Count> profiles(const std::int64_t* votes, const std::int64_t* correct, const std::int64_t* abstained,
                            std::size_t n_items, std::size_t n_options) {
  const std::size_t width = n_options + 2;
  std::vector<Count> rows(n_items * width, 0);
  for (std::size_t i = 0; i < n_items; ++i) {
    if (correct[i] < -1 || correct[i] >= static_cast<std::int64_t>(n_options)) {
      throw std::invalid_argument(at("correct", i, correct[i]) + ": expected a column of votes, 0 to " +
                                  std::to_string(static_cast<std::int64_t>(n_options) - 1) +
                                  ", or -1 where the right answer was never given");
    }
    Count* row = rows.data() + i * width;
    std::int64_t n = 0;
    const auto count = [&](std::int64_t samples) {
      n += std::min(samples, kMaxVoters + 1);  // can't overflow: the sum is checked after each
      if (n > kMaxVoters) {
        throw std::invalid_argument("votes[" + std::to_string(i) + "], with the abstentions, counts more than " +
                                    std::to_string(kMaxVoters) + " samples, the most that an item may have");
      }
      return static_cast<Count>(samples);
    };
    std::size_t wrong = 2;
    for (std::size_t j = 0; j < n_options; ++j) {
      const std::int64_t samples = votes[i * n_options + j];
      if (samples < 0) {
        throw std::invalid_argument("votes[" + std::to_string(i) + ", " + std::to_string(j) + "] = " +
                                    std::to_string(samples) + " is negative: votes count the samples that chose an option");
      }
      row[static_cast<std::int64_t>(j) == correct[i] ? 0 : wrong++] = count(samples);
    }
    if (abstained != nullptr) {
      if (abstained[i] < 0) {
        throw std::invalid_argument(at("abstained", i, abstained[i]) +
                                    " is negative: abstained counts the samples without a vote");
      }
      row[1] = count(abstained[i]);
    }
    std::sort(row + 2, row + width, std::greater<Count>());
  }
  return rows;
}

// Equal items are computed once: leaders are the first of each kind, in an order that depends on the items alone.
struct Grouping {
  std::vector<std::size_t> leaders;
  std::vector<std::size_t> leader_of;  // [items]
};

Grouping group_items(const std::vector<Count>& rows, std::size_t n_items, std::size_t width) {
  const auto compare = [&](std::size_t a, std::size_t b) {
    return std::memcmp(rows.data() + a * width, rows.data() + b * width, width * sizeof(Count));
  };
  std::vector<std::size_t> order(n_items);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const int sign = compare(a, b);
    return sign != 0 ? sign < 0 : a < b;
  });
  Grouping result;
  result.leader_of.resize(n_items);
  for (const std::size_t i : order) {
    if (result.leaders.empty() || compare(i, result.leaders.back()) != 0) result.leaders.push_back(i);
    result.leader_of[i] = result.leaders.back();
  }
  return result;
}

}  // namespace

void majority_at_k(const std::int64_t* votes, const std::int64_t* correct, const std::int64_t* abstained,
                   std::size_t n_items, std::size_t n_options, const std::int64_t* ks, std::size_t n_ks, double* out) {
  for (std::size_t j = 0; j < n_ks; ++j) {
    if (ks[j] < 1) throw std::invalid_argument(at("ks", j, ks[j]) + " is below 1: at least one sample must be drawn");
  }
  const std::size_t width = n_options + 2;
  const std::vector<Count> rows = profiles(votes, correct, abstained, n_items, n_options);
  if (n_items == 0 || n_ks == 0) return;
  const Grouping grouping = group_items(rows, n_items, width);
  std::vector<Profile> items;
  std::size_t largest_n = 0, most_wrong = 0;
  for (const std::size_t leader : grouping.leaders) {
    items.emplace_back(rows.data() + leader * width, width);
    largest_n = std::max(largest_n, items.back().n);
    most_wrong = std::max(most_wrong, items.back().n_wrong);
  }
  const Binomials binomials(largest_n);
  const auto n_distinct = static_cast<std::int64_t>(items.size());  // OpenMP 2 compilers want signed loop counters
#pragma omp parallel if (items.size() * largest_n * largest_n > kParallelWork)
  {
    Voting voting(binomials, largest_n, most_wrong);
#pragma omp for schedule(dynamic, 4)
    for (std::int64_t g = 0; g < n_distinct; ++g) {
      const auto item = static_cast<std::size_t>(g);
      voting.fill_row(items[item], ks, n_ks, out + grouping.leaders[item] * n_ks);
    }
  }
  for (std::size_t i = 0; i < n_items; ++i) {
    const std::size_t leader = grouping.leader_of[i];
    if (leader != i) std::copy_n(out + leader * n_ks, n_ks, out + i * n_ks);
  }
}

}  // namespace medbridge
