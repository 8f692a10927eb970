// Threads over the rows, and the choice of the machine's instructions, around the kernels of the vocabulary sweep.
#include "grpo.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <string_view>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace medbridge {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// Below this many logits threads aren't worth starting.
constexpr std::int64_t kParallelLogits = std::int64_t{1} << 16;
// Logits of the rows that a thread takes at a time.
constexpr std::int64_t kLogitsAtATime = std::int64_t{1} << 15;
// A gradient of this size (8 MiB) and beyond, written to memory of its own, goes past the caches.
constexpr std::int64_t kStreamedBytes = std::int64_t{1} << 23;

// --- Elements ---

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

constexpr float negative_infinity(float) { return -std::numeric_limits<float>::infinity(); }
constexpr BFloat16 negative_infinity(BFloat16) { return {0xff80}; }
constexpr Float16 negative_infinity(Float16) { return {0xfc00}; }

// --- How exact an exponential is ---

// Factors of (2^r - 1) / r on [-1/2, 1/2] from the highest power down: those with which 2^r has the smallest largest
// relative error, which is 3e-6, 9e-8 (with the rounding 1.3 units in the last place) and 2e-9 (0.7 units).
constexpr float kDegree4[] = {0x1.3a022ap-7F, 0x1.c9fdecp-5F, 0x1.ec0380p-3F, 0x1.62e12ap-1F};
constexpr float kDegree5[] = {0x1.5bb92ap-10F, 0x1.3ceb6cp-7F, 0x1.c6b75ap-5F, 0x1.ebf9bap-3F, 0x1.62e42ap-1F};
constexpr float kDegree6[] = {0x1.41fb2ep-13F, 0x1.5f3f30p-10F, 0x1.3b2d50p-7F,
                              0x1.c6aee6p-5F,  0x1.ebfbdcp-3F,  0x1.62e430p-1F};

// kWithLow: without the low part of the scale, the relative error grows by 6e-8 of the exponent.
struct ForSums {  // over the vocabulary, which even the errors out
  static constexpr bool kWithLow = true;
  static constexpr const auto& kFactors = kDegree5;
};
struct ForRescaling {  // again and again where the logits ascend: no bias may build up
  static constexpr bool kWithLow = true;
  static constexpr const auto& kFactors = kDegree6;
};
template <class Element>
struct ForGradients {  // of 16 bits
  static constexpr bool kWithLow = false;
  static constexpr const auto& kFactors = kDegree4;
};
template <>
struct ForGradients<float> {
  static constexpr bool kWithLow = false;
  static constexpr const auto& kFactors = kDegree6;
};

// Others, of which log2(e) / temperature has no normal float32, give NaN.
bool is_usable(double temperature) { return temperature > 1e-30 && temperature < 1e30; }

void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace medbridge

#define MEDBRIDGE_SET portable
#define MEDBRIDGE_TARGET
#define MEDBRIDGE_LANES 4
#include "grpo_kernels.h"

#if defined(__x86_64__)
#define MEDBRIDGE_SET avx2
#define MEDBRIDGE_TARGET __attribute__((target("avx2,fma,f16c")))
#define MEDBRIDGE_LANES 8
#include "grpo_kernels.h"

#define MEDBRIDGE_SET avx512
#define MEDBRIDGE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define MEDBRIDGE_LANES 16
#include "grpo_kernels.h"
#endif

namespace medbridge {
namespace {

struct Kernels {
  const char* name;
  decltype(&portable::sweep_rows) sweep_rows;
  decltype(&portable::backward_rows) backward_rows;
};

// MEDBRIDGE_PORTABLE in the environment, read once, is for tests: 1 keeps to the instructions that every machine has, avx2
// to AVX2.
Kernels kernels_of_machine() {
#if defined(__x86_64__)
  const char* set = std::getenv("MEDBRIDGE_PORTABLE");
  const std::string_view limit = set == nullptr ? "" : set;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (limit != "1" && limit != "avx2" && has_avx512) return {"avx512", avx512::sweep_rows, avx512::backward_rows};
  if (limit != "1" && has_avx2) return {"avx2", avx2::sweep_rows, avx2::backward_rows};
#endif
  return {"portable", portable::sweep_rows, portable::backward_rows};
}

const Kernels& kernels() {
  static const Kernels chosen = kernels_of_machine();
  return chosen;
}

// Calls work(first, last) with ranges of the rows that cover all of them. Each row is one thread's, so that the number of
// threads changes no result; who gets which is settled on the way, since threads may be held up.
template <class Work>
void for_rows(const Logits& logits, const Work& work) {
  const std::int64_t rows_at_a_time = std::max<std::int64_t>(1, kLogitsAtATime / std::max<std::int64_t>(1, logits.vocab));
  const std::int64_t ranges = (logits.tokens + rows_at_a_time - 1) / rows_at_a_time;
#pragma omp parallel for schedule(dynamic) if (ranges > 1 && logits.tokens * logits.vocab >= kParallelLogits)
  for (std::int64_t range = 0; range < ranges; ++range) {
    work(range * rows_at_a_time, std::min(logits.tokens, (range + 1) * rows_at_a_time));
  }
}

}  // namespace

std::size_t bytes_of(LogitType type) { return type == LogitType::kFloat32 ? 4 : 2; }

void sweep(const Rows& rows, const SweepOutputs& out) {
  const Kernels& chosen = kernels();
  for_rows(rows.logits, [&](std::int64_t first, std::int64_t last) { chosen.sweep_rows(rows, out, first, last); });
}

void sweep_backward(const Rows& rows, const Gradients& gradients) {
  const Kernels& chosen = kernels();
  const auto row_bytes = rows.logits.vocab * static_cast<std::int64_t>(bytes_of(rows.logits.type));
  const bool streams = gradients.out != rows.logits.data && rows.logits.tokens * row_bytes >= kStreamedBytes;
  for_rows(rows.logits, [&](std::int64_t first, std::int64_t last) {
    chosen.backward_rows(rows, gradients, streams, first, last);
  });
}

const char* instruction_set() { return kernels().name; }

}  // namespace medbridge
