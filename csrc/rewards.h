// The maximum over k of n real-valued rewards, and the per-sample weights and advantages that train for it.
// Nothing here knows Python or numpy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace medbridge {

// Largest magnitude of a reward that is accepted: sums and differences of rewards then stay finite.
constexpr double kMaxReward = 1e300;

// Groups of rewards, one group per item: item i's are rewards[offsets[i]] .. rewards[offsets[i + 1] - 1]. All are finite, of
// magnitude at most kMaxReward; offsets don't decrease.
struct Groups {
  const double* rewards;
  const std::int64_t* offsets;  // [n_items + 1]
  std::size_t n_items;
};

// What is subtracted from a sample's weight; n, k and J as for pass_at_k_weights.
enum class Baseline {
  kNone,
  kLeaveOneOut,          // E[max over k of the other samples]
  kLeaveOneOutMinusOne,  // E[max over J], J being k - 1 of the other samples
};

// Each of these gives the same bits on any number of threads, and throws std::invalid_argument for k < 1.

// out[i * n_ks + j] = E[max over a random k_j-subset of the item's n rewards]; NaN where k > n.
void max_at_k(const Groups& groups, const std::int64_t* ks, std::size_t n_ks, double* out);

// PKPO (arXiv 2505.15201): out[s] = (k / n) (E[max over {s} u J] - baseline), J a random set of k - 1 other samples of the
// item; sum_s out[s] grad log p(s) is an unbiased estimate of the gradient of the expected maximum of k samples.
// NaN for an item with n < k, and with n = k under kLeaveOneOut. Throws for k = 1 under kLeaveOneOutMinusOne.
void pass_at_k_weights(const Groups& groups, std::int64_t k, Baseline baseline, double* out);

// Pass@k training (arXiv 2508.10751) for real rewards: out[s] = (E[max over {s} u J] - mean) / sd, mean and standard
// deviation of the maximum over all k-subsets of the item. 0 where sd is 0, NaN for an item with n < k.
void pass_at_k_advantages(const Groups& groups, std::int64_t k, double* out);

}  // namespace medbridge
