// Three steps: multinomial counts of the drawn clusters; their product with the Pass@k table of the distinct (n, c), by a
// kernel that skips zeros; order statistics of each column.
#include "bootstrap.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "passk.h"
#include "philox.h"
#include "resampler.h"

namespace medbridge {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// Replicates and columns that the kernel holds in registers: 12 of AVX2's 16 are sums.
constexpr std::size_t kLanes = 8;
constexpr std::size_t kColumns = 6;
// Columns whose jackknife sums are taken together.
constexpr std::size_t kJackknifeColumns = 64;
// Below this much work (replicate values, counts; a few milliseconds) threads aren't worth starting.
constexpr std::size_t kParallelWork = std::size_t{1} << 18;
// Sums of the same numbers in another order differ by less than this, relatively: such replicates are ties.
constexpr double kTie = 1e-12;

int most_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

std::size_t this_thread() {
#ifdef _OPENMP
  return static_cast<std::size_t>(omp_get_thread_num());
#else
  return 0;
#endif
}

// ---- Vector instructions, chosen at run time ----

// sums[j][lane] = sum_i values[i][j] * counts[rows[i]][lane]
using Kernel = void (*)(const std::uint32_t* rows, std::size_t n_rows, const double* values, const double* counts,
                        double (&sums)[kColumns][kLanes]);

void multiply(const std::uint32_t* rows, std::size_t n_rows, const double* values, const double* counts,
              double (&sums)[kColumns][kLanes]) {
  double sum[kColumns][kLanes] = {};
  for (std::size_t i = 0; i < n_rows; ++i) {
    const double* count = counts + rows[i] * kLanes;
    for (std::size_t j = 0; j < kColumns; ++j) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) sum[j][lane] += values[i * kColumns + j] * count[lane];
    }
  }
  std::copy_n(&sum[0][0], kColumns * kLanes, &sums[0][0]);
}

#ifdef MEDBRIDGE_AVX2
__attribute__((target("avx2,fma"))) void multiply_avx2(const std::uint32_t* rows, std::size_t n_rows, const double* values,
                                                       const double* counts, double (&sums)[kColumns][kLanes]) {
  // Without the full unrolling GCC writes the sums to memory at every step.
  __m256d low[kColumns];
  __m256d high[kColumns];
#pragma GCC unroll 6
  for (std::size_t j = 0; j < kColumns; ++j) low[j] = high[j] = _mm256_setzero_pd();
  for (std::size_t i = 0; i < n_rows; ++i) {
    const double* count = counts + rows[i] * kLanes;
    const __m256d count_low = _mm256_loadu_pd(count);
    const __m256d count_high = _mm256_loadu_pd(count + 4);
#pragma GCC unroll 6
    for (std::size_t j = 0; j < kColumns; ++j) {
      const __m256d value = _mm256_broadcast_sd(values + i * kColumns + j);
      low[j] = _mm256_fmadd_pd(value, count_low, low[j]);
      high[j] = _mm256_fmadd_pd(value, count_high, high[j]);
    }
  }
#pragma GCC unroll 6
  for (std::size_t j = 0; j < kColumns; ++j) {
    _mm256_storeu_pd(sums[j], low[j]);
    _mm256_storeu_pd(sums[j] + 4, high[j]);
  }
}
#endif

struct Routines {
  PhiloxFill fill = philox_fill;
  Kernel kernel = multiply;
};

Routines routines(bool portable) {
#ifdef MEDBRIDGE_AVX2
  if (!portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {philox_fill_avx2, multiply_avx2};
#else
  (void)portable;
#endif
  return {};
}

// ---- Normal distribution ----

double normal_probability(double z) { return 0.5 * std::erfc(-z / std::sqrt(2.0)); }

// ---- Clusters ----

struct Entry {  // a pair (n, c) and how many items of a cluster have it
  std::uint32_t pair;
  std::uint32_t times;
  bool operator<(const Entry& other) const { return pair != other.pair ? pair < other.pair : times < other.times; }
};

// The distinct (n, c) among the items, and the distinct kinds of cluster. Clusters of a kind have the same pairs equally
// often, so that a replicate needs to know only how many of each kind were drawn.
struct Population {
  std::vector<std::int64_t> n, c;           // [pairs], in order
  std::vector<double> pair_count;           // [pairs] items
  std::vector<Entry> entries;               // of all kinds
  std::vector<std::size_t> first;           // [kinds + 1], of a kind's entries
  std::vector<std::uint32_t> multiplicity;  // [kinds] clusters
  std::size_t kinds() const { return multiplicity.size(); }
};

void add_kind(Population& population, const std::vector<Entry>& entries, std::uint32_t multiplicity) {
  population.entries.insert(population.entries.end(), entries.begin(), entries.end());
  population.first.push_back(population.entries.size());
  population.multiplicity.push_back(multiplicity);
}

Population summarise(const std::int64_t* n, const std::int64_t* c, const std::int64_t* clusters, std::size_t n_items) {
  // n and c fit in 31 bits, so that one integer orders the pairs.
  std::vector<std::uint64_t> key_of(n_items);
  for (std::size_t i = 0; i < n_items; ++i) {
    key_of[i] = static_cast<std::uint64_t>(n[i]) << 32 | static_cast<std::uint64_t>(c[i]);
  }
  std::vector<std::uint64_t> keys = key_of;
  std::sort(keys.begin(), keys.end());

  Population population;
  population.first.push_back(0);
  for (std::size_t i = 0; i < n_items; ++i) {
    if (i == 0 || keys[i] != keys[i - 1]) {
      population.n.push_back(static_cast<std::int64_t>(keys[i] >> 32));
      population.c.push_back(static_cast<std::int64_t>(keys[i] & 0xFFFFFFFFu));
      population.pair_count.push_back(0.0);
    }
    population.pair_count.back() += 1.0;
  }
  if (clusters == nullptr) {
    for (std::size_t u = 0; u < population.n.size(); ++u) {
      add_kind(population, {{static_cast<std::uint32_t>(u), 1}}, static_cast<std::uint32_t>(population.pair_count[u]));
    }
    return population;
  }

  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  std::vector<std::pair<std::int64_t, std::uint32_t>> items(n_items);  // cluster, pair
  for (std::size_t i = 0; i < n_items; ++i) {
    const auto place = std::lower_bound(keys.begin(), keys.end(), key_of[i]) - keys.begin();
    items[i] = {clusters[i], static_cast<std::uint32_t>(place)};
  }
  std::sort(items.begin(), items.end());
  std::map<std::vector<Entry>, std::uint32_t> kinds;
  std::vector<Entry> kind;
  for (std::size_t i = 0; i < n_items; ++i) {
    if (kind.empty() || kind.back().pair != items[i].second) kind.push_back({items[i].second, 0});
    ++kind.back().times;
    if (i + 1 == n_items || items[i + 1].first != items[i].first) {
      ++kinds[kind];
      kind.clear();
    }
  }
  for (const auto& [entries, multiplicity] : kinds) add_kind(population, entries, multiplicity);
  return population;
}

// ---- Table times counts ----

// The Pass@k table of the distinct pairs. A column is kept as x = Pass@k where its mean is below 1/2 and as x = 1 - Pass@k
// elsewhere: the smaller of the two keeps its digits and has the zeros (Pass@k is 1 from k = n - c + 1 on).
struct PassTable {
  std::size_t columns = 0;
  std::vector<double> x;      // [pairs, columns]
  std::vector<char> is_miss;  // [columns]
  // For the kernel: panels of kColumns columns, and of each the rows that aren't all zero.
  std::vector<std::size_t> first;  // [panels + 1]
  std::vector<std::uint32_t> rows;
  std::vector<double> values;  // [rows, kColumns]
  std::size_t panels() const { return first.size() - 1; }
};

PassTable make_table(const Population& population, const std::vector<std::int64_t>& ks) {
  PassTable table;
  const std::size_t pairs = population.n.size();
  const std::size_t columns = table.columns = ks.size();
  table.x.resize(pairs * columns);
  pass_at_k(population.n.data(), population.c.data(), pairs, ks.data(), columns, table.x.data());
  std::vector<double> sum(columns, 0.0);
  double items = 0.0;
  for (std::size_t u = 0; u < pairs; ++u) {
    items += population.pair_count[u];
    for (std::size_t k = 0; k < columns; ++k) sum[k] += population.pair_count[u] * table.x[u * columns + k];
  }
  table.is_miss.resize(columns);
  for (std::size_t k = 0; k < columns; ++k) table.is_miss[k] = sum[k] >= 0.5 * items;
  for (std::size_t u = 0; u < pairs; ++u) {
    double* row = table.x.data() + u * columns;
    for (std::size_t k = 0; k < columns; ++k) row[k] = table.is_miss[k] ? 1.0 - row[k] : row[k];
  }

  table.first.push_back(0);
  for (std::size_t start = 0; start < columns; start += kColumns) {
    const std::size_t width = std::min(kColumns, columns - start);
    for (std::size_t u = 0; u < pairs; ++u) {
      const double* row = table.x.data() + u * columns + start;
      if (std::all_of(row, row + width, [](double x) { return x == 0.0; })) continue;
      table.rows.push_back(static_cast<std::uint32_t>(u));
      table.values.insert(table.values.end(), row, row + width);
      table.values.resize(table.rows.size() * kColumns, 0.0);
    }
    table.first.push_back(table.rows.size());
  }
  return table;
}

// columns[k][start + lane] = sum_u counts[u][lane] x[u][k] / sum_u counts[u][lane] for the first `lanes` lanes.
void weighted_means(const PassTable& table, Kernel kernel, const std::vector<double>& counts,
                    const std::vector<double*>& columns, std::size_t start, std::size_t lanes) {
  double items[kLanes] = {};
  for (std::size_t u = 0; u < counts.size(); u += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) items[lane] += counts[u + lane];
  }
  double sums[kColumns][kLanes];
  for (std::size_t p = 0; p < table.panels(); ++p) {
    const std::size_t first = table.first[p];
    kernel(table.rows.data() + first, table.first[p + 1] - first, table.values.data() + first * kColumns, counts.data(),
           sums);
    const std::size_t width = std::min(kColumns, table.columns - p * kColumns);
    for (std::size_t j = 0; j < width; ++j) {
      double* out = columns[p * kColumns + j] + start;
      for (std::size_t lane = 0; lane < lanes; ++lane) out[lane] = sums[j][lane] / items[lane];
    }
  }
}

// x of all items, by the same sums as in the replicates: what is equal comes out equal.
std::vector<double> estimates(const Population& population, const PassTable& table, Kernel kernel) {
  std::vector<double> counts(population.pair_count.size() * kLanes, 0.0);
  for (std::size_t u = 0; u < population.pair_count.size(); ++u) counts[u * kLanes] = population.pair_count[u];
  std::vector<double> result(table.columns);
  std::vector<double*> columns;
  for (double& value : result) columns.push_back(&value);
  weighted_means(table, kernel, counts, columns, 0, 1);
  return result;
}

// columns[k][r] = x of replicate r
void draw_replicates(const Population& population, const PassTable& table, const BootstrapSettings& settings,
                     const Routines& routine, const std::vector<double*>& columns) {
  const Resampler resampler(population.multiplicity);
  const auto replicates = static_cast<std::size_t>(settings.replicates);
  const std::size_t tiles = (replicates + kLanes - 1) / kLanes;
  struct Work {
    std::vector<std::uint32_t> kinds;  // scratch of the resampler
    std::vector<std::uint64_t> pairs;  // counts of one replicate
    std::vector<double> counts;        // [pairs, kLanes]
  };
  const std::size_t pairs = population.n.size();
  std::vector<Work> works(static_cast<std::size_t>(most_threads()));
  for (Work& work : works) {
    work.kinds.resize(population.kinds());
    work.pairs.resize(pairs);
    work.counts.assign(pairs * kLanes, 0.0);
  }
  const Entry* entries = population.entries.data();
  const std::size_t* first = population.first.data();
#pragma omp parallel for schedule(dynamic, 8) if (replicates * (table.columns + population.kinds()) > kParallelWork)
  for (std::int64_t t = 0; t < static_cast<std::int64_t>(tiles); ++t) {
    Work& work = works[this_thread()];
    std::uint64_t* pair_counts = work.pairs.data();
    const std::size_t start = static_cast<std::size_t>(t) * kLanes;
    const std::size_t lanes = std::min(kLanes, replicates - start);
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      PhiloxStream stream(settings.seed, start + lane, routine.fill);
      std::fill(work.pairs.begin(), work.pairs.end(), 0);
      resampler.draw(stream, work.kinds.data(), [=](std::size_t kind, std::uint64_t times) {
        const Entry* end = entries + first[kind + 1];
        for (const Entry* e = entries + first[kind]; e != end; ++e) pair_counts[e->pair] += times * e->times;
      });
      for (std::size_t u = 0; u < pairs; ++u) work.counts[u * kLanes + lane] = static_cast<double>(work.pairs[u]);
    }
    weighted_means(table, routine.kernel, work.counts, columns, start, lanes);
  }
}

// ---- Intervals ----

// Efron's acceleration of each column from the leave-one-cluster-out values. With m items and the sum s in the cluster, the
// value without it exceeds the estimate x by d = (x m - s) / (items - m). 0 where d has no spread.
std::vector<double> accelerations(const Population& population, const PassTable& table,
                                  const std::vector<double>& estimate) {
  std::vector<double> result(table.columns, 0.0);
  double items = 0.0;
  for (const double count : population.pair_count) items += count;
  double clusters = 0.0;
  for (const std::uint32_t m : population.multiplicity) clusters += m;
  if (clusters < 2.0) return result;
  const auto blocks = static_cast<std::int64_t>((table.columns + kJackknifeColumns - 1) / kJackknifeColumns);
#pragma omp parallel for schedule(dynamic) if (population.entries.size() * table.columns > kParallelWork)
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::size_t start = static_cast<std::size_t>(b) * kJackknifeColumns;
    const std::size_t width = std::min(kJackknifeColumns, table.columns - start);
    double first[kJackknifeColumns] = {}, second[kJackknifeColumns] = {}, third[kJackknifeColumns] = {};
    for (std::size_t j = 0; j < population.kinds(); ++j) {
      double sum[kJackknifeColumns] = {};
      double size = 0.0;
      for (std::size_t e = population.first[j]; e < population.first[j + 1]; ++e) {
        const Entry entry = population.entries[e];
        const double* row = table.x.data() + entry.pair * table.columns + start;
        size += entry.times;
        for (std::size_t k = 0; k < width; ++k) sum[k] += entry.times * row[k];
      }
      const double times = population.multiplicity[j];
      for (std::size_t k = 0; k < width; ++k) {
        const double d = (estimate[start + k] * size - sum[k]) / (items - size);
        first[k] += times * d;
        second[k] += times * d * d;
        third[k] += times * d * d * d;
      }
    }
    for (std::size_t k = 0; k < width; ++k) {
      const double mean = first[k] / clusters;
      const double squares = second[k] - mean * first[k];
      const double cubes = third[k] - 3.0 * mean * second[k] + 2.0 * clusters * mean * mean * mean;
      if (squares > 0.0) result[start + k] = -cubes / (6.0 * squares * std::sqrt(squares));
    }
  }
  return result;
}

struct Range {
  double low;
  double high;
};

// The probabilities that BCa leaves below its low end and above its high end (Efron 1987, equation 2.3), where percentile
// intervals leave alpha. So does BCa where it is undefined: all replicates on one side of the estimate, or
// 1 - a (z0 + z) <= 0.
Range bca_tails(double share_below, double acceleration, double alpha) {
  const Range percentile{alpha, alpha};
  if (!(share_below > 0.0 && share_below < 1.0)) return percentile;
  const double z0 = normal_quantile(share_below);
  const double z = normal_quantile(alpha);
  const double low = 1.0 - acceleration * (z0 + z);
  const double high = 1.0 - acceleration * (z0 - z);
  if (!(low > 0.0 && high > 0.0)) return percentile;
  return {normal_probability(z0 + (z0 + z) / low), normal_probability(-z0 - (z0 - z) / high)};
}

struct Moments {
  double share_below;  // of the estimate, ties counted half
  double mean;
  double standard_deviation;  // NaN for one value
};

Moments moments(const double* column, std::size_t size, double estimate) {
  // Independent partial sums: they don't wait for each other, and their order is fixed.
  double below[kLanes] = {}, sum[kLanes] = {}, squares[kLanes] = {};
  const double tie = kTie * estimate;
  const auto add = [&](std::size_t r, std::size_t lane) {
    const double d = column[r] - estimate;
    below[lane] += (d < -tie ? 0.5 : 0.0) + (d <= tie ? 0.5 : 0.0);
    sum[lane] += d;
    squares[lane] += d * d;
  };
  const std::size_t whole = size / kLanes * kLanes;
  for (std::size_t r = 0; r < whole; r += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) add(r + lane, lane);
  }
  for (std::size_t r = whole; r < size; ++r) add(r, r - whole);
  double all_below = 0.0, all = 0.0, all_squares = 0.0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    all_below += below[lane];
    all += sum[lane];
    all_squares += squares[lane];
  }
  const auto count = static_cast<double>(size);
  const double variance = std::max(0.0, all_squares - all / count * all) / (count - 1.0);
  return {all_below / count, estimate + all / count, size < 2 ? kNaN : std::sqrt(variance)};
}

// The value at `position` (0 the smallest) of the sorted values, linear between neighbours. Reorders them.
double at_position(double* values, std::size_t size, double position) {
  const auto lower = std::min(static_cast<std::size_t>(position), size - 1);
  std::nth_element(values, values + lower, values + size);
  const double part = position - static_cast<double>(lower);
  if (lower + 1 == size || part <= 0.0) return values[lower];
  const double next = *std::min_element(values + lower + 1, values + size);
  return values[lower] + part * (next - values[lower]);
}

// The quantiles at two probabilities of sign * column. Only values that can matter are copied and ordered: those up to a
// bound a little above the larger quantile of a normal distribution. Should they turn out too few, all are.
Range quantiles(const double* column, std::size_t size, double sign, Range probability, const Moments& moment,
                double* scratch) {
  const double last = static_cast<double>(size - 1);
  const double larger = std::max(probability.low, probability.high);
  const auto needed = std::min(size, static_cast<std::size_t>(larger * last) + 2);
  std::size_t kept = 0;
  if (larger > 0.0 && larger < 1.0 && moment.standard_deviation > 0.0) {
    const double bound = sign * moment.mean + (normal_quantile(larger) + 0.3) * moment.standard_deviation;
    for (std::size_t r = 0; r < size; ++r) {
      scratch[kept] = sign * column[r];
      kept += scratch[kept] <= bound;
    }
  }
  if (kept < needed) {
    for (std::size_t r = 0; r < size; ++r) scratch[r] = sign * column[r];
    kept = size;
  }
  return {at_position(scratch, kept, probability.low * last), at_position(scratch, kept, probability.high * last)};
}

// All that is asked about one column. `column` becomes Pass@k.
void summarise_column(double* column, std::size_t size, bool is_miss, double estimate, double acceleration, double alpha,
                      double* scratch, const CurveIntervals& out, std::size_t k) {
  const Moments moment = moments(column, size, estimate);
  const Range bca = bca_tails(moment.share_below, acceleration, alpha);
  const Range lower = quantiles(column, size, 1.0, {alpha, bca.low}, moment, scratch);
  const Range upper = quantiles(column, size, -1.0, {alpha, bca.high}, moment, scratch);
  const auto pass = [is_miss](double x) { return is_miss ? 1.0 - x : x; };
  out.value[k] = pass(estimate);
  out.standard_error[k] = moment.standard_deviation;
  out.percentile_low[k] = pass(is_miss ? -upper.low : lower.low);
  out.percentile_high[k] = pass(is_miss ? lower.low : -upper.low);
  out.bca_low[k] = pass(is_miss ? -upper.high : lower.high);
  out.bca_high[k] = pass(is_miss ? lower.high : -upper.high);
  if (is_miss) {
    for (std::size_t r = 0; r < size; ++r) column[r] = 1.0 - column[r];
  }
}

}  // namespace

double normal_quantile(double p) {
  if (p > 0.5) return -normal_quantile(1.0 - p);
  // Abramowitz and Stegun 26.2.23 (error below 4.5e-4), then Halley's method, which triples the digits each time.
  const double t = std::sqrt(-2.0 * std::log(p));
  double z = -(t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308))));
  for (int step = 0; step < 2; ++step) {
    const double newton = (normal_probability(z) - p) * std::sqrt(2.0 * std::acos(-1.0)) * std::exp(0.5 * z * z);
    z -= newton / (1.0 + 0.5 * z * newton);
  }
  return z;
}

void philox_words(const BootstrapSettings& settings, std::uint64_t stream, std::size_t n_words, std::uint32_t* out) {
  PhiloxStream words(settings.seed, stream, routines(settings.portable).fill);
  for (std::size_t i = 0; i < n_words; ++i) out[i] = words.word();
}

void resample_counts(const std::uint32_t* multiplicity, std::size_t n_kinds, const BootstrapSettings& settings,
                     std::uint32_t* out) {
  const Resampler resampler({multiplicity, multiplicity + n_kinds});
  std::vector<std::uint32_t> scratch(n_kinds);
  for (std::size_t r = 0; r < static_cast<std::size_t>(settings.replicates); ++r) {
    PhiloxStream stream(settings.seed, r, routines(settings.portable).fill);
    std::uint32_t* row = out + r * n_kinds;
    std::fill_n(row, n_kinds, 0u);
    resampler.draw(stream, scratch.data(), [row](std::size_t kind, std::uint32_t times) { row[kind] += times; });
  }
}

void bootstrap_curve(const std::int64_t* n, const std::int64_t* c, const std::int64_t* clusters, std::size_t n_items,
                     const std::int64_t* ks, std::size_t n_ks, const BootstrapSettings& settings, double* replicate_values,
                     const CurveIntervals& out) {
  pass_at_k(n, c, n_items, ks, 0, nullptr);  // checks n and c
  pass_at_k(n, c, 0, ks, n_ks, nullptr);     // checks ks
  const auto replicates = static_cast<std::size_t>(settings.replicates);
  const std::int64_t least_n = n_items == 0 ? 0 : *std::min_element(n, n + n_items);
  std::vector<std::int64_t> known;  // the ks that every item can tell
  std::vector<std::size_t> place;   // of them among all
  for (std::size_t k = 0; k < n_ks; ++k) {
    if (ks[k] <= least_n) {
      known.push_back(ks[k]);
      place.push_back(k);
      continue;
    }
    for (double* values :
         {out.value, out.standard_error, out.percentile_low, out.percentile_high, out.bca_low, out.bca_high}) {
      values[k] = kNaN;
    }
    std::fill_n(replicate_values + k * replicates, replicates, kNaN);
  }
  if (known.empty()) return;

  const Routines routine = routines(settings.portable);
  const Population population = summarise(n, c, clusters, n_items);
  const PassTable table = make_table(population, known);
  std::vector<double*> columns;
  for (const std::size_t k : place) columns.push_back(replicate_values + k * replicates);
  draw_replicates(population, table, settings, routine, columns);

  const std::vector<double> estimate = estimates(population, table, routine.kernel);
  const double alpha = 0.5 * (1.0 - settings.confidence);
  const std::vector<double> acceleration = accelerations(population, table, estimate);
  std::vector<std::vector<double>> scratch(static_cast<std::size_t>(most_threads()), std::vector<double>(replicates));
#pragma omp parallel for schedule(dynamic) if (replicates * known.size() > kParallelWork)
  for (std::int64_t j = 0; j < static_cast<std::int64_t>(known.size()); ++j) {
    const auto k = static_cast<std::size_t>(j);
    summarise_column(columns[k], replicates, table.is_miss[k], estimate[k], acceleration[k], alpha,
                     scratch[this_thread()].data(), out, place[k]);
  }
}

}  // namespace medbridge
