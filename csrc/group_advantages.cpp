#include "group_advantages.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace medbridge {
namespace {

struct Moments {
  double count = 0.0;  // of the rewards that aren't NaN, as everything here
  double mean = 0.0;
  double rest = 0.0;        // what rounding left of the mean: the deviation of r is (r - mean) - rest
  double square_sum = 0.0;  // of the deviations
  bool equal = false;
  double deviation(double reward) const { return (reward - mean) - rest; }
  double std(bool unbiased) const { return std::sqrt(square_sum / std::max(count - (unbiased ? 1.0 : 0.0), 1.0)); }
};

template <class Value>
Moments moments_of(const Value* rewards, std::int64_t count) {
  Moments result;
  std::int64_t valid = 0;
  double sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    const bool is_valid = !std::isnan(rewards[i]);
    valid += is_valid;
    sum += is_valid ? rewards[i] : 0.0;
  }
  result.count = static_cast<double>(valid);
  const double divisor = std::max(result.count, 1.0);
  result.mean = sum / divisor;
  double left = 0.0;
  double square_sum = 0.0;
  Value least = std::numeric_limits<Value>::infinity();
  Value most = -least;
  for (std::int64_t i = 0; i < count; ++i) {
    const double deviation = std::isnan(rewards[i]) ? 0.0 : rewards[i] - result.mean;
    left += deviation;
    square_sum += deviation * deviation;
    least = rewards[i] < least ? rewards[i] : least;
    most = rewards[i] > most ? rewards[i] : most;
  }
  result.equal = least == most && std::isfinite(least);
  result.rest = left / divisor;
  result.square_sum = std::max(square_sum - left * result.rest, 0.0);
  return result;
}

// `batch_scale` is what each advantage is divided by where it isn't the group's own.
template <class Value>
void advantages_of_group(const Value* rewards, std::int64_t count, const AdvantageOptions& options, double batch_scale,
                         Value* out) {
  const bool relative = options.baseline != GroupBaseline::kNone;
  const Moments group = moments_of(rewards, count);
  // (r - mean) / (std + eps) of equal rewards is rounding noise, not 0. A singleton is such a group.
  if (group.equal && (relative || options.scale == GroupScale::kStd)) {
    std::fill_n(out, count, Value{0});
    return;
  }
  // r - mean of the others = (r - mean) count / (count - 1)
  const double others = group.count / std::max(group.count - 1.0, 1.0);
  const double scale = options.scale == GroupScale::kStd ? group.std(options.unbiased) + options.eps : batch_scale;
  const double factor = (options.baseline == GroupBaseline::kLeaveOneOut ? others : 1.0) / scale;
  for (std::int64_t i = 0; i < count; ++i) {
    const double difference = relative ? group.deviation(rewards[i]) : rewards[i];
    out[i] = std::isnan(rewards[i]) ? Value{0} : static_cast<Value>(difference * factor);
  }
}

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
  const std::int64_t count = offsets[n_groups];
  double batch_scale = 1.0;
  if (options.scale == GroupScale::kBatchStd) batch_scale = moments_of(rewards, count).std(options.unbiased) + options.eps;
  for (std::int64_t g = 0; g < n_groups; ++g) {
    const std::int64_t first = offsets[g];
    advantages_of_group(rewards + first, offsets[g + 1] - first, options, batch_scale, out + first);
  }
}

template void group_advantages(const float*, const std::int64_t*, std::int64_t, const AdvantageOptions&, float*);
template void group_advantages(const double*, const std::int64_t*, std::int64_t, const AdvantageOptions&, double*);

}  // namespace medbridge
