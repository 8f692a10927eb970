// Advantages of rewards within ragged groups, in float64. reference.group_advantages of medbridge_kernels defines them.
#pragma once

#include <cstdint>

namespace medbridge {

enum class GroupBaseline { kNone, kMean, kLeaveOneOut };
enum class GroupScale { kNone, kStd, kBatchStd };

struct AdvantageOptions {
  GroupBaseline baseline = GroupBaseline::kMean;
  GroupScale scale = GroupScale::kStd;
  bool unbiased = true;
  double eps = 1e-4;
};

// Index of the first offset that breaks the rise from 0 to `count`; -1: none.
std::int64_t first_bad_offset(const std::int64_t* offsets, std::int64_t n_offsets, std::int64_t count);

// Group g has the rewards from offsets[g] up to offsets[g + 1]; the offsets must rise from 0 to the number of rewards.
template <class Value>
void group_advantages(const Value* rewards, const std::int64_t* offsets, std::int64_t n_groups,
                      const AdvantageOptions& options, Value* out);

extern template void group_advantages(const float*, const std::int64_t*, std::int64_t, const AdvantageOptions&, float*);
extern template void group_advantages(const double*, const std::int64_t*, std::int64_t, const AdvantageOptions&, double*);

}  // namespace medbridge
