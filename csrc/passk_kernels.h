// The arithmetic of Pass@k for one row, or for a block of rows with a common n, generic in how the rounding error of a
// product is found. passk.cpp compiles each twice (see there); checks, grouping and threads are its business too.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "double_double.h"

#if defined(_MSC_VER)
#define MEDBRIDGE_PRAGMA(text)  // its OpenMP has no simd
#else
#define MEDBRIDGE_PRAGMA(text) _Pragma(#text)
#endif

namespace medbridge {
namespace kernels {

// What is made of the probability m = C(n - h, k) / C(n, k) that k of n samples miss h given ones.
//   Any: 1 - m, at least one of h = c correct samples is drawn (Pass@k).
//   All: m, none of h = n - c wrong samples is drawn, so that all are correct.
// m may start scaled, to keep the digits of results near the smallest doubles. It is put to 0 below `negligible`, where
// the value has been rounded to 1 or 0: denormal numbers would be slow, and their products lose what error() should
// return.
struct Any {
  static constexpr double kStart = 1.0;
  static constexpr double kNegligible = 0x1p-54;
  static MEDBRIDGE_INLINE double value(double high, double low) {
    const double rounded = 1.0 - high;
    return rounded + (((1.0 - rounded) - high) - low);
  }
  static MEDBRIDGE_INLINE double at_one_draw(double n, double h) { return h / n; }
};
struct All {
  static constexpr double kStart = 0x1p900;
  static constexpr double kNegligible = 0x1p-200;
  // + 0.0 makes 0 of -0
  static MEDBRIDGE_INLINE double value(double high, double) { return high * 0x1p-900 + 0.0; }
  static MEDBRIDGE_INLINE double at_one_draw(double n, double h) { return (n - h) / n; }
};

// Rows of one n that are computed together: enough of them to keep vector units busy while each waits for its own last
// product.
constexpr std::size_t kLanes = 16;
// Values of k that a call of sweep() may ask for.
constexpr std::size_t kTile = 32;
// Steps between two looks for lanes that have become negligible.
constexpr std::int64_t kLook = 8;

struct Lanes {
  double n = 0.0;
  std::int64_t done = 0;            // k of the state
  alignas(64) double h[kLanes];     // lanes without a row: n
  alignas(64) double left[kLanes];  // n - h - done
  alignas(64) double high[kLanes];  // m, scaled
  alignas(64) double low[kLanes];
};

template <class Product>
MEDBRIDGE_INLINE void step(Lanes& lanes) {
  // m_k = m_(k-1) (n - h - k + 1) / (n - k + 1), by the reciprocal that the lanes share.
  const double out_of = lanes.n - static_cast<double>(lanes.done);
  const double inverse = 1.0 / out_of;
  const Wide back = product_of<Product>(inverse, out_of);
  const double inverse_low = ((1.0 - back.high) - back.low) * inverse;
  MEDBRIDGE_PRAGMA(omp simd)
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    const double left = lanes.left[lane];
    const double high = lanes.high[lane];
    const double ratio = left * inverse;
    const double ratio_low = Product::error(left, inverse, ratio) + left * inverse_low;
    const double product = high * ratio;
    const double rest = Product::error(high, ratio, product) + (high * ratio_low + lanes.low[lane] * ratio);
    const double sum = product + rest;
    lanes.high[lane] = sum;
    lanes.low[lane] = rest - (sum - product);
    lanes.left[lane] = left - 1.0;
  }
  ++lanes.done;
}

// Puts negligible lanes to 0; false when all are.
template <class Form>
MEDBRIDGE_INLINE bool any_left(Lanes& lanes) {
  double most = 0.0;
  MEDBRIDGE_PRAGMA(omp simd reduction(max : most))
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    const bool keep = lanes.high[lane] >= Form::kNegligible;
    lanes.high[lane] = keep ? lanes.high[lane] : 0.0;
    lanes.low[lane] = keep ? lanes.low[lane] : 0.0;
    most = std::max(most, lanes.high[lane]);
  }
  return most > 0.0;
}

template <class Form>
MEDBRIDGE_INLINE void begin(Lanes& lanes, std::int64_t n, const std::int64_t* h, std::size_t rows) {
  lanes.n = static_cast<double>(n);
  lanes.done = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    lanes.h[lane] = static_cast<double>(lane < rows ? h[lane] : n);
    lanes.left[lane] = lanes.n - lanes.h[lane];
    lanes.high[lane] = Form::kStart;
    lanes.low[lane] = 0.0;
  }
}

template <class Form>
MEDBRIDGE_INLINE void values_of(const Lanes& lanes, double* __restrict values) {
  MEDBRIDGE_PRAGMA(omp simd)
  for (std::size_t lane = 0; lane < kLanes; ++lane) values[lane] = Form::value(lanes.high[lane], lanes.low[lane]);
}

// One quotient, correctly rounded.
template <class Form>
MEDBRIDGE_INLINE void at_one_draw(const Lanes& lanes, double* __restrict values) {
  MEDBRIDGE_PRAGMA(omp simd)
  for (std::size_t lane = 0; lane < kLanes; ++lane) values[lane] = Form::at_one_draw(lanes.n, lanes.h[lane]);
}

// values[j * kLanes + lane] at ks[j] for the next `count` <= kTile increasing ks <= n. Returns how many were written:
// fewer than asked when all lanes have reached their limit, which is then the value at every further k.
template <class Form>
struct Sweep {
  template <class Product>
  static MEDBRIDGE_INLINE std::size_t run(Lanes& lanes, const std::int64_t* ks, std::size_t count, double* values) {
    for (std::size_t j = 0; j < count; ++j) {
      while (lanes.done < ks[j]) {
        step<Product>(lanes);
        if (lanes.done % kLook == 0 && !any_left<Form>(lanes)) return j;
      }
      if (ks[j] == 1) {
        at_one_draw<Form>(lanes, values + j * kLanes);
      } else {
        values_of<Form>(lanes, values + j * kLanes);
      }
    }
    return count;
  }
};

// sums[j] += sum over lanes of weights[lane] * values[j * kLanes + lane], four partial sums each, compensated.
constexpr std::size_t kParts = 4;
struct PartialSums {
  alignas(32) double value[kParts] = {};
  alignas(32) double lost[kParts] = {};
};
struct Accumulate {
  template <class Product>
  static MEDBRIDGE_INLINE void run(const double* __restrict values, const double* __restrict weights, std::size_t count,
                                   PartialSums* __restrict sums) {
    static_assert(kLanes == 4 * kParts, "each part adds four lanes");
    for (std::size_t j = 0; j < count; ++j) {
      const double* const row = values + j * kLanes;
      double* __restrict const value = sums[j].value;
      double* __restrict const lost = sums[j].lost;
      MEDBRIDGE_PRAGMA(omp simd)
      for (std::size_t part = 0; part < kParts; ++part) {
        const double first = weights[part] * row[part] + weights[part + 4] * row[part + 4];
        const double second = weights[part + 8] * row[part + 8] + weights[part + 12] * row[part + 12];
        const Wide next = sum_of(value[part], first + second);
        value[part] = next.high;
        lost[part] += next.low;
      }
    }
  }
};

// One value by itself, 1 <= k <= n. m is symmetric in h and k, so that the shorter product is taken:
//   prod_{i < a} (n - b - i) / (n - i),  a = min(h, k), b = max(h, k),
// as eight interleaved products, which stop when nothing is left: after at most some sqrt(1500 n) factors.
template <class Form>
struct Alone {
  template <class Product>
  static MEDBRIDGE_INLINE double run(std::int64_t n, std::int64_t h, std::int64_t k) {
    constexpr std::int64_t kChains = 8;
    if (h == 0) return Form::value(Form::kStart, 0.0);
    const std::int64_t factors = std::min(h, k);
    const std::int64_t other = std::max(h, k);
    if (other > n - factors) return Form::value(0.0, 0.0);
    if (factors == 1) return Form::at_one_draw(static_cast<double>(n), static_cast<double>(other));
    double high[kChains];
    double low[kChains];
    for (std::int64_t chain = 0; chain < kChains; ++chain) high[chain] = 1.0, low[chain] = 0.0;
    for (std::int64_t i = 0; i < factors; i += kChains) {
      MEDBRIDGE_PRAGMA(omp simd)
      for (std::int64_t chain = 0; chain < kChains; ++chain) {
        const bool within = i + chain < factors;
        const double out_of = within ? static_cast<double>(n - i - chain) : 1.0;
        const double left = within ? static_cast<double>(n - other - i - chain) : 1.0;
        const double ratio = left / out_of;
        const Wide back = product_of<Product>(ratio, out_of);
        const double ratio_low = ((left - back.high) - back.low) / out_of;
        const double product = high[chain] * ratio;
        const double rest = Product::error(high[chain], ratio, product) + (high[chain] * ratio_low + low[chain] * ratio);
        const double sum = product + rest;
        high[chain] = sum;
        low[chain] = rest - (sum - product);
      }
      if (i % 64 == 0) {
        double so_far = Form::kStart;
        for (const double factor : high) so_far *= factor;
        if (so_far < Form::kNegligible) return Form::value(0.0, 0.0);
      }
    }
    Wide miss{Form::kStart, 0.0};
    for (std::int64_t chain = 0; chain < kChains; ++chain) miss = times<Product>(miss, {high[chain], low[chain]});
    return Form::value(miss.high, miss.low);
  }
};

// Sums of unnormalised probabilities start from the largest, put to 2^900: what is below 2^-200 then is below every double.
constexpr double kMode = 0x1p900;
constexpr double kVanished = 0x1p-200;
// Beyond terms this small against their sum, the rest of the (log-concave) terms is below 2^-90 of it up to n = 2^31.
constexpr double kRest = 0x1p-110;

// x successes score 1 above `threshold`, `share` at it and 0 below.
struct Score {
  std::int64_t threshold = 0;
  Wide share;
};

template <class Product>
MEDBRIDGE_INLINE Wide scored(const Score& score, std::int64_t x, Wide term) {
  if (x > score.threshold) return term;
  return x == score.threshold ? times<Product>(score.share, term) : Wide{};
}

// term a b / (d e)
template <class Product>
MEDBRIDGE_INLINE Wide times_ratio(Wide term, std::int64_t a, std::int64_t b, std::int64_t d, std::int64_t e) {
  const Wide above = product_of<Product>(static_cast<double>(a), static_cast<double>(b));
  const Wide below = product_of<Product>(static_cast<double>(d), static_cast<double>(e));
  return times<Product>(term, over<Product>(above, below));
}

// The mean score of k draws without replacement from n of which c are correct, 1 <= k <= n:
//   sum_x score(x) C(c, x) C(n - c, k - x) / C(n, k).
// Terms follow from their neighbours, outwards from the largest, and are divided by their own total, so that no product
// of k factors is needed: about 25 standard deviations of them, each at most sqrt(n) / 4, or up to some 60 where the
// score begins that far out.
struct HypergeometricMean {
  template <class Product>
  static MEDBRIDGE_INLINE double run(std::int64_t n, std::int64_t c, std::int64_t k, Score score) {
    const std::int64_t least = std::max<std::int64_t>(0, k - (n - c));
    const std::int64_t most = std::min(c, k);
    if (least > score.threshold) return 1.0;
    if (most < score.threshold || (most == score.threshold && score.share.high == 0.0)) return 0.0;
    const std::int64_t mode = std::clamp((k + 1) * (c + 1) / (n + 2), least, most);
    Wide all{kMode, 0.0};
    Wide reached = scored<Product>(score, mode, all);
    Wide term = all;
    for (std::int64_t x = mode; x > least && term.high > kRest * all.high; --x) {
      term = times_ratio<Product>(term, x, n - c - k + x, c - x + 1, k - x + 1);
      all = all + term;
      reached = reached + scored<Product>(score, x - 1, term);
    }
    term = {kMode, 0.0};
    for (std::int64_t x = mode; x < most; ++x) {
      term = times_ratio<Product>(term, c - x, k - x, x + 1, n - c - k + x + 1);
      all = all + term;
      reached = reached + scored<Product>(score, x + 1, term);
      if (term.high < kVanished || (x + 1 > score.threshold && term.high < kRest * reached.high)) break;
    }
    return over<Product>(reached, all).high;
  }
};

// The terms of a binomial distribution next to its mode and on: towards the end that is `room` away, the other
// end being `beyond` away.
template <class Product>
MEDBRIDGE_INLINE void add_binomial_terms(std::int64_t room, std::int64_t beyond, Wide odds, double negligible,
                                         std::vector<Wide>& terms) {
  Wide term{kMode, 0.0};
  while (room > 0 && term.high > negligible) {
    const Wide ratio = over<Product>({static_cast<double>(room--), 0.0}, {static_cast<double>(++beyond), 0.0});
    term = times<Product>(term, times<Product>(ratio, odds));
    terms.push_back(term);
  }
}

// The score whose mean is f for a guesser, whose number of successes in k draws is binomial (k, f), 0 < f < 1:
//   P(X > t) + g P(X = t) = f, 0 <= g < 1, t the least with P(X > t) <= f.
// Where the two sides agree to 2^-80 they count as equal and g is 0, as it is exactly at f = 1/2 and odd k. For f > 1/2 the
// condition is read on the lower tail, P(X <= t) >= 1 - f, so that nothing cancels. `terms` is scratch space.
struct GuessersScore {
  template <class Product>
  static MEDBRIDGE_INLINE Score run(std::int64_t k, double f, std::vector<Wide>& terms) {
    constexpr double kEqual = 0x1p-80;
    if (k == 1) return {};
    // Below this f the score has long reached its limit (t = 1, g = 1/k), and products would underflow.
    f = std::max(f, 0x1p-400);
    const bool lower = f > 0.5;
    const Wide fail = sum_of(1.0, -f);
    const double tail = lower ? 1.0 - f : f;
    const double negligible = kRest * tail * kMode;
    const auto mode = std::min(k, static_cast<std::int64_t>(static_cast<double>(k + 1) * f));
    terms.clear();
    add_binomial_terms<Product>(mode, k - mode, over<Product>(fail, {f, 0.0}), negligible, terms);
    std::reverse(terms.begin(), terms.end());
    const std::int64_t first = mode - static_cast<std::int64_t>(terms.size());
    terms.push_back({kMode, 0.0});
    add_binomial_terms<Product>(k - mode, mode, over<Product>({f, 0.0}, fail), negligible, terms);
    Wide all;
    for (const Wide term : terms) all = all + term;
    const Wide sought = times<Product>({tail, 0.0}, all);
    // The quantile: terms are taken from the outer end of the tail while they fit in (upper), or until they suffice (lower).
    const auto size = static_cast<std::int64_t>(terms.size());
    const auto place = [&](std::int64_t i) { return lower ? i : size - 1 - i; };
    const double equal = kEqual * sought.high;
    Wide taken;
    Wide next = terms[static_cast<std::size_t>(place(0))];
    std::int64_t i = 0;
    while (i + 1 < size && (next + -sought).high <= (lower ? -equal : equal)) {
      taken = next;
      next = taken + terms[static_cast<std::size_t>(place(++i))];
    }
    const Wide rest = lower ? next + -sought : sought + -taken;
    const Wide term = terms[static_cast<std::size_t>(place(i))];
    return {first + place(i), rest.high <= equal ? Wide{} : over<Product>(rest, term)};
  }
};

}  // namespace kernels
}  // namespace medbridge
