// What a gate may know of a row: log-sum-exp, entropy, largest log-prob, margin; one read of each logit.
#include <algorithm>
#include <cmath>
#include <limits>

#include "float_mode.h"
#include "fused_step.h"
#include "thread_pool.h"

namespace shallowfusion {
namespace {

struct Sums {
  double sum = 0.0;       // of 2^y
  double weighted = 0.0;  // of 2^y * y
  float largest = kImpossible;
  float second = kImpossible;
};

void take_largest(Sums& sums, float value) {
  if (value > sums.largest) {
    sums.second = sums.largest;
    sums.largest = value;
  } else if (value > sums.second) {
    sums.second = value;
  }
}

// Sums of y = scale * (x - subtract) + offset; without `subtract` whole blocks are read where they lie.
Sums sum_row(const SourceView& source, const char* logits, const Kernels& kernels, float offset, float subtract) {
  const auto scale = static_cast<float>(kLog2E / source.temperature);
  Sums sums;
  float block[kBlock + kMaxLanes];
  for (int64_t token = 0; token < source.vocab; token += kBlock) {
    const int64_t count = std::min(kBlock, source.vocab - token);
    const char* from = logits + token * item_size(source.dtype);
    int dtype = static_cast<int>(source.dtype);
    if (subtract != 0.0f || count % kernels.lanes != 0) {
      kernels.convert_block[dtype](from, count, subtract, block);
      from = reinterpret_cast<const char*>(block);
      dtype = static_cast<int>(Dtype::float32);
    }
    const StatisticsResult part =
        kernels.statistics_block[dtype]({from, round_up(count, kernels.lanes), scale, offset});
    sums.sum += part.sum;
    sums.weighted += part.weighted;
    take_largest(sums, part.largest);
    take_largest(sums, part.second);
  }
  return sums;
}

float reference_of(const SourceView& source, const char* logits, const Kernels& kernels, int64_t count) {
  const int dtype = static_cast<int>(source.dtype);
  float block[kBlock + kMaxLanes];
  float largest = kImpossible;
  for (int64_t token = 0; token < count; token += kBlock) {
    const int64_t size = std::min(kBlock, count - token);
    kernels.convert_block[dtype](logits + token * item_size(source.dtype), size, 0.0f, block);
    const SourceArguments arguments{block, round_up(size, kernels.lanes), 1.0f, 0.0f, 0.0f, nullptr};
    largest = std::max(largest, kernels.source_block[0][kLargest](arguments).largest);
  }
  return largest;
}

struct RowStatistics {
  double log_sum_exp;
  double entropy;
  double max_log_prob;
  double margin;
};

RowStatistics statistics_of(const SourceView& source, const char* logits, const Kernels& kernels) {
  const auto scale = static_cast<float>(kLog2E / source.temperature);
  const double unit = 1.0 / (static_cast<double>(scale) * source.temperature);  // ln 2, scale's rounding undone
  const float guess = reference_of(source, logits, kernels, std::min(kGroupSpan, source.vocab));
  float offset = std::isfinite(guess) ? -scale * guess : 0.0f;
  double shift = 0.0;  // logit units: x = y / scale + shift
  Sums sums;
  if (std::fabs(offset) <= kernels.offset_limit) sums = sum_row(source, logits, kernels, offset, 0.0f);
  if (!(sums.sum >= 0x1p-60 && sums.sum <= 0x1p100) || !std::isfinite(sums.weighted)) {
    const double nothing = std::numeric_limits<double>::quiet_NaN();
    if (kernels.any_broken[static_cast<int>(source.dtype)](logits, source.vocab)) {
      return {nothing, nothing, nothing, nothing};
    }
    const float largest = reference_of(source, logits, kernels, source.vocab);
    if (largest == kImpossible) return {largest, 0.0, largest, 0.0};
    sums = sum_row(source, logits, kernels, 0.0f, largest);
    offset = 0.0f;
    shift = largest;
  }
  const double log_sum = std::log2(sums.sum) * unit;
  const double start = -offset * unit + shift / source.temperature;
  const double best = (sums.largest + shift) / source.temperature;
  const double margin = (static_cast<double>(sums.largest) - sums.second) / source.temperature;
  const double entropy = std::max(0.0, log_sum - unit * sums.weighted / sums.sum);
  return {log_sum + start, entropy, best - (log_sum + start),
          source.vocab == 1 ? std::numeric_limits<double>::infinity() : margin};
}

}  // namespace

void row_statistics(const SourceView& source, int64_t rows, const StatisticsOutput& output, const Kernels& kernels,
                    int threads) {
  parallel_for(rows, threads, [&](int64_t row) {
    const FlushDenormals mode;
    const char* logits = source.logits + row * source.row_stride * item_size(source.dtype);
    const RowStatistics found = statistics_of(source, logits, kernels);
    output.log_sum_exp[row] = static_cast<float>(found.log_sum_exp);
    output.entropy[row] = static_cast<float>(found.entropy);
    output.max_log_prob[row] = static_cast<float>(found.max_log_prob);
    output.margin[row] = static_cast<float>(found.margin);
  });
}

}  // namespace shallowfusion
