// Range log-sum-exp: every probability of a row once, put in order, with sums of 64 and of 2,048 places above them.
#include "range_lse.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "float_mode.h"
#include "half.h"
#include "thread_pool.h"

namespace shallowfusion {
namespace {

constexpr int64_t kSpan = 64;            // places behind a block sum
constexpr int64_t kSuperspan = 64 * 32;  // places behind a sum of block sums
constexpr int64_t kFewTokens = 512;      // up to which one exponential each is cheaper than a whole row's
constexpr double kTooSmall = 0x1p-60;    // of the row's largest probability: float32 no longer holds its parts well
constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();

double logit_at(const char* logits, Dtype dtype, int64_t token) {
  if (dtype == Dtype::float32) return reinterpret_cast<const float*>(logits)[token];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(logits)[token];
  return dtype == Dtype::float16 ? half_to_float(bits) : bfloat_to_float(bits);
}

double sum_of(const float* values, int64_t count) {
  float lanes[8] = {};
  int64_t at = 0;
  for (; at + 8 <= count; at += 8) {
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += values[at + lane];
  }
  double total = 0.0;
  for (; at < count; ++at) total += values[at];
  for (const float lane : lanes) total += lane;
  return total;
}

double sum_of(const double* values, int64_t count) {
  const double* const end = values + count;
  double total = 0.0;
  while (values < end) total += *values++;
  return total;
}

// One row of the call and what is worked out for it.
class Row {
 public:
  Row(const RangeArguments& arguments, const Kernels& kernels, int64_t row)
      : arguments_(arguments),
        kernels_(kernels),
        logits_(arguments.logits + row * arguments.row_stride * item_size(arguments.dtype)) {}

  // Log-sum-exp of the whole row, and the probabilities of all tokens relative to the largest.
  double sum_all() {
    const int dtype = static_cast<int>(arguments_.dtype);
    const int64_t vocab = arguments_.vocab;
    powers_.resize(static_cast<size_t>(round_up(vocab, kMaxLanes)));
    if (kernels_.any_broken[dtype](logits_, vocab)) return kNothing;
    largest_ = largest_logit();
    if (largest_ == kImpossible) return kImpossible;
    const auto scale = static_cast<float>(kLog2E / arguments_.temperature);
    double sum = 0.0;
    for (int64_t token = 0; token < vocab; token += kBlock) {
      const int64_t count = std::min(kBlock, vocab - token);
      const char* from = logits_ + token * item_size(arguments_.dtype);
      sum += kernels_.exp2_block[dtype](from, count, largest_, scale, powers_.data() + token);
    }
    return std::log(sum) + largest_ / arguments_.temperature;
  }

  // Puts the probabilities in order and sums blocks of them, if the ranges together hold more than that costs.
  void build(int64_t tokens_in_ranges) {
    built_ = tokens_in_ranges > arguments_.vocab;
    if (!built_) return;
    const int64_t vocab = arguments_.vocab;
    if (arguments_.order == nullptr) {
      ordered_.assign(powers_.begin(), powers_.begin() + vocab);
    } else {
      ordered_.resize(static_cast<size_t>(vocab));
      for (int64_t place = 0; place < vocab; ++place) ordered_[place] = powers_[arguments_.order[place]];
    }
    blocks_.clear();
    for (int64_t at = 0; at + kSpan <= vocab; at += kSpan) blocks_.push_back(sum_of(ordered_.data() + at, kSpan));
    superblocks_.clear();
    constexpr int64_t per = kSuperspan / kSpan;
    for (size_t at = 0; at + per <= blocks_.size(); at += per) superblocks_.push_back(sum_of(blocks_.data() + at, per));
  }

  // Log of the sum over a range after sum_all and build.
  double log_sum(int64_t first, int64_t last) const {
    const double sum = built_ ? built_sum(first, last) : gathered_sum(first, last);
    if (!(sum >= kTooSmall)) return exact_log_sum(first, last);
    return std::log(sum) + largest_ / arguments_.temperature;
  }

  // The same from the logits of the range alone, in double.
  double exact_log_sum(int64_t first, int64_t last) const {
    double largest = kImpossible;
    for (int64_t place = first; place < last; ++place) {
      const double logit = logit_at(logits_, arguments_.dtype, token_at(place));
      if (std::isnan(logit) || logit > std::numeric_limits<double>::max()) return kNothing;
      largest = std::max(largest, logit);
    }
    if (largest == kImpossible) return largest;
    double sum = 0.0;
    for (int64_t place = first; place < last; ++place) {
      sum += std::exp((logit_at(logits_, arguments_.dtype, token_at(place)) - largest) / arguments_.temperature);
    }
    return std::log(sum) + largest / arguments_.temperature;
  }

 private:
  int64_t token_at(int64_t place) const { return arguments_.order == nullptr ? place : arguments_.order[place]; }

  float largest_logit() {
    const int dtype = static_cast<int>(arguments_.dtype);
    const int64_t whole = arguments_.vocab / kernels_.lanes * kernels_.lanes;
    float largest = kImpossible;
    if (whole > 0) {
      const SourceArguments all{logits_, whole, 1.0f, 0.0f, 0.0f, nullptr};
      largest = kernels_.source_block[dtype][kLargest](all).largest;
    }
    for (int64_t token = whole; token < arguments_.vocab; ++token) {
      largest = std::max(largest, static_cast<float>(logit_at(logits_, arguments_.dtype, token)));
    }
    return largest;
  }

  double gathered_sum(int64_t first, int64_t last) const {
    double sum = 0.0;
    for (int64_t place = first; place < last; ++place) sum += powers_[token_at(place)];
    return sum;
  }

  double built_sum(int64_t first, int64_t last) const {
    double sum = 0.0;
    int64_t block = (first + kSpan - 1) / kSpan;
    int64_t stop = last / kSpan;
    if (block >= stop) return sum_of(ordered_.data() + first, last - first);
    sum += sum_of(ordered_.data() + first, block * kSpan - first);
    sum += sum_of(ordered_.data() + stop * kSpan, last - stop * kSpan);
    constexpr int64_t per = kSuperspan / kSpan;
    const int64_t super = (block + per - 1) / per;
    const int64_t super_stop = stop / per;
    if (super >= super_stop) return sum + sum_of(blocks_.data() + block, stop - block);
    sum += sum_of(blocks_.data() + block, super * per - block);
    sum += sum_of(blocks_.data() + super_stop * per, stop - super_stop * per);
    return sum + sum_of(superblocks_.data() + super, super_stop - super);
  }

  const RangeArguments& arguments_;
  const Kernels& kernels_;
  const char* logits_;
  float largest_ = kImpossible;
  bool built_ = false;
  // work space of the thread, kept between calls
  static thread_local std::vector<float> powers_;
  static thread_local std::vector<float> ordered_;
  static thread_local std::vector<double> blocks_;
  static thread_local std::vector<double> superblocks_;
};

thread_local std::vector<float> Row::powers_;
thread_local std::vector<float> Row::ordered_;
thread_local std::vector<double> Row::blocks_;
thread_local std::vector<double> Row::superblocks_;

void score_row(const RangeArguments& arguments, const Kernels& kernels, int64_t number, float* log_probs,
               float* log_sums) {
  const int64_t start = arguments.row_offsets[number];
  const int64_t stop = arguments.row_offsets[number + 1];
  const bool given = arguments.given_sums != nullptr;
  double log_sum = given ? arguments.given_sums[number] : kNothing;
  if (start < stop) {
    int64_t tokens = 0;
    for (int64_t i = start; i < stop; ++i) {
      tokens += std::max<int64_t>(0, int64_t{arguments.last[i]} - arguments.first[i]);
    }
    Row row(arguments, kernels, number);
    const bool whole = !given || tokens > kFewTokens;
    double own = kNothing;
    if (whole) {
      own = row.sum_all();
      if (!given) log_sum = own;
      if (own > kImpossible) row.build(tokens);
    }
    const bool summed = whole && own > kImpossible;
    for (int64_t i = start; i < stop; ++i) {
      const int64_t first = arguments.first[i];
      const int64_t last = std::max<int64_t>(first, arguments.last[i]);
      const double found = summed ? row.log_sum(first, last) : row.exact_log_sum(first, last);
      const bool impossible = found == kImpossible && !std::isnan(log_sum);
      log_probs[i] = impossible ? kImpossible : static_cast<float>(found - log_sum);
    }
  }
  log_sums[number] = static_cast<float>(log_sum);
}

}  // namespace

void range_log_probs(const RangeArguments& arguments, float* log_probs, float* log_sums, const Kernels& kernels,
                     int threads) {
  parallel_for(arguments.rows, threads, [&](int64_t row) {
    const FlushDenormals mode;
    score_row(arguments, kernels, row, log_probs, log_sums);
  });
}

}  // namespace shallowfusion
