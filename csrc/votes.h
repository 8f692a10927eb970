// Exact expected accuracy of a majority vote over k of n samples. Nothing here knows Python or numpy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace medbridge {

// Most samples per item that are accepted. Up to here no coefficient over- or underflows in double precision, and an
// item takes a fraction of a second at worst (the work grows with the cube of n).
constexpr std::int64_t kMaxVoters = 1024;

// votes: [n_items, n_options], samples that chose each option; correct: column of the right option, or -1 where it isn't
// among them; abstained: samples without a vote (nullptr: none). n_i = sum_j votes[i, j] + abstained_i.
// out[i * n_ks + j]: k_j of the n_i samples are drawn without replacement; the probability that the right option has the
// most votes among them, a tie of m options counting 1/m, a draw without any vote 0. NaN where k > n.
// Relative error below 1e-13; the result doesn't depend on the number of threads. Throws std::invalid_argument naming the
// first bad index if a vote or an abstention is negative, n_i > kMaxVoters, correct is not in [-1, n_options) or k < 1.
void majority_at_k(const std::int64_t* votes, const std::int64_t* correct, const std::int64_t* abstained,
                   std::size_t n_items, std::size_t n_options, const std::int64_t* ks, std::size_t n_ks, double* out);

}  // namespace medbridge
