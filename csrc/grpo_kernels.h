// The kernels of the vocabulary sweep for one set of instructions. grpo.cpp includes this file once per set, with
//   MEDBRIDGE_SET      its name, the namespace of what is here,
//   MEDBRIDGE_TARGET   the attribute that asks the compiler for it (empty for the set that the build itself has),
//   MEDBRIDGE_LANES    float32 values per vector: 16 with AVX-512, 8 with AVX2, 4 without intrinsics.
// Arithmetic is written with the vector types of GCC and Clang. Which operations are fused is left to the compiler.

#define MEDBRIDGE_KERNEL MEDBRIDGE_TARGET __attribute__((always_inline)) inline

namespace medbridge {
namespace {
namespace MEDBRIDGE_SET {

constexpr std::int64_t kLanes = MEDBRIDGE_LANES;
constexpr std::int64_t kVectors = MEDBRIDGE_LANES == 16 ? 8 : 4;  // that are worked on together, as registers allow

using Floats = float __attribute__((vector_size(4 * MEDBRIDGE_LANES)));
using Words = std::int32_t __attribute__((vector_size(4 * MEDBRIDGE_LANES)));
using Bits = std::uint32_t __attribute__((vector_size(4 * MEDBRIDGE_LANES)));
using Halves = std::uint16_t __attribute__((vector_size(2 * MEDBRIDGE_LANES)));

// --- Vectors ---

MEDBRIDGE_KERNEL Floats splat(float value) { return value - Floats{}; }

// a where it is above b, else b: NaN in b stays, NaN in a doesn't.
MEDBRIDGE_KERNEL Floats larger(Floats a, Floats b) { return a > b ? a : b; }

MEDBRIDGE_KERNEL bool any_above(Floats a, Floats b) {
#if MEDBRIDGE_LANES == 16
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ) != 0;
#elif MEDBRIDGE_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), _CMP_GT_OQ)) != 0;
#else
  const Words above = a > b;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
#endif
}

MEDBRIDGE_KERNEL Floats as_floats(Bits bits) { return reinterpret_cast<Floats>(bits); }
MEDBRIDGE_KERNEL Bits as_bits(Floats values) { return reinterpret_cast<Bits>(values); }

// --- Elements in memory ---

MEDBRIDGE_KERNEL Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

MEDBRIDGE_KERNEL Floats load(const BFloat16* from) {
#if MEDBRIDGE_LANES == 16
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return as_floats(reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(0xffff, halves)) << 16);
#elif MEDBRIDGE_LANES == 8
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return as_floats(reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(halves)) << 16);
#else
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return as_floats(__builtin_convertvector(halves, Bits) << 16);
#endif
}

MEDBRIDGE_KERNEL Floats load(const Float16* from) {
#if MEDBRIDGE_LANES == 16
  return reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif MEDBRIDGE_LANES == 8
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Bits half = __builtin_convertvector(halves, Bits);
  const Bits magnitude = half & 0x7fff;
  // The exponent moves from a bias of 15 to one of 127; that of infinity and NaN is filled up.
  const Bits finite = as_bits(as_floats(magnitude << 13) * 0x1p112F);
  const Bits special = reinterpret_cast<Bits>(magnitude >= 0x7c00) & 0x7f800000;
  return as_floats(finite | special | (half & 0x8000) << 16);
#endif
}

// The 16-bit patterns of values, rounded to the nearest (of two, to the even one), in the low half of each lane.
MEDBRIDGE_KERNEL Bits rounded(Floats values, BFloat16) {
  const Floats nan = splat(std::numeric_limits<float>::quiet_NaN());  // of any other the carry could make a number
  const Bits bits = as_bits(values == values ? values : nan);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#if MEDBRIDGE_LANES == 4
MEDBRIDGE_KERNEL Bits rounded(Floats values, Float16) {
  const Bits bits = as_bits(values);
  const Bits magnitude = bits & 0x7fffffff;
  // A normal number: the rounding may carry up to infinity.
  const Bits normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Below 2^-14: the addition rounds at the place of the smallest number, 2^-24.
  const Bits small = as_bits(as_floats(magnitude) + 0.5F) - 0x3f000000;
  const Bits is_small = reinterpret_cast<Bits>(magnitude < 0x38800000);
  const Bits is_large = reinterpret_cast<Bits>(magnitude >= 0x47800000);
  const Bits is_nan = reinterpret_cast<Bits>(magnitude > 0x7f800000);
  const Bits finite = (small & is_small) | (normal & ~is_small);
  return (finite & ~is_large) | (is_large & 0x7c00) | (is_nan & 0x0200) | (bits >> 16 & 0x8000);
}
#endif

template <bool kStream>
MEDBRIDGE_KERNEL void store(Floats values, float* to) {
#if MEDBRIDGE_LANES == 16
  if (kStream) return _mm512_stream_ps(to, reinterpret_cast<__m512>(values));
#elif MEDBRIDGE_LANES == 8
  if (kStream) return _mm256_stream_ps(to, reinterpret_cast<__m256>(values));
#endif
  std::memcpy(to, &values, sizeof values);
}

template <bool kStream>
MEDBRIDGE_KERNEL void store_halves(Halves halves, void* to) {
#if MEDBRIDGE_LANES == 16
  if (kStream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(halves));
#elif MEDBRIDGE_LANES == 8
  if (kStream) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(halves));
#endif
  std::memcpy(to, &halves, sizeof halves);
}

// The low halves of the lanes, which fit in 16 bits.
MEDBRIDGE_KERNEL Halves narrowed(Bits bits) {
#if MEDBRIDGE_LANES == 16
  return reinterpret_cast<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(bits)));
#elif MEDBRIDGE_LANES == 8
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(bits), reinterpret_cast<__m256i>(bits));
  return reinterpret_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(bits, Halves);
#endif
}

template <bool kStream>
MEDBRIDGE_KERNEL void store(Floats values, BFloat16* to) {
  store_halves<kStream>(narrowed(rounded(values, BFloat16{})), to);
}

template <bool kStream>
MEDBRIDGE_KERNEL void store(Floats values, Float16* to) {
#if MEDBRIDGE_LANES == 16
  store_halves<kStream>(reinterpret_cast<Halves>(_mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(values), 0)), to);
#elif MEDBRIDGE_LANES == 8
  store_halves<kStream>(reinterpret_cast<Halves>(_mm256_cvtps_ph(reinterpret_cast<__m256>(values), 0)), to);
#else
  store_halves<kStream>(narrowed(rounded(values, Float16{})), to);
#endif
}

// Fewer than a whole vector; the other lanes hold -inf, which adds nothing.
template <class Element>
MEDBRIDGE_KERNEL Floats load_some(const Element* from, std::int64_t count) {
  Element padded[kLanes];
  for (std::int64_t i = 0; i < kLanes; ++i) padded[i] = negative_infinity(Element{});
  std::memcpy(padded, from, static_cast<std::size_t>(count) * sizeof(Element));
  return load(padded);
}

template <class Element>
MEDBRIDGE_KERNEL void store_some(Floats values, Element* to, std::int64_t count) {
  Element padded[kLanes];
  store<false>(values, padded);
  std::memcpy(to, padded, static_cast<std::size_t>(count) * sizeof(Element));
}

template <class Element>
MEDBRIDGE_KERNEL double value_of(const Element* from) {
  return load_some(from, 1)[0];
}

// --- The exponential ---

// exp(d / temperature) = 2^(d high) 2^(d low), high + low = log2(e) / temperature.
struct Scale {
  Floats high;
  Floats low;    // at most 6e-8 of high
  Floats least;  // d of which the exponential is 0
};

MEDBRIDGE_KERNEL Scale scale_of(double temperature) {
  const double c = kLog2e / temperature;
  const float high = static_cast<float>(c);
  // 2^-127 has an exponent field of 0: below the normal numbers the exponential is 0, without slow denormal numbers.
  return {splat(high), splat(static_cast<float>(c - high)), splat(static_cast<float>(-127.0 / c))};
}

// exp(d / temperature) = (1 + rest) power for d from scale.least up: `power` is a power of two or 0, `rest` between -0.3
// and 0.42. For d = 0 they are exactly 1 and 0; NaN stays NaN. Vectors side by side keep the machine busy while each waits
// for its own last product.
template <class Accuracy, int kCount>
MEDBRIDGE_KERNEL void split_exponential(const Floats (&d)[kCount], const Scale& scale, Floats (&rest)[kCount],
                                        Floats (&power)[kCount]) {
  constexpr float kWhole = 0x1.8p23F;  // a sum with it has no fraction left
  Floats shifted[kCount];
  Floats r[kCount];
  for (int i = 0; i < kCount; ++i) shifted[i] = d[i] * scale.high + kWhole;
  for (int i = 0; i < kCount; ++i) r[i] = d[i] * scale.high - (shifted[i] - kWhole);
  for (int i = 0; Accuracy::kWithLow && i < kCount; ++i) r[i] += d[i] * scale.low;
  for (int i = 0; i < kCount; ++i) rest[i] = splat(Accuracy::kFactors[0]);
  for (std::size_t k = 1; k < std::size(Accuracy::kFactors); ++k) {
    for (int i = 0; i < kCount; ++i) rest[i] = rest[i] * r[i] + Accuracy::kFactors[k];
  }
  for (int i = 0; i < kCount; ++i) rest[i] *= r[i];
  // The low bits of `shifted` are the exponent; the others are shifted out.
  for (int i = 0; i < kCount; ++i) power[i] = as_floats((as_bits(shifted[i]) << 23) + (127u << 23));
}

template <class Accuracy, int kCount>
MEDBRIDGE_KERNEL void exponential(const Floats (&d)[kCount], const Scale& scale, Floats (&e)[kCount]) {
  Floats power[kCount];
  split_exponential<Accuracy>(d, scale, e, power);
  for (int i = 0; i < kCount; ++i) e[i] = (e[i] + 1.0F) * power[i];
}

// --- Forward ---

// Kahan's sum, total - excess: the many small terms beside a large one aren't lost.
struct Sum {
  Floats total;
  Floats excess;
};

MEDBRIDGE_KERNEL void add(Sum& sum, Floats value) {
  const Floats missing = value - sum.excess;
  const Floats total = sum.total + missing;
  sum.excess = (total - sum.total) - missing;
  sum.total = total;
}

// By factor + factor_low.
MEDBRIDGE_KERNEL void multiply(Sum& sum, Floats factor, Floats factor_low) {
  const Floats total = sum.total * factor;
  // Where operations are fused, this is the rounding error of the total.
  const Floats error = sum.total * factor - total;
  sum.excess = sum.excess * factor - (sum.total * factor_low + error);
  sum.total = total;
}

MEDBRIDGE_KERNEL double total_of(const Sum& sum) {
  double total = 0.0;
  for (std::int64_t lane = 0; lane < kLanes; ++lane) total += static_cast<double>(sum.total[lane]) - sum.excess[lane];
  return total;
}

// Per lane: the largest logit so far (or the lowest number), and of exp((x - most) / temperature) the sum and the sum times
// x - most.
struct Running {
  Floats most;
  Sum sum;
  Sum weighted;
};

MEDBRIDGE_KERNEL void raise(Running& running, Floats most, const Scale& scale) {
  const Floats d[1] = {larger(scale.least, running.most - most)};
  Floats rest[1];
  Floats power[1];
  split_exponential<ForRescaling>(d, scale, rest, power);
  // Where logits ascend by equal steps this factor comes again and again: its rounding error would build up.
  const Floats rounded_sum = rest[0] + 1.0F;
  const Floats low = rest[0] - (rounded_sum - 1.0F);
  running.weighted.total += running.sum.total * d[0];
  running.weighted.excess += running.sum.excess * d[0];
  multiply(running.weighted, rounded_sum * power[0], low * power[0]);
  multiply(running.sum, rounded_sum * power[0], low * power[0]);
  running.most = most;
}

template <int kCount>
MEDBRIDGE_KERNEL void take_in(Running& running, const Floats (&x)[kCount], const Scale& scale) {
  Floats most = running.most;
  for (int i = 0; i < kCount; ++i) most = larger(x[i], most);
  if (any_above(most, running.most)) raise(running, most, scale);
  Floats sum = {};
  Floats weighted = {};
  Floats d[kCount];
  Floats e[kCount];
  for (int i = 0; i < kCount; ++i) d[i] = larger(scale.least, x[i] - running.most);
  exponential<ForSums>(d, scale, e);
  for (int i = 0; i < kCount; ++i) sum += e[i];
  for (int i = 0; i < kCount; ++i) weighted += e[i] * d[i];
  add(running.sum, sum);
  add(running.weighted, weighted);
}

template <class Element>
MEDBRIDGE_KERNEL Running run_over(const Element* row, std::int64_t vocab, const Scale& scale) {
  Running running = {splat(-std::numeric_limits<float>::max()), {}, {}};
  std::int64_t j = 0;
  for (; j + kVectors * kLanes <= vocab; j += kVectors * kLanes) {
    Floats x[kVectors];
    for (std::int64_t i = 0; i < kVectors; ++i) x[i] = load(row + j + i * kLanes);
    take_in(running, x, scale);
  }
  for (; j < vocab; j += kLanes) {
    const Floats x[1] = {j + kLanes <= vocab ? load(row + j) : load_some(row + j, vocab - j)};
    take_in(running, x, scale);
  }
  return running;
}

template <class Element>
MEDBRIDGE_TARGET void sweep_row(const Rows& rows, const SweepOutputs& out, std::int64_t t) {
  const Element* row = static_cast<const Element*>(rows.logits.data) + t * rows.logits.stride;
  const double temperature = rows.temperature_of(t);
  const Scale scale = scale_of(temperature);
  Running running = run_over(row, rows.logits.vocab, scale);
  float most = running.most[0];
  for (std::int64_t lane = 1; lane < kLanes; ++lane) most = std::max(most, static_cast<float>(running.most[lane]));
  raise(running, splat(most), scale);
  const double sum = total_of(running.sum);
  const double weighted = total_of(running.weighted);
  const bool defined = sum > 0.0 && is_usable(temperature);  // a sum of 0: nothing but -inf
  const double log_sum = defined ? std::log(std::max(sum, 1.0)) : kNaN;  // below 1 by rounding only: the largest adds 1
  const std::int64_t token = rows.token_ids[t];
  const bool known = token >= 0 && token < rows.logits.vocab;
  const double above = known ? value_of(row + token) - most : kNaN;
  out.logprobs[t] = static_cast<float>(above / temperature - log_sum);
  out.lse[t] = most / temperature + log_sum;
  if (out.entropy != nullptr) out.entropy[t] = static_cast<float>(log_sum - weighted / temperature / sum);
}

// --- Backward ---

// gradient_j = e (level + slope d), d = x_j - origin, e = exp(d / temperature).
struct Line {
  Scale scale;
  Floats origin;
  Floats level;
  Floats slope;
};

template <class Accuracy, bool kSloped, int kCount>
MEDBRIDGE_KERNEL void gradient_of(const Floats (&x)[kCount], const Line& line, Floats (&gradient)[kCount]) {
  Floats d[kCount];
  for (int i = 0; i < kCount; ++i) d[i] = larger(line.scale.least, x[i] - line.origin);
  exponential<Accuracy>(d, line.scale, gradient);
  for (int i = 0; i < kCount; ++i) gradient[i] *= kSloped ? line.slope * d[i] + line.level : line.level;
}

template <class Element, bool kSloped>
MEDBRIDGE_KERNEL void write_some(const Element* from, std::int64_t count, const Line& line, Element* to) {
  const Floats x[1] = {load_some(from, count)};
  Floats gradient[1];
  gradient_of<ForGradients<Element>, kSloped>(x, line, gradient);
  store_some(gradient[0], to, count);
}

template <class Element, bool kSloped, bool kStream>
MEDBRIDGE_KERNEL void write_row(const Element* row, std::int64_t vocab, const Line& line, Element* out) {
  std::int64_t j = 0;
  if (kStream) {  // up to the first whole vector that is aligned
    const auto past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out) / sizeof(Element)) % kLanes;
    j = std::min(vocab, (kLanes - past) % kLanes);
    if (j > 0) write_some<Element, kSloped>(row, j, line, out);
  }
  for (; j + kVectors * kLanes <= vocab; j += kVectors * kLanes) {
    Floats x[kVectors];
    Floats gradient[kVectors];
    for (std::int64_t i = 0; i < kVectors; ++i) x[i] = load(row + j + i * kLanes);
    gradient_of<ForGradients<Element>, kSloped>(x, line, gradient);
    for (std::int64_t i = 0; i < kVectors; ++i) store<kStream>(gradient[i], out + j + i * kLanes);
  }
  for (; j < vocab; j += kLanes) {
    write_some<Element, kSloped>(row + j, std::min(kLanes, vocab - j), line, out + j);
  }
}

template <class Element>
MEDBRIDGE_TARGET void write_row(const Element* row, std::int64_t vocab, const Line& line, bool sloped, bool streams,
                                Element* out) {
  if (streams) {
    sloped ? write_row<Element, true, true>(row, vocab, line, out)
           : write_row<Element, false, true>(row, vocab, line, out);
    finish_streaming();
  } else {
    sloped ? write_row<Element, true, false>(row, vocab, line, out)
           : write_row<Element, false, false>(row, vocab, line, out);
  }
}

template <class Element>
MEDBRIDGE_TARGET void backward_row(const Rows& rows, const Gradients& gradients, bool streams, std::int64_t t) {
  const std::int64_t vocab = rows.logits.vocab;
  const Element* row = static_cast<const Element*>(rows.logits.data) + t * rows.logits.stride;
  Element* out = static_cast<Element*>(gradients.out) + t * gradients.stride;
  const double g = gradients.by_logprob[t];
  const double h = gradients.by_entropy == nullptr ? 0.0 : gradients.by_entropy[t];
  const double temperature = is_usable(rows.temperature_of(t)) ? rows.temperature_of(t) : kNaN;
  const double lse = gradients.lse[t];
  const double entropy = h == 0.0 ? 0.0 : gradients.entropy[t];
  // log p_j = d / temperature + rest: the factor exp(rest) goes into level and slope.
  const auto origin = static_cast<float>(lse * temperature);
  const double rest = (origin - lse * temperature) / temperature;
  const double factor = -std::exp(rest) / temperature;
  const Line line = {scale_of(temperature), splat(origin), splat(static_cast<float>(factor * (g + h * (rest + entropy)))),
                     splat(static_cast<float>(factor * h / temperature))};
  // The label's own gradient, a difference of two numbers that may be nearly equal, is computed apart; and its logit read
  // before it may be overwritten.
  const std::int64_t token = rows.token_ids[t];
  const bool known = token >= 0 && token < vocab;
  const double logprob = known ? value_of(row + token) / temperature - lse : 0.0;
  write_row(row, vocab, line, h != 0.0, streams, out);
  if (known) {
    const double p = std::exp(logprob);
    const double by_entropy = p == 0.0 ? 0.0 : p * h * (logprob + entropy);
    const double gradient = (-std::expm1(logprob) * g - by_entropy) / temperature;
    store_some(splat(static_cast<float>(gradient)), out + token, 1);
  }
}

// --- Rows ---

template <class Element>
MEDBRIDGE_TARGET void sweep_rows_of(const Rows& rows, const SweepOutputs& out, std::int64_t first, std::int64_t last) {
  for (std::int64_t t = first; t < last; ++t) {
    if (rows.keeps(t)) {
      sweep_row<Element>(rows, out, t);
    } else {
      out.logprobs[t] = 0.0F;
      out.lse[t] = 0.0;
      if (out.entropy != nullptr) out.entropy[t] = 0.0F;
    }
  }
}

template <class Element>
MEDBRIDGE_TARGET void backward_rows_of(const Rows& rows, const Gradients& gradients, bool streams, std::int64_t first,
                                       std::int64_t last) {
  for (std::int64_t t = first; t < last; ++t) {
    const bool by_entropy = gradients.by_entropy != nullptr && gradients.by_entropy[t] != 0.0F;
    const bool flat = gradients.by_logprob[t] == 0.0F && !by_entropy;
    if (rows.keeps(t) && !flat) {
      backward_row<Element>(rows, gradients, streams, t);
    } else {
      Element* out = static_cast<Element*>(gradients.out) + t * gradients.stride;
      std::memset(static_cast<void*>(out), 0, static_cast<std::size_t>(rows.logits.vocab) * sizeof(Element));
    }
  }
}

MEDBRIDGE_TARGET void sweep_rows(const Rows& rows, const SweepOutputs& out, std::int64_t first, std::int64_t last) {
  if (rows.logits.type == LogitType::kFloat32) return sweep_rows_of<float>(rows, out, first, last);
  if (rows.logits.type == LogitType::kBFloat16) return sweep_rows_of<BFloat16>(rows, out, first, last);
  sweep_rows_of<Float16>(rows, out, first, last);
}

MEDBRIDGE_TARGET void backward_rows(const Rows& rows, const Gradients& gradients, bool streams, std::int64_t first,
                                    std::int64_t last) {
  if (rows.logits.type == LogitType::kFloat32) return backward_rows_of<float>(rows, gradients, streams, first, last);
  if (rows.logits.type == LogitType::kBFloat16) return backward_rows_of<BFloat16>(rows, gradients, streams, first, last);
  backward_rows_of<Float16>(rows, gradients, streams, first, last);
}

}  // namespace MEDBRIDGE_SET
}  // namespace
}  // namespace medbridge

#undef MEDBRIDGE_KERNEL
#undef MEDBRIDGE_SET
#undef MEDBRIDGE_TARGET
#undef MEDBRIDGE_LANES
