// Bootstrap of the mean Pass@k curve over items or clusters, with percentile and BCa intervals. Nothing here knows Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace medbridge {

// Largest accepted number of replicates (2^31 - 1).
constexpr std::int64_t kMaxReplicates = 2147483647;

struct BootstrapSettings {
  std::int64_t replicates;  // 1 to kMaxReplicates
  std::uint64_t seed;
  double confidence;  // of the two-sided intervals, between 0 and 1
  bool portable;      // leaves the vector instructions of this machine unused, which is for tests
};

// Where the results go: n_ks values each.
struct CurveIntervals {
  double* value;
  double* standard_error;
  double* percentile_low;
  double* percentile_high;
  double* bca_low;
  double* bca_high;
};

// Draws as many clusters as there are with replacement, `replicates` times, and takes
//   curve(k) = sum of the drawn items' Pass@k / number of the drawn items.
// clusters: a label per item, or nullptr where each item is a cluster of its own. replicate_values: [n_ks, replicates].
// Columns where some item has k > n are NaN, and so is everything when there are no items. Replicate r is drawn from stream
// r of the seed, so that nothing depends on the number of threads, on the order of the items or on the labels.
// Throws std::invalid_argument like pass_at_k, and if there are 2^32 clusters or more.
void bootstrap_curve(const std::int64_t* n, const std::int64_t* c, const std::int64_t* clusters, std::size_t n_items,
                     const std::int64_t* ks, std::size_t n_ks, const BootstrapSettings& settings, double* replicate_values,
                     const CurveIntervals& out);

// The draws behind it: out[r * n_kinds + j] = how often kind j, of which there are multiplicity[j] >= 1, is among
// sum_j multiplicity[j] draws with replacement. Each row is multinomial.
void resample_counts(const std::uint32_t* multiplicity, std::size_t n_kinds, const BootstrapSettings& settings,
                     std::uint32_t* out);

// The first words of a stream of the generator.
void philox_words(const BootstrapSettings& settings, std::uint64_t stream, std::size_t n_words, std::uint32_t* out);

// The z with P(Z <= z) = p for a standard normal Z, 0 < p < 1, to a few units in the last place.
double normal_quantile(double p);

}  // namespace medbridge
