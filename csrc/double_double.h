// Arithmetic on unevaluated sums of two doubles (about 106 bits), from error-free transformations (Dekker 1971; Hida, Li and
// Bailey 2001). No number formats beyond that: no comparison, no conversion from text, no special values.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#if defined(_MSC_VER)
#define MEDBRIDGE_INLINE __forceinline
#else
// Inlined by force, so that a caller compiled for a wider instruction set compiles these for it too.
#define MEDBRIDGE_INLINE inline __attribute__((always_inline))
#endif

namespace medbridge {

static_assert(FLT_EVAL_METHOD == 0, "error-free transformations need doubles that are rounded to double at every step");

// error(a, b, a * b rounded) is what the rounding of the product lost: a double itself, unless it underflows. Both ways
// give the same bits, so that a result doesn't depend on the machine; the one by fused multiply-add is several times
// faster.
struct Fused {
  static MEDBRIDGE_INLINE double error(double a, double b, double product) { return std::fma(a, b, -product); }
};
struct Split {
  static MEDBRIDGE_INLINE double error(double a, double b, double product) {
    const double a_high = top_half(a);
    const double b_high = top_half(b);
    const double a_low = a - a_high;
    const double b_low = b - b_high;
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
  }

 private:
  static MEDBRIDGE_INLINE double top_half(double a) {
    const double scaled = 134217729.0 * a;  // 2^27 + 1
    return scaled - (scaled - a);
  }
};

struct Wide {  // the number high + low, |low| <= half a unit in the last place of high
  double high = 0.0;
  double low = 0.0;
};

// Exact, if |high| >= |low|.
MEDBRIDGE_INLINE Wide normalised(double high, double low) {
  const double sum = high + low;
  return {sum, low - (sum - high)};
}

// Exact.
MEDBRIDGE_INLINE Wide sum_of(double a, double b) {
  const double sum = a + b;
  const double b_part = sum - a;
  return {sum, (a - (sum - b_part)) + (b - b_part)};
}

// Exact.
template <class Product>
MEDBRIDGE_INLINE Wide product_of(double a, double b) {
  const double product = a * b;
  return {product, Product::error(a, b, product)};
}

// For terms of one sign; a difference loses what cancels.
MEDBRIDGE_INLINE Wide operator+(Wide a, Wide b) {
  const Wide sum = sum_of(a.high, b.high);
  return normalised(sum.high, sum.low + (a.low + b.low));
}

MEDBRIDGE_INLINE Wide operator-(Wide a) { return {-a.high, -a.low}; }

template <class Product>
MEDBRIDGE_INLINE Wide times(Wide a, Wide b) {
  const Wide product = product_of<Product>(a.high, b.high);
  return normalised(product.high, product.low + (a.high * b.low + a.low * b.high));
}

template <class Product>
MEDBRIDGE_INLINE Wide over(Wide a, Wide b) {
  const double quotient = a.high / b.high;
  const Wide back = product_of<Product>(quotient, b.high);
  const double rest = ((a.high - back.high) - back.low) + (a.low - quotient * b.low);
  return normalised(quotient, rest / b.high);
}

// A sum of doubles with the same care (Neumaier): total() is the sum rounded about once.
struct Sum {
  double value = 0.0;
  double lost = 0.0;
  MEDBRIDGE_INLINE void add(double x) {
    const Wide next = sum_of(value, x);
    value = next.high;
    lost += next.low;
  }
  double total() const { return value + lost; }
};

}  // namespace medbridge
