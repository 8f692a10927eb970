// Pass@K combinatorics over plain arrays: exact to about one rounding, threaded with OpenMP.
// Nothing here knows Python or numpy; passk_bindings.cpp does the conversions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace medbridge {

// Largest sample count per item that is accepted (2^31 - 1): every intermediate integer is then exact in a double.
constexpr std::int64_t kMaxSamples = 2147483647;

// All functions: item i has n_i samples, c_i of them correct, and out[i * n_ks + j] is its value at k_j, NaN where k_j >
// n_i. X is the number of correct samples among k drawn without replacement. Each distinct pair (n, c) is computed once;
// no result depends on the number of threads or on the other items. They throw std::invalid_argument naming the first bad
// index if n < 0, n > kMaxSamples, c < 0, c > n or k < 1.

// P(X >= 1) = 1 - C(n - c, k) / C(n, k), the unbiased Pass@K estimate of Chen et al. (arXiv 2107.03374, eq. 1).
void pass_at_k(const std::int64_t* n, const std::int64_t* c, std::size_t n_items, const std::int64_t* ks, std::size_t n_ks,
               double* out);

// P(X = k) = C(c, k) / C(n, k), pass^k of tau-bench (arXiv 2406.12045).
void pass_hat_k(const std::int64_t* n, const std::int64_t* c, std::size_t n_items, const std::int64_t* ks, std::size_t n_ks,
                double* out);

// P(X >= m), m the least integer >= 1 with m / k >= tau: G-Pass@k of arXiv 2412.13147. The quotient is compared as a
// double, so that tau = 0.07 asks for 7 of 100 although 0.07 * 100 > 7 in doubles. Throws too unless 0 < tau <= 1.
void g_pass_at_k(const std::int64_t* n, const std::int64_t* c, std::size_t n_items, const std::int64_t* ks, std::size_t n_ks,
                 double tau, double* out);

// P(X > t) + g P(X = t), with t and g from the item's guessing floor f and k such that a guesser reaches f: with B
// binomial (k, f), P(B > t) + g P(B = t) = f, 0 <= g < 1, t the least with P(B > t) <= f. f = 0 gives Pass@k, f = 1 gives
// 1. Throws too unless 0 <= f <= 1.
void reached_at_k(const std::int64_t* n, const std::int64_t* c, const double* floors, std::size_t n_items,
                  const std::int64_t* ks, std::size_t n_ks, double* out);

// out[j] = sum_i w_i passk(i, k_j) / sum_i w_i over the items with w_i > 0 (weights == nullptr: all 1).
// NaN where any such item has k > n, and everywhere when there are no items.
// Throws too if a weight is negative or not finite, if all of them are 0, or if their sum overflows.
void mean_curve(const std::int64_t* n, const std::int64_t* c, const double* weights, std::size_t n_items,
                const std::int64_t* ks, std::size_t n_ks, double* out);

}  // namespace medbridge
