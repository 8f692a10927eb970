#include "group_advantages.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "grpo.h"

namespace medbridge {
namespace {

struct Moments {
  double count = 0.0;  // of the rewards that aren't NaN, as everything here
  double mean = 0.0;
  double rest = 0.0;        // what rounding left of the mean: the deviation of r is (r - mean) - rest
  double square_sum = 0.0;  // of the deviations
  bool equal = false;
  double first = 0.0;  // where they are equal: the reward
  double std(bool unbiased) const { return std::sqrt(square_sum / std::max(count - (unbiased ? 1.0 : 0.0), 1.0)); }
};

// `left` is the sum of the rewards' differences from `mean`, `squares` that of their squares.
Moments moments(double count, double mean, double left, double squares, bool equal, double first) {
  const double rest = left / std::max(count, 1.0);
  return {count, mean, rest, std::max(squares - left * rest, 0.0), equal, first};
}

// The advantage of r is ((r - mean) - rest) * factor.
struct Scaling {
  double mean, rest, factor;
};

// `batch_scale` is what each advantage is divided by where it isn't the group's own.
Scaling scaling_of(const Moments& group, const AdvantageOptions& options, double batch_scale) {
  const bool relative = options.baseline != GroupBaseline::kNone;
  // (r - mean) / (std + eps) of equal rewards is rounding noise, not 0. A singleton is such a group.
  if (group.equal && (relative || options.scale == GroupScale::kStd)) return {group.first, 0.0, 0.0};
  // r - mean of the others = (r - mean) count / (count - 1)
  const double others = group.count / std::max(group.count - 1.0, 1.0);
  const double scale = options.scale == GroupScale::kStd ? group.std(options.unbiased) + options.eps : batch_scale;
  const double factor = (options.baseline == GroupBaseline::kLeaveOneOut ? others : 1.0) / scale;
  return relative ? Scaling{group.mean, group.rest, factor} : Scaling{0.0, 0.0, factor};
}

// Into the caller, and with it what it calls: its instructions are the caller's.
template <class Instructions, class Value>
[[gnu::always_inline]] inline void advantages_by(const Value* rewards, const std::int64_t* offsets, std::int64_t n_groups,
                                                 const AdvantageOptions& options, Value* out) {
  const bool relative = options.baseline != GroupBaseline::kNone;
  double batch_scale = 1.0;
  if (options.scale == GroupScale::kBatchStd) {
    batch_scale = Instructions::moments_of(rewards, offsets[n_groups]).std(options.unbiased) + options.eps;
  }
  for (std::int64_t g = 0; g < n_groups; ++g) {
    const std::int64_t first = offsets[g];
    const std::int64_t count = offsets[g + 1] - first;
    if (0 < count && count <= Instructions::kShort && relative && !std::isnan(rewards[first])) {
      Instructions::short_group(rewards + first, count, options, batch_scale, out + first);
      continue;
    }
    const Moments group = Instructions::moments_of(rewards + first, count);
    Instructions::write(rewards + first, count, scaling_of(group, options, batch_scale), out + first);
  }
}

struct Portable {
  static constexpr std::int64_t kShort = 0;

  template <class Value>
  static void short_group(const Value*, std::int64_t, const AdvantageOptions&, double, Value*) {}

  template <class Value>
  static Moments moments_of(const Value* rewards, std::int64_t count) {
    std::int64_t valid = 0;
    double sum = 0.0;
    for (std::int64_t i = 0; i < count; ++i) {
      const bool is_valid = !std::isnan(rewards[i]);
      valid += is_valid;
      sum += is_valid ? rewards[i] : 0.0;
    }
    const double mean = sum / std::max(static_cast<double>(valid), 1.0);
    double left = 0.0;
    double squares = 0.0;
    Value least = std::numeric_limits<Value>::infinity();
    Value most = -least;
    for (std::int64_t i = 0; i < count; ++i) {
      const double deviation = std::isnan(rewards[i]) ? 0.0 : rewards[i] - mean;
      left += deviation;
      squares += deviation * deviation;
      least = rewards[i] < least ? rewards[i] : least;
      most = rewards[i] > most ? rewards[i] : most;
    }
    return moments(static_cast<double>(valid), mean, left, squares, least == most && std::isfinite(least), least);
  }

  template <class Value>
  static void write(const Value* rewards, std::int64_t count, const Scaling& scaling, Value* out) {
    for (std::int64_t i = 0; i < count; ++i) {
      const double advantage = ((rewards[i] - scaling.mean) - scaling.rest) * scaling.factor;
      out[i] = std::isnan(rewards[i]) ? Value{0} : static_cast<Value>(advantage);
    }
  }
};

#if defined(__x86_64__)
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC before 13 sees it in its own intrinsics
#endif
#define MEDBRIDGE_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl")))

// Eight rewards at a time, in masked vectors of float64.
struct Avx512 {
  static constexpr std::int64_t kLanes = 8;

  static __mmask8 lanes(std::int64_t left) {
    return static_cast<__mmask8>((1U << std::min(left, kLanes)) - 1U);
  }

  MEDBRIDGE_AVX512 static __m512d load(__mmask8 mask, const float* at) {
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, at));
  }
  MEDBRIDGE_AVX512 static __m512d load(__mmask8 mask, const double* at) { return _mm512_maskz_loadu_pd(mask, at); }

  MEDBRIDGE_AVX512 static void store(float* at, __mmask8 mask, __m512d values) {
    _mm256_mask_storeu_ps(at, mask, _mm512_cvtpd_ps(values));
  }
  MEDBRIDGE_AVX512 static void store(double* at, __mmask8 mask, __m512d values) { _mm512_mask_storeu_pd(at, mask, values); }

  // Of the lanes in `mask`, those that aren't NaN.
  MEDBRIDGE_AVX512 static __mmask8 valid(__mmask8 mask, __m512d values) {
    return _mm512_mask_cmp_pd_mask(mask, values, values, _CMP_ORD_Q);
  }

  template <class Value>
  MEDBRIDGE_AVX512 static Moments moments_of(const Value* rewards, std::int64_t count) {
    __m512d sum = _mm512_setzero_pd();
    __m512d least = _mm512_set1_pd(std::numeric_limits<double>::infinity());
    __m512d most = _mm512_set1_pd(-std::numeric_limits<double>::infinity());
    std::int64_t n_valid = 0;
    for (std::int64_t i = 0; i < count; i += kLanes) {
      const __mmask8 mask = lanes(count - i);
      const __m512d values = load(mask, rewards + i);
      const __mmask8 kept = valid(mask, values);
      sum = _mm512_mask_add_pd(sum, kept, sum, values);
      least = _mm512_mask_min_pd(least, kept, least, values);
      most = _mm512_mask_max_pd(most, kept, most, values);
      n_valid += __builtin_popcount(kept);
    }
    const double n = static_cast<double>(n_valid);
    const double mean = _mm512_reduce_add_pd(sum) / std::max(n, 1.0);
    __m512d left = _mm512_setzero_pd();
    __m512d squares = _mm512_setzero_pd();
    for (std::int64_t i = 0; i < count; i += kLanes) {
      const __mmask8 mask = lanes(count - i);
      const __m512d values = load(mask, rewards + i);
      const __m512d deviation = _mm512_maskz_sub_pd(valid(mask, values), values, _mm512_set1_pd(mean));
      left = _mm512_add_pd(left, deviation);
      squares = _mm512_fmadd_pd(deviation, deviation, squares);
    }
    const double first = _mm512_reduce_min_pd(least);
    const bool equal = first == _mm512_reduce_max_pd(most) && std::isfinite(first);
    return moments(n, mean, _mm512_reduce_add_pd(left), _mm512_reduce_add_pd(squares), equal, first);
  }

  template <class Value>
  MEDBRIDGE_AVX512 static void write(const Value* rewards, std::int64_t count, const Scaling& scaling, Value* out) {
    const __m512d mean = _mm512_set1_pd(scaling.mean);
    const __m512d rest = _mm512_set1_pd(scaling.rest);
    const __m512d factor = _mm512_set1_pd(scaling.factor);
    for (std::int64_t i = 0; i < count; i += kLanes) {
      const __mmask8 mask = lanes(count - i);
      const __m512d values = load(mask, rewards + i);
      const __m512d deviation = _mm512_sub_pd(_mm512_sub_pd(values, mean), rest);
      store(out + i, mask, _mm512_maskz_mul_pd(valid(mask, values), deviation, factor));
    }
  }

  static constexpr std::int64_t kShort = 2 * kLanes;

  // Groups of up to 16 rewards of which the first isn't NaN, with a baseline: in one pass and two vectors whatever the length: the lengths
  // of ragged groups can't be predicted. The moments are those of the differences from the first reward. What cancels in
  // the sum of squares is then at most a factor of the group's size, however far from 0 or near to each other the rewards
  // are.
  template <class Value>
  MEDBRIDGE_AVX512 static void short_group(const Value* rewards, std::int64_t count, const AdvantageOptions& options,
                                           double batch_scale, Value* out) {
    const std::uint32_t used = (1U << count) - 1U;
    const auto masks = std::array{static_cast<__mmask8>(used), static_cast<__mmask8>(used >> kLanes)};
    const std::int64_t second = std::min(kLanes, count);
    const __m512d low = load(masks[0], rewards);
    const __m512d high = load(masks[1], rewards + second);
    const __m512d first = _mm512_broadcastsd_pd(_mm512_castpd512_pd128(low));
    const __mmask8 valid_low = valid(masks[0], low);
    const __mmask8 valid_high = valid(masks[1], high);
    const __m512d from_low = _mm512_maskz_sub_pd(valid_low, low, first);
    const __m512d from_high = _mm512_maskz_sub_pd(valid_high, high, first);
    const __m512d sums = _mm512_add_pd(from_low, from_high);
    const __m512d squares = _mm512_fmadd_pd(from_low, from_low, _mm512_mul_pd(from_high, from_high));
    // Both are summed over the lanes at once: [sum, squares, sum, squares, ...], halved twice.
    const __m512d eight = _mm512_add_pd(_mm512_unpacklo_pd(sums, squares), _mm512_unpackhi_pd(sums, squares));
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    const double sum = _mm_cvtsd_f64(two);
    const double square_sum = _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
    const __m512d zero = _mm512_setzero_pd();
    const bool differ = _mm512_cmp_pd_mask(from_low, zero, _CMP_NEQ_UQ) | _mm512_cmp_pd_mask(from_high, zero, _CMP_NEQ_UQ);

    const double n = static_cast<double>(__builtin_popcount(valid_low | valid_high << kLanes));
    const double mean = sum / n;
    const Moments group = moments(n, mean, 0.0, square_sum - sum * mean, !differ, 0.0);
    const Scaling scaling = scaling_of(group, options, batch_scale);
    const __m512d centre = _mm512_set1_pd(scaling.mean);
    const __m512d factor = _mm512_set1_pd(scaling.factor);
    store(out, masks[0], _mm512_maskz_mul_pd(valid_low, _mm512_sub_pd(from_low, centre), factor));
    store(out + second, masks[1], _mm512_maskz_mul_pd(valid_high, _mm512_sub_pd(from_high, centre), factor));
  }
};

template <class Value>
MEDBRIDGE_AVX512 void advantages_avx512(const Value* rewards, const std::int64_t* offsets, std::int64_t n_groups,
                                        const AdvantageOptions& options, Value* out) {
  advantages_by<Avx512>(rewards, offsets, n_groups, options, out);
}
#pragma GCC diagnostic pop
#endif

}  // namespace

std::int64_t first_bad_offset(const std::int64_t* offsets, std::int64_t n_offsets, std::int64_t count) {
  if (n_offsets == 0 || offsets[0] != 0) return 0;
  // One pass that vectorises; the first fall is sought only where there is one.
  bool falls = false;
  for (std::int64_t g = 1; g < n_offsets; ++g) falls |= offsets[g] < offsets[g - 1];
  if (falls) {
    const std::int64_t* fall = std::is_sorted_until(offsets, offsets + n_offsets);
    return fall - offsets;
  }
  return offsets[n_offsets - 1] == count ? -1 : n_offsets - 1;
}

template <class Value>
void group_advantages(const Value* rewards, const std::int64_t* offsets, std::int64_t n_groups,
                      const AdvantageOptions& options, Value* out) {
#if defined(__x86_64__)
  static const bool has_avx512 = std::string_view(instruction_set()) == "avx512";
  if (has_avx512) return advantages_avx512(rewards, offsets, n_groups, options, out);
#endif
  advantages_by<Portable>(rewards, offsets, n_groups, options, out);
}

template void group_advantages(const float*, const std::int64_t*, std::int64_t, const AdvantageOptions&, float*);
template void group_advantages(const double*, const std::int64_t*, std::int64_t, const AdvantageOptions&, double*);

}  // namespace medbridge
