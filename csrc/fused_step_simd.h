// Loop bodies shared by the SIMD levels; each level's file includes this after defining its `Simd` type.
//
// Included inside no namespace, after the level's target pragma: every template here takes `Simd`, a type of the
// including file's own anonymous namespace, so no two levels ever share an instantiation.
#pragma once

#include "fused_step_kernels.h"

namespace shallowfusion {

template <class Simd, Dtype dtype>
struct Loader;

template <class Simd>
struct Loader<Simd, Dtype::float32> {
  using Element = float;
  static typename Simd::Vector load(const float* from) { return Simd::load(from); }
};

template <class Simd>
struct Loader<Simd, Dtype::float16> {
  using Element = uint16_t;
  static typename Simd::Vector load(const uint16_t* from) { return Simd::load_half(from); }
};

template <class Simd>
struct Loader<Simd, Dtype::bfloat16> {
  using Element = uint16_t;
  static typename Simd::Vector load(const uint16_t* from) { return Simd::load_bfloat(from); }
};

// Sum of 2^y in two accumulators, running maximum and weighted sum of y, whichever `work` asks for.
template <class Simd, Dtype dtype, unsigned work>
SourceResult source_block(const SourceArguments& arguments) {
  using Load = Loader<Simd, dtype>;
  using Vector = typename Simd::Vector;
  const auto* logits = static_cast<const typename Load::Element*>(arguments.logits);
  const Vector scale = Simd::broadcast(arguments.scale);
  const Vector offset = Simd::broadcast(arguments.offset);
  const Vector weight = Simd::broadcast(arguments.weight);
  const Vector impossible = Simd::broadcast(kImpossible);
  float* combined = arguments.combined;
  Vector sums[2] = {Simd::broadcast(0.0f), Simd::broadcast(0.0f)};
  Vector largest[2] = {impossible, impossible};
  const auto step = [&](int64_t at, Vector& sum, Vector& most) __attribute__((always_inline)) {
    if constexpr ((work & kSum) != 0) Simd::prefetch(logits + at);
    const Vector x = Load::load(logits + at);
    const Vector y = Simd::multiply_add(x, scale, offset);
    if constexpr ((work & kLargest) != 0) most = Simd::larger(x, most);
    if constexpr ((work & kCombine) != 0) {
      Vector c = y;
      if constexpr ((work & kFirst) == 0) {
        c = Simd::multiply_add(y, weight, Simd::load(combined + at));
      } else if constexpr ((work & kUnit) == 0) {
        c = Simd::multiply(y, weight);
      }
      if constexpr ((work & kNegative) != 0) c = Simd::impossible_where_impossible(c, x);
      Simd::store(combined + at, c);
    }
    if constexpr ((work & kSum) != 0) sum = Simd::add_exp2(y, sum);
  };
  const int64_t count = arguments.count;
  int64_t at = 0;
  for (; at + 2 * Simd::lanes <= count; at += 2 * Simd::lanes) {
    step(at, sums[0], largest[0]);
    step(at + Simd::lanes, sums[1], largest[1]);
  }
  if (at < count) step(at, sums[0], largest[0]);
  return {Simd::sum(Simd::add(sums[0], sums[1])), Simd::largest(Simd::larger(largest[0], largest[1]))};
}

// Group maxima of combined (+ bias), and the sum of 2^combined before or after the bias.
template <class Simd, SumOf sum_of, bool biased>
float finish(const FinishArguments& arguments) {
  using Vector = typename Simd::Vector;
  const Vector log2_e = Simd::broadcast(static_cast<float>(kLog2E));
  Vector sum = Simd::broadcast(0.0f);
  float* maxima = arguments.group_maxima;
  for (int64_t start = 0; start < arguments.count; start += kGroupSpan) {
    const int64_t stop = start + kGroupSpan < arguments.count ? start + kGroupSpan : arguments.count;
    Vector largest = Simd::broadcast(kImpossible);
    for (int64_t at = start; at < stop; at += Simd::lanes) {
      Vector c = Simd::load(arguments.combined + at);
      if constexpr (sum_of == SumOf::before_bias) sum = Simd::add_exp2(c, sum);
      if constexpr (biased) c = Simd::multiply_add(Simd::load(arguments.bias + at), log2_e, c);
      if constexpr (sum_of == SumOf::after_bias) sum = Simd::add_exp2(c, sum);
      largest = Simd::larger(c, largest);
    }
    Simd::store(maxima, largest);
    maxima += Simd::lanes;
  }
  return Simd::sum(sum);
}

template <class Simd, SumOf sum_of>
float finish_block(const FinishArguments& arguments) {
  return arguments.bias == nullptr ? finish<Simd, sum_of, false>(arguments) : finish<Simd, sum_of, true>(arguments);
}

// Two sources and the end of the block in one loop: no fused score goes through memory.
template <class Simd, Dtype dtype, bool with_largest, SumOf sum_of, bool biased>
PairResult pair(const PairArguments& arguments) {
  using Load = Loader<Simd, dtype>;
  using Vector = typename Simd::Vector;
  const auto* first = static_cast<const typename Load::Element*>(arguments.first);
  const auto* second = static_cast<const typename Load::Element*>(arguments.second);
  const Vector first_scale = Simd::broadcast(arguments.first_scale);
  const Vector first_offset = Simd::broadcast(arguments.first_offset);
  const Vector second_scale = Simd::broadcast(arguments.second_scale);
  const Vector second_offset = Simd::broadcast(arguments.second_offset);
  const Vector weight = Simd::broadcast(arguments.weight);
  const Vector log2_e = Simd::broadcast(static_cast<float>(kLog2E));
  const Vector zero = Simd::broadcast(0.0f);
  const Vector impossible = Simd::broadcast(kImpossible);
  const float* bias = arguments.bias;
  float* maxima = arguments.group_maxima;
  Vector first_sum = zero;
  Vector second_sum = zero;
  Vector sum = zero;
  Vector largest = impossible;
  const int64_t count = arguments.count;
  for (int64_t start = 0; start < count; start += kGroupSpan) {
    const int64_t stop = start + kGroupSpan < count ? start + kGroupSpan : count;
    Vector group = impossible;
    for (int64_t at = start; at < stop; at += Simd::lanes) {
      Simd::prefetch(first + at);
      Simd::prefetch(second + at);
      const Vector x = Load::load(second + at);
      const Vector y = Simd::multiply_add(Load::load(first + at), first_scale, first_offset);
      const Vector z = Simd::multiply_add(x, second_scale, second_offset);
      if constexpr (with_largest) largest = Simd::larger(x, largest);
      first_sum = Simd::add_exp2(y, first_sum);
      second_sum = Simd::add_exp2(z, second_sum);
      Vector c = Simd::multiply_add(z, weight, y);
      if constexpr (sum_of == SumOf::before_bias) sum = Simd::add_exp2(c, sum);
      if constexpr (biased) c = Simd::multiply_add(Simd::load(bias + at), log2_e, c);
      if constexpr (sum_of == SumOf::after_bias) sum = Simd::add_exp2(c, sum);
      group = Simd::larger(c, group);
    }
    Simd::store(maxima, group);
    maxima += Simd::lanes;
  }
  return {Simd::sum(first_sum), Simd::sum(second_sum), Simd::sum(sum), Simd::largest(largest)};
}

template <class Simd, Dtype dtype, bool with_largest, SumOf sum_of>
PairResult pair_block(const PairArguments& arguments) {
  return arguments.bias == nullptr ? pair<Simd, dtype, with_largest, sum_of, false>(arguments)
                                   : pair<Simd, dtype, with_largest, sum_of, true>(arguments);
}

template <class Simd, Dtype dtype>
StatisticsResult statistics_block(const StatisticsArguments& arguments) {
  using Load = Loader<Simd, dtype>;
  using Vector = typename Simd::Vector;
  const auto* logits = static_cast<const typename Load::Element*>(arguments.logits);
  const Vector scale = Simd::broadcast(arguments.scale);
  const Vector offset = Simd::broadcast(arguments.offset);
  const Vector tiny = Simd::broadcast(-126.0f);  // keeps 2^y * y away from 0 * -inf
  Vector sum = Simd::broadcast(0.0f);
  Vector weighted = sum;
  Vector first = Simd::broadcast(kImpossible);
  Vector second = first;
  for (int64_t at = 0; at < arguments.count; at += Simd::lanes) {
    Simd::prefetch(logits + at);
    const Vector x = Load::load(logits + at);
    const Vector y = Simd::larger(tiny, Simd::multiply_add(x, scale, offset));
    const Vector probability = Simd::add_exp2(y, Simd::broadcast(0.0f));
    sum = Simd::add(sum, probability);
    weighted = Simd::multiply_add(probability, y, weighted);
    second = Simd::larger(second, Simd::smaller(first, x));
    first = Simd::larger(x, first);
  }
  float firsts[kMaxLanes];
  float seconds[kMaxLanes];
  Simd::store(firsts, first);
  Simd::store(seconds, second);
  StatisticsResult result{Simd::sum(sum), Simd::sum(weighted), kImpossible, kImpossible};
  const auto take = [&result](float value) {
    if (value > result.largest) {
      result.second = result.largest;
      result.largest = value;
    } else if (value > result.second) {
      result.second = value;
    }
  };
  for (int lane = 0; lane < Simd::lanes; ++lane) {
    take(firsts[lane]);
    take(seconds[lane]);
  }
  return result;
}

template <class Simd, Dtype dtype>
void convert_block(const void* source, int64_t count, float subtract, float* out) {
  using Load = Loader<Simd, dtype>;
  using Element = typename Load::Element;
  const auto* logits = static_cast<const Element*>(source);
  const typename Simd::Vector shift = Simd::broadcast(-subtract);
  int64_t at = 0;
  for (; at + Simd::lanes <= count; at += Simd::lanes) {
    Simd::store(out + at, Simd::add(Load::load(logits + at), shift));
  }
  if (at == count) return;
  Element last[kMaxLanes] = {};
  for (int64_t lane = 0; lane < count - at; ++lane) last[lane] = logits[at + lane];
  Simd::store(out + at, Simd::add(Load::load(last), shift));
  for (int64_t lane = count - at; lane < Simd::lanes; ++lane) out[at + lane] = kImpossible;
}

template <class Simd, Dtype dtype>
float exp2_block(const void* source, int64_t count, float subtract, float scale, float* out) {
  using Load = Loader<Simd, dtype>;
  using Vector = typename Simd::Vector;
  const auto* logits = static_cast<const typename Load::Element*>(source);
  const Vector zero = Simd::broadcast(0.0f);
  const Vector shift = Simd::broadcast(-subtract);
  const Vector factor = Simd::broadcast(scale);
  const int64_t whole = count / Simd::lanes * Simd::lanes;
  Vector sum = zero;
  for (int64_t at = 0; at < whole; at += Simd::lanes) {
    Simd::prefetch(logits + at);
    const Vector power = Simd::add_exp2(Simd::multiply(Simd::add(Load::load(logits + at), shift), factor), zero);
    Simd::store(out + at, power);
    sum = Simd::add(sum, power);
  }
  float total = Simd::sum(sum);
  if (whole == count) return total;
  float last[kMaxLanes];
  convert_block<Simd, dtype>(logits + whole, count - whole, subtract, last);
  Simd::store(out + whole, Simd::add_exp2(Simd::multiply(Simd::load(last), factor), zero));
  for (int64_t at = whole; at < count; ++at) total += out[at];
  for (int64_t at = count; at < whole + Simd::lanes; ++at) out[at] = 0.0f;
  return total;
}

template <class Simd>
void mask_block(const int32_t* words, int64_t num_words, int64_t first_bit, int64_t count, const float* bias,
                float* out) {
  const auto bits_at = [words, num_words](int64_t bit) {
    const int64_t word = bit / 32;
    uint64_t bits = word < num_words ? static_cast<uint32_t>(words[word]) : 0u;
    if (word + 1 < num_words) bits |= static_cast<uint64_t>(static_cast<uint32_t>(words[word + 1])) << 32;
    return static_cast<uint32_t>(bits >> (bit % 32));
  };
  const typename Simd::Vector zero = Simd::broadcast(0.0f);
  int64_t at = 0;
  for (; at + Simd::lanes <= count; at += Simd::lanes) {
    const typename Simd::Vector value = bias == nullptr ? zero : Simd::load(bias + at);
    Simd::store(out + at, Simd::impossible_unless(bits_at(first_bit + at), value));
  }
  for (; at < count; ++at) {
    out[at] = (bits_at(first_bit + at) & 1u) == 0 ? kImpossible : bias == nullptr ? 0.0f : bias[at];
  }
}

template <class Simd>
int64_t collect_above(const FinishArguments& block, float threshold, int32_t* offsets) {
  const typename Simd::Vector log2_e = Simd::broadcast(static_cast<float>(kLog2E));
  const typename Simd::Vector bar = Simd::broadcast(threshold);
  int64_t found = 0;
  for (int64_t at = 0; at < block.count; at += Simd::lanes) {
    typename Simd::Vector c = Simd::load(block.combined + at);
    if (block.bias != nullptr) c = Simd::multiply_add(Simd::load(block.bias + at), log2_e, c);
    for (uint32_t bits = Simd::at_least(c, bar); bits != 0; bits &= bits - 1) {
      offsets[found++] = static_cast<int32_t>(at) + __builtin_ctz(bits);
    }
  }
  return found;
}

// log2 of z in [1, 8]: exponent, then 2 atanh((m - 1) / (m + 1)) with m within [sqrt(1/2), sqrt(2)].
template <class Simd>
typename Simd::Vector log2_of(typename Simd::Vector z) {
  using Vector = typename Simd::Vector;
  const auto [exponent, mantissa] = Simd::split_near_one(z);
  const Vector one = Simd::broadcast(1.0f);
  const Vector ratio = Simd::divide(Simd::add(mantissa, Simd::broadcast(-1.0f)), Simd::add(mantissa, one));
  const Vector square = Simd::multiply(ratio, ratio);
  Vector series = Simd::broadcast(static_cast<float>(2.0 * kLog2E / 9.0));
  for (const double odd : {7.0, 5.0, 3.0, 1.0}) {
    series = Simd::multiply_add(series, square, Simd::broadcast(static_cast<float>(2.0 * kLog2E / odd)));
  }
  return Simd::multiply_add(series, ratio, exponent);
}

template <class Simd>
void mix_block(const float* const* values, int num_sources, int64_t count, float* out) {
  using Vector = typename Simd::Vector;
  for (int64_t at = 0; at < count; at += Simd::lanes) {
    Vector largest = Simd::load(values[0] + at);
    for (int source = 1; source < num_sources; ++source) {
      largest = Simd::larger(largest, Simd::load(values[source] + at));
    }
    const Vector reference = Simd::larger(largest, Simd::broadcast(-3e38f));  // -inf - -inf would be NaN
    const Vector minus = Simd::multiply(reference, Simd::broadcast(-1.0f));
    Vector sum = Simd::broadcast(0.0f);
    for (int source = 0; source < num_sources; ++source) {
      sum = Simd::add_exp2(Simd::add(Simd::load(values[source] + at), minus), sum);
    }
    sum = Simd::larger(sum, Simd::broadcast(1.0f));
    Simd::store(out + at, Simd::add(log2_of<Simd>(sum), largest));
  }
}

template <class Simd, Dtype dtype>
bool any_broken(const void* source, int64_t count) {
  using Load = Loader<Simd, dtype>;
  const auto* logits = static_cast<const typename Load::Element*>(source);
  uint32_t broken = 0;
  int64_t at = 0;
  for (; at + Simd::lanes <= count; at += Simd::lanes) broken |= Simd::not_below_infinity(Load::load(logits + at));
  float last[kMaxLanes];
  if (at < count) {
    convert_block<Simd, dtype>(logits + at, count - at, 0.0f, last);
    broken |= Simd::not_below_infinity(Simd::load(last));
  }
  return broken != 0;
}

template <class Simd>
bool any_nonzero(const float* values, int64_t count) {
  uint32_t bits = 0;
  for (int64_t at = 0; at < count; ++at) {
    uint32_t word;
    __builtin_memcpy(&word, values + at, sizeof(word));
    bits |= word;
  }
  return bits != 0;
}

}  // namespace shallowfusion

#include "frame_attention_simd.h"

namespace shallowfusion {

// Combinations no caller asks for stay null, which keeps the library small.
constexpr bool is_used(unsigned work) {
  if (work == 0) return false;
  if ((work & kCombine) == 0) return (work & (kFirst | kUnit | kNegative)) == 0;
  return (work & kUnit) == 0 || ((work & kFirst) != 0 && (work & kNegative) == 0);
}

template <class Simd, Dtype dtype, unsigned work>
void fill_source_blocks(Kernels& kernels) {
  if constexpr (work < kSourceVariants) {
    if constexpr (is_used(work)) kernels.source_block[static_cast<int>(dtype)][work] = &source_block<Simd, dtype, work>;
    fill_source_blocks<Simd, dtype, work + 1>(kernels);
  }
}

template <class Simd, Dtype dtype, SumOf sum_of>
void fill_pair(Kernels& kernels) {
  auto& pairs = kernels.pair_block[static_cast<int>(dtype)];
  pairs[0][static_cast<int>(sum_of)] = &pair_block<Simd, dtype, false, sum_of>;
  pairs[1][static_cast<int>(sum_of)] = &pair_block<Simd, dtype, true, sum_of>;
}

template <class Simd, Dtype dtype>
void fill_dtype(Kernels& kernels) {
  const int code = static_cast<int>(dtype);
  fill_source_blocks<Simd, dtype, 0>(kernels);
  fill_pair<Simd, dtype, SumOf::nothing>(kernels);
  fill_pair<Simd, dtype, SumOf::before_bias>(kernels);
  fill_pair<Simd, dtype, SumOf::after_bias>(kernels);
  kernels.statistics_block[code] = &statistics_block<Simd, dtype>;
  kernels.convert_block[code] = &convert_block<Simd, dtype>;
  kernels.any_broken[code] = &any_broken<Simd, dtype>;
  kernels.exp2_block[code] = &exp2_block<Simd, dtype>;
  fill_frame_dtype<Simd, dtype>(kernels);
}

template <class Simd>
Kernels make_kernels(const char* name, float offset_limit) {
  Kernels kernels{};
  kernels.name = name;
  kernels.lanes = Simd::lanes;
  kernels.offset_limit = offset_limit;
  fill_dtype<Simd, Dtype::float32>(kernels);
  fill_dtype<Simd, Dtype::float16>(kernels);
  fill_dtype<Simd, Dtype::bfloat16>(kernels);
  kernels.finish_block[static_cast<int>(SumOf::nothing)] = &finish_block<Simd, SumOf::nothing>;
  kernels.finish_block[static_cast<int>(SumOf::before_bias)] = &finish_block<Simd, SumOf::before_bias>;
  kernels.finish_block[static_cast<int>(SumOf::after_bias)] = &finish_block<Simd, SumOf::after_bias>;
  kernels.mask_block = &mask_block<Simd>;
  kernels.collect_above = &collect_above<Simd>;
  kernels.mix_block = &mix_block<Simd>;
  kernels.any_nonzero = &any_nonzero<Simd>;
  kernels.frame_shares = &frame_shares<Simd>;
  return kernels;
}

}  // namespace shallowfusion
