// The vocabulary sweep of the GRPO loss on a CPU: log-probability, entropy and log-sum-exp of each row of logits in one
// read, and the gradient of the logits in one more. The policy terms between the two are not here: they have the size of
// the tokens, and plain torch computes them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace medbridge {

enum class LogitType { kFloat32, kBFloat16, kFloat16 };

std::size_t bytes_of(LogitType type);

// [tokens, vocab]; the rows lie `stride` elements apart.
struct Logits {
  const void* data = nullptr;
  LogitType type = LogitType::kFloat32;
  std::int64_t tokens = 0;
  std::int64_t vocab = 0;
  std::int64_t stride = 0;
};

// What both directions read beside the logits. Rows that aren't kept are never read.
struct Rows {
  Logits logits;
  const std::int64_t* token_ids = nullptr;  // [tokens], outside `keep` any value
  const bool* keep = nullptr;               // [tokens]; none: all
  const float* temperatures = nullptr;      // [tokens]; none: `temperature` for all
  double temperature = 1.0;
  bool keeps(std::int64_t row) const { return keep == nullptr || keep[row]; }
  double temperature_of(std::int64_t row) const { return temperatures == nullptr ? temperature : temperatures[row]; }
};

struct SweepOutputs {  // each [tokens], 0 for rows that aren't kept
  float* logprobs = nullptr;
  float* entropy = nullptr;  // none: not asked for
  double* lse = nullptr;
};

// With z = logits / temperature: z[token] - lse, lse - sum p z, and lse = log sum exp z. NaN for a row that holds a NaN or
// +inf, or nothing but -inf; the log-probability alone is NaN for a token id outside the vocabulary.
void sweep(const Rows& rows, const SweepOutputs& out);

struct Gradients {
  const double* lse = nullptr;            // [tokens], of sweep
  const float* entropy = nullptr;         // [tokens], of sweep; needed with by_entropy
  const float* by_logprob = nullptr;      // [tokens], g
  const float* by_entropy = nullptr;      // [tokens], h; none: 0
  void* out = nullptr;                    // [tokens, vocab] in the type of the logits, which it may be
  std::int64_t stride = 0;                // of out, in elements
};

// (g 1[j = token] - p_j (g + h (log p_j + entropy))) / temperature. Rows that aren't kept, and those with g = h = 0, are not
// read: their gradient is 0.
void sweep_backward(const Rows& rows, const Gradients& gradients);

// The instructions that the kernels use here: "avx512", "avx2" or "portable".
const char* instruction_set();

}  // namespace medbridge
