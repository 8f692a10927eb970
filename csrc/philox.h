// Philox4x32-10, a counter-based generator: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
// (SC 2011), section 3.3. A word is a function of (seed, stream, place) alone, so that threads need share nothing.
#pragma once

#include <array>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define MEDBRIDGE_AVX2 1
#include <immintrin.h>
#endif

namespace medbridge {

constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr std::uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr std::uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// One block: the counter `x` after ten rounds under the key.
inline std::array<std::uint32_t, 4> philox_block(std::array<std::uint32_t, 4> x, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t{kPhiloxMultiplier0} * x[0];
    const std::uint64_t product1 = std::uint64_t{kPhiloxMultiplier1} * x[2];
    x = {static_cast<std::uint32_t>(product1 >> 32) ^ x[1] ^ key0, static_cast<std::uint32_t>(product1),
         static_cast<std::uint32_t>(product0 >> 32) ^ x[3] ^ key1, static_cast<std::uint32_t>(product0)};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return x;
}

// Blocks that a stream computes at a time, and the words in them.
constexpr int kPhiloxBlocks = 16;
constexpr int kPhiloxWords = 4 * kPhiloxBlocks;

// The blocks first .. first + kPhiloxBlocks - 1 of a stream: block b has the counter (b low, b high, stream low, stream
// high) under the key (seed low, seed high). Word 0 of all of them comes first, then word 1 of all of them, and so on.
inline void philox_fill(std::uint64_t seed, std::uint64_t stream, std::uint64_t first, std::uint32_t* words) {
  for (int b = 0; b < kPhiloxBlocks; ++b) {
    const std::uint64_t block = first + static_cast<std::uint64_t>(b);
    const auto x = philox_block({static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                                 static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)},
                                static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
    for (int i = 0; i < 4; ++i) words[i * kPhiloxBlocks + b] = x[static_cast<std::size_t>(i)];
  }
}

#ifdef MEDBRIDGE_AVX2
// The same, four blocks to a register. Each word has 64 bits to itself: the multiplication reads the lower half only, so
// that the upper half may hold anything.
__attribute__((target("avx2"))) inline void philox_fill_avx2(std::uint64_t seed, std::uint64_t stream, std::uint64_t first,
                                                             std::uint32_t* words) {
  constexpr int kRegisters = kPhiloxBlocks / 4;
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  __m256i x[4][kRegisters];
  for (int g = 0; g < kRegisters; ++g) {
    const auto block = static_cast<long long>(first + 4u * static_cast<unsigned>(g));
    x[0][g] = _mm256_add_epi64(_mm256_set1_epi64x(block), _mm256_set_epi64x(3, 2, 1, 0));
    x[1][g] = _mm256_srli_epi64(x[0][g], 32);
    x[2][g] = _mm256_set1_epi64x(static_cast<long long>(stream));
    x[3][g] = _mm256_srli_epi64(x[2][g], 32);
  }
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int g = 0; g < kRegisters; ++g) {
      const __m256i product0 = _mm256_mul_epu32(x[0][g], multiplier0);
      const __m256i product1 = _mm256_mul_epu32(x[2][g], multiplier1);
      x[0][g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), x[1][g]), _mm256_set1_epi64x(key0));
      x[1][g] = product1;
      x[2][g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), x[3][g]), _mm256_set1_epi64x(key1));
      x[3][g] = product0;
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  const __m256i lower_halves = _mm256_set_epi32(0, 0, 0, 0, 6, 4, 2, 0);
  for (int i = 0; i < 4; ++i) {
    for (int g = 0; g < kRegisters; ++g) {
      const __m256i packed = _mm256_permutevar8x32_epi32(x[i][g], lower_halves);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(words + i * kPhiloxBlocks + 4 * g), _mm256_castsi256_si128(packed));
    }
  }
}
#endif

using PhiloxFill = void (*)(std::uint64_t, std::uint64_t, std::uint64_t, std::uint32_t*);

// The words of one stream in turn.
class PhiloxStream {
 public:
  PhiloxStream(std::uint64_t seed, std::uint64_t stream, PhiloxFill fill) : seed_(seed), stream_(stream), fill_(fill) {}

  std::uint32_t word() {
    if (used_ == kPhiloxWords) refill();
    return words_[used_++];
  }

  // Uniform on 0 .. bound - 1 without bias, for bound >= 1 (Lemire, arXiv 1805.10941).
  std::uint32_t below(std::uint32_t bound) {
    std::uint64_t product = std::uint64_t{word()} * bound;
    if (static_cast<std::uint32_t>(product) < bound) {
      const std::uint32_t biased = (0u - bound) % bound;
      while (static_cast<std::uint32_t>(product) < biased) product = std::uint64_t{word()} * bound;
    }
    return static_cast<std::uint32_t>(product >> 32);
  }

 private:
  void refill() {
    fill_(seed_, stream_, next_block_, words_);
    next_block_ += kPhiloxBlocks;
    used_ = 0;
  }

  std::uint64_t seed_;
  std::uint64_t stream_;
  PhiloxFill fill_;
  std::uint64_t next_block_ = 0;
  int used_ = kPhiloxWords;
  std::uint32_t words_[kPhiloxWords];
};

}  // namespace medbridge
