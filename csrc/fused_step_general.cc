// Rows of any rule: mixtures, mapped vocabularies, logits beyond the range of the one-pass sums.
//
// First the exact softmax of each source (two reads), then the fused score of every token into a row buffer (one more
// read, a gather under a map), then sums and group maxima out of that buffer, which stays in L2.
#include <algorithm>

#include "fused_step_row.h"

namespace shallowfusion {
namespace {

void fill_mapped(const RowSource& source, int64_t token, int64_t count, float unmapped, float scale, float lift,
                 float* out) {
  const int32_t* map = source.view->map + token;
  const auto largest = static_cast<float>(source.softmax.largest);
  for (int64_t at = 0; at < count; ++at) {
    out[at] = map[at] < 0 ? unmapped : (read_logit(source.view->dtype, source.logits, map[at]) - largest) * scale + lift;
  }
}

// Log2 of the probability this source gives tokens [token, token + count).
void fill_values(const RowSource& source, const Kernels& kernels, int64_t token, int64_t count, float* out) {
  const auto unmapped = static_cast<float>(source.unmapped_log_prob() * kLog2E);
  const RowSoftmax& softmax = source.softmax;
  const bool possible = softmax.log_sum_exp > kNever;
  const float scale = source.scale;
  const auto lift = static_cast<float>(softmax.best_log_prob * kLog2E);
  if (!possible) {
    for (int64_t at = 0; at < count; ++at) out[at] = source.id_of(token + at) < 0 ? unmapped : kImpossible;
  } else if (source.view->map != nullptr) {
    fill_mapped(source, token, count, unmapped, scale, lift, out);
  } else {
    const int64_t present = std::clamp<int64_t>(source.view->vocab - token, 0, count);
    const char* logits = source.logits + token * item_size(source.view->dtype);
    if (present > 0) {
      const auto largest = static_cast<float>(softmax.largest);
      kernels.convert_block[static_cast<int>(source.view->dtype)](logits, present, largest, out);
      for (int64_t at = 0; at < present; ++at) out[at] = out[at] * scale + lift;
    }
    std::fill(out + present, out + count, unmapped);
  }
}

void combine_log_linear(const RowWork& work, int64_t token, int64_t count, float* combined) {
  float values[kBlock + kMaxLanes];
  std::fill(combined, combined + count, 0.0f);
  for (const RowSource& source : work.sources) {
    if (source.weight == 0.0) continue;
    fill_values(source, work.kernels(), token, count, values);
    const auto weight = static_cast<float>(source.weight);
    for (int64_t at = 0; at < count; ++at) {
      combined[at] = values[at] == kImpossible ? kImpossible : combined[at] + weight * values[at];
    }
  }
}

void combine_mixture(const RowWork& work, int64_t token, int64_t count, float* combined) {
  float values[kMaxSources][kBlock + kMaxLanes];
  const float* rows[kMaxSources];
  const int64_t padded = round_up(count, work.kernels().lanes);
  int used = 0;
  for (const RowSource& source : work.sources) {
    if (source.weight == 0.0) continue;
    float* row = values[used];
    fill_values(source, work.kernels(), token, count, row);
    const auto weight = static_cast<float>(std::log2(source.weight));
    for (int64_t at = 0; at < count; ++at) row[at] += weight;
    std::fill(row + count, row + padded, kImpossible);
    rows[used++] = row;
  }
  if (used == 0) {
    std::fill(combined, combined + count, kImpossible);
    return;
  }
  float mixed[kBlock + kMaxLanes];
  work.kernels().mix_block(rows, used, padded, mixed);
  std::copy_n(mixed, count, combined);
}

// Log of the sum of 2^values, nats, over all tokens but the end. Where float32 is too coarse for it, the tokens that matter,
// which are few then, are summed as `exact` (nats) scores them; `coarseness` (token) is the magnitude it must resolve.
template <class Coarseness, class Exact>
double log_sum(const RowWork& work, const std::vector<float>& values, const Coarseness& coarseness,
                const Exact& exact) {
  const int64_t vocab = work.arguments().vocab();
  const auto best = std::max_element(values.begin(), values.begin() + vocab);
  const double magnitude = *best > kImpossible ? coarseness(best - values.begin()) : HUGE_VAL;
  if (magnitude <= kCoarse) {
    double sum = 0.0;
    for (int64_t at = 0; at < vocab; at += kBlock) {
      const int64_t size = std::min(kBlock, round_up(vocab - at, work.kernels().lanes));
      sum += work.kernels().source_block[0][kSum]({values.data() + at, size, 1.0f, -*best, 0.0f, nullptr}).sum;
    }
    return (std::log2(sum) + *best) * kLn2;
  }
  const double least = *best - kCoarse - magnitude * 0x1p-20;
  std::vector<double> scores;
  double highest = kNever;
  for (int64_t token = 0; token < vocab; ++token) {
    if (!(values[token] >= least || least == kNever) || token == work.arguments().end_id) continue;
    scores.push_back(exact(token));
    highest = std::max(highest, scores.back());
  }
  if (highest == kNever) return kNever;
  double sum = 0.0;
  for (const double score : scores) sum += std::exp(score - highest);
  return std::log(sum) + highest;
}

// What the float32 score of a token was summed from, in log2 units. A mixture's best token is never far below one.
double coarseness_of(const RowWork& work, int64_t token) {
  double magnitude = 0.0;
  if (work.arguments().combine == Combine::mixture) return magnitude;
  for (const RowSource& source : work.sources) {
    if (source.weight != 0.0) magnitude += std::fabs(source.weight * log_prob_of(source, token)) * kLog2E;
  }
  return magnitude;
}

double sum_of_words(RowWork& work) {
  const StepArguments& arguments = work.arguments();
  const int64_t vocab = arguments.vocab();
  work.scratch.assign(round_up(vocab, kMaxLanes) + kMaxLanes, kImpossible);
  for (int64_t token = 0; token < vocab; token += kBlock) {
    float values[kBlock + kMaxLanes];
    const int64_t count = std::min(kBlock, vocab - token);
    fill_values(work.sources[0], work.kernels(), token, count, values);
    std::copy_n(values, count, work.scratch.data() + token);
  }
  work.scratch[arguments.end_id] = kImpossible;
  return log_sum(
      work, work.scratch, [&](int64_t token) { return std::fabs(work.scratch[token]); },
      [&](int64_t token) { return log_prob_of(work.sources[0], token); });
}

// Log of the sum of what is allowed, bias counted.
double sum_of_biased(RowWork& work) {
  const int64_t vocab = work.arguments().vocab();
  work.scratch.assign(round_up(vocab, kMaxLanes) + kMaxLanes, kImpossible);
  for (int64_t token = 0; token < vocab; token += kBlock) {
    float scratch[kBlock + kMaxLanes];
    const int64_t count = std::min(kBlock, vocab - token);
    const float* bias = bias_of(work, token, count, scratch);
    for (int64_t at = token; at < token + count; ++at) {
      const float value = bias == nullptr ? 0.0f : bias[at - token];
      work.scratch[at] = work.combined[at] + value * static_cast<float>(kLog2E);
    }
  }
  return log_sum(
      work, work.scratch, [&](int64_t token) { return coarseness_of(work, token); },
      [&](int64_t token) { return increment_of(work, token) + static_bias_of(work, token); });
}

void set_shift(RowWork& work) {
  work.shift = 0.0;
  if (work.normalize == Normalize::end_factored) {
    const double fused = log_sum(
        work, work.combined, [&](int64_t token) { return coarseness_of(work, token); },
        [&](int64_t token) { return increment_of(work, token); });
    work.shift = fused == kNever ? kNever : sum_of_words(work) - fused;
  } else if (work.normalize == Normalize::local) {
    const double fused = sum_of_biased(work);
    const double end = end_log_score(work);
    const double high = std::max(end, fused);
    if (high > kNever) work.shift = -(high + std::log(std::exp(end - high) + std::exp(fused - high)));
  }
}

}  // namespace

RowSoftmax exact_softmax(const SourceView& view, int64_t row, const Kernels& kernels) {
  const int dtype = static_cast<int>(view.dtype);
  const int64_t bytes = item_size(view.dtype);
  const char* logits = view.logits + row * view.row_stride * bytes;
  const float scale = static_cast<float>(kLog2E / view.temperature);
  float block[kBlock + kMaxLanes];
  float largest = kImpossible;
  double sum = 0.0;
  RowSoftmax softmax;
  softmax.known = true;
  softmax.exact = true;
  if (kernels.any_broken[dtype](logits, view.vocab)) {
    const double nothing = std::numeric_limits<double>::quiet_NaN();
    softmax.log_sum_exp = softmax.best_log_prob = softmax.largest = nothing;
    return softmax;
  }
  for (const bool summing : {false, true}) {
    for (int64_t token = 0; token < view.vocab; token += kBlock) {
      const int64_t count = std::min(kBlock, view.vocab - token);
      kernels.convert_block[dtype](logits + token * bytes, count, summing ? largest : 0.0f, block);
      const SourceArguments arguments{block, round_up(count, kernels.lanes), scale, 0.0f, 0.0f, nullptr};
      const SourceResult result = kernels.source_block[0][summing ? kSum : kLargest](arguments);
      sum += result.sum;
      if (!summing) largest = std::max(largest, result.largest);
    }
    if (largest == kImpossible) {
      softmax.log_sum_exp = softmax.best_log_prob = softmax.largest = kNever;
      return softmax;
    }
    if (!summing) sum = 0.0;
  }
  softmax.largest = largest;
  softmax.best_log_prob = -std::log2(sum) / (static_cast<double>(scale) * view.temperature);
  softmax.log_sum_exp = largest / view.temperature - softmax.best_log_prob;
  return softmax;
}

void score_general_row(RowWork& work, RowResult& result) {
  const StepArguments& arguments = work.arguments();
  const Kernels& kernels = work.kernels();
  const int64_t vocab = arguments.vocab();
  work.general = true;
  result.general = true;
  for (RowSource& source : work.sources) {
    source.softmax = exact_softmax(*source.view, work.row, kernels);
    source.offset = 0.0f;  // values are log-probs themselves
    if (std::isnan(source.softmax.log_sum_exp)) result.flagged = true;
  }
  if (result.flagged) return;
  work.combined.assign(round_up(vocab, kMaxLanes) + kMaxLanes, kImpossible);
  work.segments.assign(1, Segment{0, vocab, 0, true, 0, 0.0});
  work.num_blocks = work.segments[0].num_blocks();
  work.maxima.assign(work.num_blocks * work.groups_per_block() * kernels.lanes, kImpossible);
  for (int64_t token = 0; token < vocab; token += kBlock) {
    const int64_t count = std::min(kBlock, vocab - token);
    const bool mixture = arguments.combine == Combine::mixture;
    (mixture ? combine_mixture : combine_log_linear)(work, token, count, work.combined.data() + token);
  }
  if (arguments.end_id >= 0) work.combined[arguments.end_id] = kImpossible;  // scored apart
  set_shift(work);
  for (int64_t token = 0; token < vocab; token += kBlock) {
    float scratch[kBlock + kMaxLanes];
    const int64_t count = std::min(kBlock, vocab - token);
    const FinishArguments finish{work.combined.data() + token, bias_of(work, token, count, scratch),
                                 round_up(count, kernels.lanes), work.block_maxima(token / kBlock)};
    kernels.finish_block[static_cast<int>(SumOf::nothing)](finish);
  }
}

}  // namespace shallowfusion
