// Checks, grouping of equal items, threads, and the choice of the machine's instructions around the kernels of Pass@K.
#include "passk.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "passk_kernels.h"

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#endif

namespace medbridge {
namespace {

using kernels::kLanes;
using kernels::kTile;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// Below this much work (a millisecond or more of each kind) threads aren't worth starting: on a busy machine the wait for
// the last of them costs a whole time slice.
constexpr std::size_t kParallelSweeps = std::size_t{1} << 21;  // values by sweep
constexpr double kParallelWalks = 0x1p16;                      // terms of hypergeometric sums, see terms_of_walks
constexpr std::size_t kParallelCopies = std::size_t{1} << 23;  // copied values
// Tables above this size (4 MB) don't stay in a core's cache.
constexpr std::size_t kStreamedCopies = std::size_t{1} << 19;
// Partial sums of mean_curve that may be held at a time (16 MB).
constexpr std::size_t kMostPartialSums = std::size_t{1} << 18;
constexpr std::size_t kMostSlices = 16;
// Groups with a common floor that share its scores: enough to make their cost small, few enough to divide between threads.
constexpr std::size_t kGroupsPerFloor = 64;

// --- The machine -----------------------------------------------------------------------------------------------------

#ifdef __FP_FAST_FMA
using Baseline = Fused;
#else
using Baseline = Split;
#endif

#if defined(__x86_64__) && defined(__GNUC__)
// MEDBRIDGE_PORTABLE=1 in the environment, read once, keeps to the instructions that every machine has: for tests of that
// path.
bool has_vectors() {
  static const bool found = [] {
    const char* portable = std::getenv("MEDBRIDGE_PORTABLE");
    return !(portable != nullptr && portable[0] == '1') && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }();
  return found;
}

// The kernels are inlined here and so compiled for these instructions.
template <class Kernel, class... Arguments>
__attribute__((target("avx2,fma"), noinline)) auto run_with_vectors(Arguments&&... arguments) {
  return Kernel::template run<Fused>(arguments...);
}
#endif

template <class Kernel, class... Arguments>
auto run(Arguments&&... arguments) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (has_vectors()) return run_with_vectors<Kernel>(arguments...);
#endif
  return Kernel::template run<Baseline>(arguments...);
}

// --- Checks ----------------------------------------------------------------------------------------------------------

std::string at(const char* name, std::size_t index, std::int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "] = " + std::to_string(value);
}

std::string shown(double value) {
  char text[32];
  return std::string(text, std::to_chars(text, text + sizeof text, value).ptr);
}

void check_item(std::int64_t n, std::int64_t c, std::size_t i) {
  if (n < 0) throw std::invalid_argument(at("n", i, n) + " is negative: n counts the samples of an item");
  if (n > kMaxSamples) {
    throw std::invalid_argument(at("n", i, n) + " is above the largest accepted count, " + std::to_string(kMaxSamples));
  }
  if (c < 0) throw std::invalid_argument(at("c", i, c) + " is negative: c counts the correct samples of an item");
  if (c > n) {
    throw std::invalid_argument(at("c", i, c) + " is above " + at("n", i, n) +
                                ": an item can't have more correct samples than samples");
  }
}

void check(const std::int64_t* n, const std::int64_t* c, std::size_t n_items, const std::int64_t* ks, std::size_t n_ks) {
  // One pass that vectorises: a negative difference anywhere sets the sign. The first bad item is sought only then.
  std::uint64_t signs = 0;
  for (std::size_t i = 0; i < n_items; ++i) {
    const auto samples = static_cast<std::uint64_t>(n[i]);
    const auto correct = static_cast<std::uint64_t>(c[i]);
    signs |= samples | correct | (samples - correct) | (static_cast<std::uint64_t>(kMaxSamples) - samples);
  }
  if (signs >> 63 != 0) {
    for (std::size_t i = 0; i < n_items; ++i) check_item(n[i], c[i], i);
  }
  for (std::size_t j = 0; j < n_ks; ++j) {
    if (ks[j] < 1) throw std::invalid_argument(at("ks", j, ks[j]) + " is below 1: at least one sample must be drawn");
  }
}

// --- Grouping --------------------------------------------------------------------------------------------------------

struct Group {  // all items that have the same floor, n and c
  std::size_t floor = 0;  // index into the distinct floors
  std::int64_t n = 0;
  std::int64_t c = 0;
  std::size_t leader = 0;  // the first of them
  double weight = 0.0;     // sum of their weights
};

struct Grouping {
  std::vector<Group> groups;          // in the order of (floor, n, c)
  std::vector<std::size_t> group_of;  // [items]
};

struct Items {
  const std::int64_t* n;
  const std::int64_t* c;
  std::size_t count;
  const double* weights = nullptr;     // none: 1 each
  const std::size_t* floor = nullptr;  // index into the distinct floors; none: one floor
  std::size_t n_floors = 1;
  std::size_t floor_of(std::size_t i) const { return floor == nullptr ? 0 : floor[i]; }
};

// By counting, in a table of floor x n x c. Most runs sample every item equally often, so that the table is small.
class CountingTable {
 public:
  explicit CountingTable(const Items& items) : items_(items) {
    // Equal n everywhere is found by operations that vectorise, unlike the extremes.
    std::int64_t in_any = 0;
    std::int64_t in_all = -1;
    for (std::size_t i = 0; i < items.count; ++i) {
      in_any |= items.n[i];
      in_all &= items.n[i];
    }
    std::int64_t most_n = in_any;
    least_n_ = in_any;
    if (in_any != in_all) {
      const auto [least, most] = std::minmax_element(items.n, items.n + items.count);
      least_n_ = *least;
      most_n = *most;
    }
    width_ = static_cast<std::size_t>(most_n) + 1;
    heights_ = static_cast<std::size_t>(most_n - least_n_) + 1;
  }

  bool is_small() const {
    const auto cells = static_cast<double>(items_.n_floors) * static_cast<double>(heights_) * static_cast<double>(width_);
    return cells <= static_cast<double>(std::max<std::size_t>(4096, 2 * items_.count));
  }

  Grouping grouping(bool with_places) const {
    const std::size_t cells = items_.n_floors * heights_ * width_;
    std::vector<std::size_t> counts(cells);
    for (std::size_t i = 0; i < items_.count; ++i) ++counts[cell(i)];
    std::vector<Sum> weights(items_.weights == nullptr ? 0 : cells);
    for (std::size_t i = 0; items_.weights != nullptr && i < items_.count; ++i) weights[cell(i)].add(items_.weights[i]);

    Grouping result;
    result.groups.reserve(std::min(cells, items_.count));
    std::vector<std::size_t>& group_in = counts;  // the counts turn into the groups' indices
    for (std::size_t at = 0; at < cells; ++at) {
      if (counts[at] == 0) continue;
      const double weight = weights.empty() ? static_cast<double>(counts[at]) : weights[at].total();
      const std::size_t row = at / width_;
      group_in[at] = result.groups.size();
      result.groups.push_back({row / heights_, least_n_ + static_cast<std::int64_t>(row % heights_),
                               static_cast<std::int64_t>(at % width_), 0, weight});
    }
    if (with_places) {
      result.group_of.resize(items_.count);
      for (std::size_t i = items_.count; i-- > 0;) {
        result.group_of[i] = group_in[cell(i)];
        result.groups[result.group_of[i]].leader = i;
      }
    }
    return result;
  }

 private:
  std::size_t cell(std::size_t i) const {
    const std::size_t row = items_.floor_of(i) * heights_ + static_cast<std::size_t>(items_.n[i] - least_n_);
    return row * width_ + static_cast<std::size_t>(items_.c[i]);
  }

  const Items& items_;
  std::int64_t least_n_ = 0;
  std::size_t width_ = 0;    // values of c
  std::size_t heights_ = 0;  // values of n
};

Grouping group_by_sorting(const Items& items) {
  // n and c fit in 31 bits, so that one integer orders the pairs.
  std::vector<std::tuple<std::size_t, std::uint64_t, std::size_t>> order(items.count);
  for (std::size_t i = 0; i < items.count; ++i) {
    order[i] = {items.floor_of(i), static_cast<std::uint64_t>(items.n[i]) << 32 | static_cast<std::uint64_t>(items.c[i]), i};
  }
  std::sort(order.begin(), order.end());
  Grouping result;
  result.group_of.resize(items.count);
  Sum weight;
  for (std::size_t at = 0; at < items.count; ++at) {
    const auto [floor, key, i] = order[at];
    if (at == 0 || key != std::get<1>(order[at - 1]) || floor != std::get<0>(order[at - 1])) {
      result.groups.push_back({floor, items.n[i], items.c[i], i, 0.0});
      weight = Sum{};
    }
    weight.add(items.weights == nullptr ? 1.0 : items.weights[i]);
    result.groups.back().weight = weight.total();
    result.group_of[i] = result.groups.size() - 1;
  }
  return result;
}

// group_of and the leaders are filled if `with_places`.
Grouping group_items(const Items& items, bool with_places) {
  if (items.count == 0) return {};
  const CountingTable table(items);
  return table.is_small() ? table.grouping(with_places) : group_by_sorting(items);
}

// Past the caches where there are instructions for it: a large table would push out what is still needed, and each line
// would be read before it is overwritten.
void stream(const double* from, std::size_t count, double* to) {
#if defined(__SSE2__) || defined(_M_X64)
  std::size_t i = 0;
  if (count > 0 && reinterpret_cast<std::uintptr_t>(to) % 16 != 0) to[i++] = from[0];
  for (; i + 2 <= count; i += 2) _mm_stream_pd(to + i, _mm_loadu_pd(from + i));
  if (i < count) to[i] = from[i];
#else
  std::copy_n(from, count, to);
#endif
}

void finish_streaming() {
#if defined(__SSE2__) || defined(_M_X64)
  _mm_sfence();
#endif
}

// The rows of the leaders, copied to the others of their groups.
void copy_rows(const Grouping& grouping, std::size_t n_ks, double* out) {
  const std::size_t values = grouping.group_of.size() * n_ks;
  const bool large = values > kStreamedCopies;
  // OpenMP 2 compilers want signed loop counters.
  const auto n_items = static_cast<std::int64_t>(grouping.group_of.size());
#pragma omp parallel if (values > kParallelCopies)
  {
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < n_items; ++i) {
      const auto item = static_cast<std::size_t>(i);
      const std::size_t leader = grouping.groups[grouping.group_of[item]].leader;
      if (leader == item) continue;
      if (large) {
        stream(out + leader * n_ks, n_ks, out + item * n_ks);
      } else {
        std::copy_n(out + leader * n_ks, n_ks, out + item * n_ks);
      }
    }
    finish_streaming();
  }
}

// --- Pass@k and pass^k -----------------------------------------------------------------------------------------------

// The ks in increasing order, with the place of each in the caller's array.
struct Ks {
  std::vector<std::int64_t> value;
  std::vector<std::size_t> place;
  std::vector<double> sum;  // of the ks before
  Ks(const std::int64_t* ks, std::size_t n_ks) : value(ks, ks + n_ks), place(n_ks), sum(n_ks + 1) {
    std::iota(place.begin(), place.end(), std::size_t{0});
    if (!std::is_sorted(value.begin(), value.end())) {
      std::sort(place.begin(), place.end(), [ks](std::size_t x, std::size_t y) { return ks[x] < ks[y]; });
      for (std::size_t j = 0; j < n_ks; ++j) value[j] = ks[place[j]];
    }
    for (std::size_t j = 0; j < n_ks; ++j) sum[j + 1] = sum[j] + static_cast<double>(value[j]);
  }
  void keep(std::size_t least) {
    value.resize(least);
    place.resize(least);
  }
  std::size_t up_to(std::int64_t most) const {
    return static_cast<std::size_t>(std::upper_bound(value.begin(), value.end(), most) - value.begin());
  }
};

std::int64_t to_hit(kernels::Any, const Group& group) { return group.c; }
std::int64_t to_hit(kernels::All, const Group& group) { return group.n - group.c; }

// Rows to be computed together: by one sweep over k if they are many or the ks dense, else one value at a time.
struct Block {
  bool sweep = false;
  std::int64_t n = 0;
  std::size_t n_ks = 0;  // that are at most n
  std::size_t rows = 0;
  std::size_t group[kLanes];
  std::int64_t h[kLanes];  // of each row, see kernels::Any
};

template <class Form>
std::vector<Block> plan(const std::vector<Group>& groups, const Ks& ks) {
  std::vector<Block> blocks;
  std::size_t n_ks = 0;
  std::size_t open[2] = {0, 0};  // index + 1 of the block that takes further rows, of either kind
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const Group& group = groups[g];
    const std::int64_t h = to_hit(Form{}, group);
    if (g == 0 || group.n != groups[g - 1].n) n_ks = ks.up_to(group.n);
    // Factors of a sweep, and of the shorter product at each k. The choice is the row's own, whatever rows share its block.
    const std::size_t short_ks = std::min(ks.up_to(h), n_ks);
    const double one_by_one = ks.sum[short_ks] + static_cast<double>(h) * static_cast<double>(n_ks - short_ks);
    const bool sweep = n_ks > 0 && h > 0 && static_cast<double>(ks.value[n_ks - 1]) <= one_by_one;
    std::size_t& last = open[sweep];
    if (last == 0 || blocks[last - 1].n != group.n || blocks[last - 1].rows == kLanes) {
      blocks.emplace_back();
      last = blocks.size();
      blocks.back().sweep = sweep;
      blocks.back().n = group.n;
      blocks.back().n_ks = n_ks;
    }
    Block& block = blocks[last - 1];
    block.group[block.rows] = g;
    block.h[block.rows] = h;
    ++block.rows;
  }
  return blocks;
}

// Calls each_tile(first k, number of ks, values[k][lane]) with the values of a block, kTile ks at a time.
template <class Form, class EachTile>
void sweep_block(const Block& block, const Ks& ks, const EachTile& each_tile) {
  kernels::Lanes lanes;
  kernels::begin<Form>(lanes, block.n, block.h, block.rows);
  alignas(64) double values[kTile * kLanes];
  std::size_t written = kTile;  // the rest of the tile holds the limit
  for (std::size_t first = 0; first < block.n_ks; first += kTile) {
    const std::size_t count = std::min(kTile, block.n_ks - first);
    if (written == kTile) {
      written = run<kernels::Sweep<Form>>(lanes, ks.value.data() + first, count, values);
      std::fill(values + written * kLanes, values + kTile * kLanes, Form::value(0.0, 0.0));
    } else if (written > 0) {
      std::fill(values, values + written * kLanes, Form::value(0.0, 0.0));
      written = 0;
    }
    each_tile(first, count, values);
  }
}

// The value of each group at each k in the row of its leader.
template <class Form>
void fill_block(const Block& block, const std::vector<Group>& groups, const Ks& ks, double* out) {
  const std::size_t n_ks = ks.value.size();
  double* rows[kLanes];
  for (std::size_t row = 0; row < block.rows; ++row) {
    rows[row] = out + groups[block.group[row]].leader * n_ks;
    for (std::size_t j = block.n_ks; j < n_ks; ++j) rows[row][ks.place[j]] = kNaN;
  }
  if (!block.sweep) {
    for (std::size_t row = 0; row < block.rows; ++row) {
      for (std::size_t j = 0; j < block.n_ks; ++j) {
        rows[row][ks.place[j]] = run<kernels::Alone<Form>>(block.n, block.h[row], ks.value[j]);
      }
    }
    return;
  }
  sweep_block<Form>(block, ks, [&](std::size_t first, std::size_t count, const double* values) {
    for (std::size_t row = 0; row < block.rows; ++row) {
      for (std::size_t j = 0; j < count; ++j) rows[row][ks.place[first + j]] = values[j * kLanes + row];
    }
  });
}

template <class Form>
void fill_leaders(const std::vector<Group>& groups, const Ks& ks, double* out) {
  const std::vector<Block> blocks = plan<Form>(groups, ks);
  const auto n_blocks = static_cast<std::int64_t>(blocks.size());
#pragma omp parallel for schedule(dynamic) if (groups.size() * ks.value.size() > kParallelSweeps)
  for (std::int64_t b = 0; b < n_blocks; ++b) fill_block<Form>(blocks[static_cast<std::size_t>(b)], groups, ks, out);
}

template <class Form>
void table(const std::int64_t* n, const std::int64_t* c, std::size_t n_items, const std::int64_t* ks, std::size_t n_ks,
           double* out) {
  check(n, c, n_items, ks, n_ks);
  if (n_items == 0 || n_ks == 0) return;
  const Grouping grouping = group_items({n, c, n_items}, true);
  fill_leaders<Form>(grouping.groups, Ks(ks, n_ks), out);
  copy_rows(grouping, n_ks, out);
}

// --- Mean curve ------------------------------------------------------------------------------------------------------

void check_weights(const double* weights, std::size_t n_items) {
  for (std::size_t i = 0; i < n_items; ++i) {
    if (!(weights[i] >= 0.0) || std::isinf(weights[i])) {
      throw std::invalid_argument("weights[" + std::to_string(i) + "] = " + shown(weights[i]) +
                                  ": weights must be finite and at least 0");
    }
  }
}

// sums[j] += weight of each group times its value at the j-th k.
void add_block(const Block& block, const std::vector<Group>& groups, const Ks& ks, kernels::PartialSums* sums) {
  alignas(64) double weights[kLanes] = {};
  for (std::size_t row = 0; row < block.rows; ++row) weights[row] = groups[block.group[row]].weight;
  if (block.sweep) {
    sweep_block<kernels::Any>(block, ks, [&](std::size_t first, std::size_t count, const double* values) {
      run<kernels::Accumulate>(values, weights, count, sums + first);
    });
    return;
  }
  alignas(64) double values[kLanes] = {};
  for (std::size_t j = 0; j < block.n_ks; ++j) {
    for (std::size_t row = 0; row < block.rows; ++row) {
      values[row] = run<kernels::Alone<kernels::Any>>(block.n, block.h[row], ks.value[j]);
    }
    run<kernels::Accumulate>(values, weights, 1, sums + j);
  }
}

// The weighted sums of the groups' values at each k. Blocks are dealt to slices by their number alone, and slices
// added in order, so that threads can't change the result.
std::vector<Sum> weighted_sums(const std::vector<Group>& groups, const Ks& ks) {
  const std::size_t n_ks = ks.value.size();
  if (n_ks == 0) return {};
  const std::vector<Block> blocks = plan<kernels::Any>(groups, ks);
  std::size_t n_slices = 1;
  if (groups.size() * n_ks > kParallelSweeps) {
    n_slices = std::clamp<std::size_t>(kMostPartialSums / n_ks, 1, std::min(kMostSlices, blocks.size()));
  }
  std::vector<kernels::PartialSums> partial(n_slices * n_ks);
#pragma omp parallel for schedule(dynamic) if (n_slices > 1)
  for (std::int64_t s = 0; s < static_cast<std::int64_t>(n_slices); ++s) {
    const auto slice = static_cast<std::size_t>(s);
    for (std::size_t b = slice; b < blocks.size(); b += n_slices) add_block(blocks[b], groups, ks, &partial[slice * n_ks]);
  }
  std::vector<Sum> sums(n_ks);
  for (std::size_t slice = 0; slice < n_slices; ++slice) {
    for (std::size_t j = 0; j < n_ks; ++j) {
      for (const double value : partial[slice * n_ks + j].value) sums[j].add(value);
      for (const double lost : partial[slice * n_ks + j].lost) sums[j].add(lost);
    }
  }
  return sums;
}

// --- Hypergeometric tails --------------------------------------------------------------------------------------------

// The least m >= 1 with m / k >= tau.
std::int64_t successes_for(double tau, std::int64_t k) {
  const auto draws = static_cast<double>(k);
  auto m = std::max<std::int64_t>(1, static_cast<std::int64_t>(tau * draws));
  if (static_cast<double>(m) / draws < tau) ++m;
  return m;
}

void fill_scored_row(const Group& group, const Ks& ks, const std::vector<kernels::Score>& scores, double* row) {
  for (std::size_t j = 0; j < ks.value.size(); ++j) {
    const std::int64_t k = ks.value[j];
    row[ks.place[j]] = k > group.n ? kNaN : run<kernels::HypergeometricMean>(group.n, group.c, k, scores[j]);
  }
}

// About how many terms the values of the groups take, but for a small factor.
double terms_of_walks(const std::vector<Group>& groups, std::size_t n_ks) {
  std::int64_t most = 0;
  for (const Group& group : groups) most = std::max(most, group.n);
  return static_cast<double>(groups.size()) * static_cast<double>(n_ks) * std::sqrt(static_cast<double>(most));
}

// The distinct floors in increasing order, and which of them each item has.
struct Floors {
  std::vector<double> value;
  std::vector<std::size_t> of_item;
  Floors(const double* floors, std::size_t n_items) : value(floors, floors + n_items), of_item(n_items) {
    std::sort(value.begin(), value.end());
    value.erase(std::unique(value.begin(), value.end()), value.end());
    for (std::size_t i = 0; i < n_items; ++i) {
      of_item[i] = static_cast<std::size_t>(std::lower_bound(value.begin(), value.end(), floors[i]) - value.begin());
    }
  }
};

struct Span {  // of consecutive groups, [begin, end)
  std::size_t begin = 0;
  std::size_t end = 0;
};

// Groups with a common floor, at most kGroupsPerFloor at a time.
std::vector<Span> spans_of_floors(const std::vector<Group>& groups) {
  std::vector<Span> spans;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const bool fresh = spans.empty() || groups[g].floor != groups[g - 1].floor || g - spans.back().begin == kGroupsPerFloor;
    if (fresh) spans.push_back({g, g});
    spans.back().end = g + 1;
  }
  return spans;
}

void fill_reached(const std::vector<Group>& groups, double floor, const Ks& ks, double* out) {
  const std::size_t n_ks = ks.value.size();
  if (floor == 0.0) {
    for (const Block& block : plan<kernels::Any>(groups, ks)) fill_block<kernels::Any>(block, groups, ks, out);
    return;
  }
  std::int64_t most = 0;
  for (const Group& group : groups) most = std::max(most, group.n);
  std::vector<kernels::Score> scores(n_ks);
  std::vector<Wide> terms;
  // f = 1: everything is reached
  if (floor == 1.0) std::fill(scores.begin(), scores.end(), kernels::Score{-1, {}});
  for (std::size_t j = 0; floor < 1.0 && j < ks.up_to(most); ++j) {
    scores[j] = run<kernels::GuessersScore>(ks.value[j], floor, terms);
  }
  for (const Group& group : groups) fill_scored_row(group, ks, scores, out + group.leader * n_ks);
}

}  // namespace

void pass_at_k(const std::int64_t* n, const std::int64_t* c, std::size_t n_items, const std::int64_t* ks, std::size_t n_ks,
               double* out) {
  table<kernels::Any>(n, c, n_items, ks, n_ks, out);
}

void pass_hat_k(const std::int64_t* n, const std::int64_t* c, std::size_t n_items, const std::int64_t* ks, std::size_t n_ks,
                double* out) {
  table<kernels::All>(n, c, n_items, ks, n_ks, out);
}

void g_pass_at_k(const std::int64_t* n, const std::int64_t* c, std::size_t n_items, const std::int64_t* ks, std::size_t n_ks,
                 double tau, double* out) {
  check(n, c, n_items, ks, n_ks);
  if (!(tau > 0.0 && tau <= 1.0)) {
    throw std::invalid_argument("tau = " + shown(tau) + ": the share of correct samples must be above 0 and at most 1");
  }
  if (n_items == 0 || n_ks == 0) return;
  const Ks sorted(ks, n_ks);
  const Grouping grouping = group_items({n, c, n_items}, true);
  std::vector<kernels::Score> scores(n_ks);
  for (std::size_t j = 0; j < n_ks; ++j) scores[j].threshold = successes_for(tau, sorted.value[j]) - 1;
  const auto n_groups = static_cast<std::int64_t>(grouping.groups.size());
#pragma omp parallel for schedule(dynamic) if (terms_of_walks(grouping.groups, n_ks) > kParallelWalks)
  for (std::int64_t g = 0; g < n_groups; ++g) {
    const Group& group = grouping.groups[static_cast<std::size_t>(g)];
    fill_scored_row(group, sorted, scores, out + group.leader * n_ks);
  }
  copy_rows(grouping, n_ks, out);
}

void reached_at_k(const std::int64_t* n, const std::int64_t* c, const double* floors, std::size_t n_items,
                  const std::int64_t* ks, std::size_t n_ks, double* out) {
  check(n, c, n_items, ks, n_ks);
  for (std::size_t i = 0; i < n_items; ++i) {
    if (!(floors[i] >= 0.0 && floors[i] <= 1.0)) {
      throw std::invalid_argument("floor[" + std::to_string(i) + "] = " + shown(floors[i]) +
                                  ": a guessing floor is a probability, from 0 to 1");
    }
  }
  if (n_items == 0 || n_ks == 0) return;
  const Ks sorted(ks, n_ks);
  const Floors distinct(floors, n_items);
  const Grouping grouping = group_items({n, c, n_items, nullptr, distinct.of_item.data(), distinct.value.size()}, true);
  const std::vector<Span> spans = spans_of_floors(grouping.groups);
  const auto n_spans = static_cast<std::int64_t>(spans.size());
#pragma omp parallel for schedule(dynamic) if (terms_of_walks(grouping.groups, n_ks) > kParallelWalks)
  for (std::int64_t s = 0; s < n_spans; ++s) {
    const Span& span = spans[static_cast<std::size_t>(s)];
    const std::vector<Group> groups(grouping.groups.begin() + static_cast<std::ptrdiff_t>(span.begin),
                                    grouping.groups.begin() + static_cast<std::ptrdiff_t>(span.end));
    fill_reached(groups, distinct.value[groups.front().floor], sorted, out);
  }
  copy_rows(grouping, n_ks, out);
}

void mean_curve(const std::int64_t* n, const std::int64_t* c, const double* weights, std::size_t n_items,
                const std::int64_t* ks, std::size_t n_ks, double* out) {
  check(n, c, n_items, ks, n_ks);
  if (weights != nullptr) check_weights(weights, n_items);
  std::vector<Group> groups = group_items({n, c, n_items, weights}, false).groups;
  if (weights != nullptr) {
    groups.erase(std::remove_if(groups.begin(), groups.end(), [](const Group& g) { return g.weight == 0.0; }), groups.end());
  }
  if (n_items > 0 && groups.empty()) {
    throw std::invalid_argument("all weights are 0: a mean needs at least one item that counts");
  }
  std::fill_n(out, n_ks, kNaN);
  if (groups.empty() || n_ks == 0) return;
  std::int64_t fewest = kMaxSamples;
  Sum total_weight;
  for (const Group& group : groups) {
    fewest = std::min(fewest, group.n);
    total_weight.add(group.weight);
  }
  Ks sorted(ks, n_ks);
  sorted.keep(sorted.up_to(fewest));
  if (!std::isfinite(total_weight.total())) throw std::invalid_argument("the sum of the weights overflows");
  // Rows of 0 add nothing.
  groups.erase(std::remove_if(groups.begin(), groups.end(), [](const Group& g) { return g.c == 0; }), groups.end());
  const std::vector<Sum> sums = weighted_sums(groups, sorted);
  for (std::size_t j = 0; j < sums.size(); ++j) out[sorted.place[j]] = sums[j].total() / total_weight.total();
}

}  // namespace medbridge
