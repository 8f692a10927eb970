// Pass@K combinatorics over plain arrays: exact to a few units in the last place, threaded with OpenMP.
// Nothing here knows Python or numpy; bindings.cpp does the conversions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace medbridge {

// Largest sample count per item that is accepted (2^31 - 1): every intermediate integer is then exact in a double.
constexpr std::int64_t kMaxSamples = 2147483647;

// out[i * n_ks + j] = 1 - C(n_i - c_i, k_j) / C(n_i, k_j), the unbiased Pass@K estimate of Chen et al. (arXiv 2107.03374, eq. 1):
// the probability that at least one of k samples drawn without replacement from n, of which c are correct, is correct.
// NaN where k > n. Throws std::invalid_argument naming the first bad index if n < 0, n > kMaxSamples, c < 0, c > n or k < 1.
void pass_at_k(const std::int64_t* n, const std::int64_t* c, std::size_t n_items, const std::int64_t* ks,
               std::size_t n_ks, double* out);

// out[j] = sum_i w_i passk(i, k_j) / sum_i w_i over the items with w_i > 0 (weights == nullptr: all 1).
// NaN where any such item has k > n, and everywhere when there are no items. The result doesn't depend on the number of threads.
// Throws like pass_at_k, and if a weight is negative or not finite, or if all of them are 0.
void mean_curve(const std::int64_t* n, const std::int64_t* c, const double* weights, std::size_t n_items,
                const std::int64_t* ks, std::size_t n_ks, double* out);

}  // namespace medbridge
