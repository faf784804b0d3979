// The log-linear row whose sources share token ids: every logit is read once.
//
// The vocabulary is cut where a source ends and around the end token. Within a segment the fused score is a weighted
// sum of the logits plus a constant, which is not needed before all sums are known; so sums, and the largest score of
// each group of tokens, are taken in the same pass. References come from the first tokens of each row, not from its
// maximum: the sums only have to stay within float32's range, which `close_scan` checks.
#include <algorithm>

#include "fused_step_row.h"

namespace shallowfusion {
namespace {

constexpr double kSmallestSum = 0x1p-60;
constexpr double kLargestSum = 0x1p100;
constexpr double kLostBits = 40.0;  // what underflow may drop, relative to the sum, is below 2^-40

float first_largest(const RowSource& source, const Kernels& kernels) {
  float block[kGroupSpan + kMaxLanes];
  const int64_t count = std::min<int64_t>(source.view->vocab, kGroupSpan);
  kernels.convert_block[static_cast<int>(source.view->dtype)](source.logits, count, 0.0f, block);
  SourceArguments arguments{block, round_up(count, kernels.lanes), 1.0f, 0.0f, 0.0f, nullptr};
  const float largest = kernels.source_block[0][kLargest](arguments).largest;
  return std::isfinite(largest) ? largest : 0.0f;
}

void cut_segments(RowWork& work) {
  const int64_t vocab = work.arguments().vocab();
  const int64_t end = work.arguments().end_id;
  int64_t cuts[32];  // two per end and vocabulary, one per source
  int num_cuts = 0;
  cuts[num_cuts++] = 0;
  cuts[num_cuts++] = vocab;
  if (end >= 0) {
    cuts[num_cuts++] = end;
    cuts[num_cuts++] = end + 1;
  }
  for (const RowSource& source : work.sources) cuts[num_cuts++] = source.view->vocab;
  std::sort(cuts, cuts + num_cuts);
  work.segments.clear();
  work.num_blocks = 0;
  for (int cut = 0; cut + 1 < num_cuts; ++cut) {
    Segment segment{cuts[cut], cuts[cut + 1], 0, cuts[cut] < vocab, work.num_blocks, 0.0};
    if (segment.first == segment.last || segment.first == end) continue;
    for (size_t index = 0; index < work.sources.size(); ++index) {
      if (segment.first < work.sources[index].view->vocab) segment.present |= 1u << index;
    }
    work.num_blocks += segment.num_blocks();
    work.segments.push_back(segment);
  }
}

// One source of one block; the sum and the largest logit go where `sums` and `largest` point when it is asked for.
SourceResult run_source(const RowSource& source, const Kernels& kernels, int64_t token, int64_t count, unsigned task,
                        float* combined) {
  const char* logits = source.logits + token * item_size(source.view->dtype);
  int dtype = static_cast<int>(source.view->dtype);
  float padded[kBlock + kMaxLanes];
  if (count % kernels.lanes != 0) {
    kernels.convert_block[dtype](logits, count, 0.0f, padded);
    logits = reinterpret_cast<const char*>(padded);
    dtype = static_cast<int>(Dtype::float32);
  }
  if (source.weight < 0.0 && (task & kCombine) != 0) task |= kNegative;
  if (source.weight == 1.0 && (task & kFirst) != 0) task |= kUnit;
  return kernels.source_block[dtype][task]({logits, round_up(count, kernels.lanes), source.scale, source.offset,
                                            static_cast<float>(source.weight), combined});
}

void fill_constant(float* combined, int64_t count, int lanes) {
  std::fill(combined, combined + count, 0.0f);
  std::fill(combined + count, combined + round_up(count, lanes), kImpossible);
}

SumOf sum_of(Normalize normalize) {
  if (normalize == Normalize::end_factored) return SumOf::before_bias;
  return normalize == Normalize::local ? SumOf::after_bias : SumOf::nothing;
}

// The common block, two sources in one loop; false: it is not of that kind.
bool scan_pair(RowWork& work, const Segment& segment, int64_t token, int64_t count, const FinishArguments& finish,
               double* sums, float* largest) {
  if (work.sources.size() != 2 || segment.present != 3 || !segment.tokens) return false;
  const RowSource& first = work.sources[0];
  const RowSource& second = work.sources[1];
  const Dtype dtype = first.view->dtype;
  if (second.view->dtype != dtype || first.weight != 1.0 || second.weight < 0.0) return false;
  if (first.needs_largest || count % work.kernels().lanes != 0) return false;
  const int64_t byte = token * item_size(dtype);
  const auto kernel = work.kernels().pair_block[static_cast<int>(dtype)][second.needs_largest ? 1 : 0]
                                               [static_cast<int>(sum_of(work.normalize))];
  const PairResult found =
      kernel({first.logits + byte, second.logits + byte, count, first.scale, first.offset, second.scale, second.offset,
              static_cast<float>(second.weight), finish.bias, finish.group_maxima});
  sums[0] = found.first_sum;
  sums[1] = found.second_sum;
  sums[2] = found.combined_sum;
  largest[0] = kImpossible;
  largest[1] = found.largest;
  return true;
}

void scan_block(RowWork& work, const Segment& segment, int64_t block) {
  const Kernels& kernels = work.kernels();
  const size_t width = work.sources.size();
  const int64_t token = segment.first + (block - segment.first_block) * kBlock;
  const int64_t count = std::min(kBlock, segment.last - token);
  double* sums = work.sums.data() + block * (width + 1);
  float* largest = work.largest.data() + block * width;
  float combined[kBlock + kMaxLanes];
  float bias[kBlock + kMaxLanes];
  FinishArguments finish{combined, nullptr, round_up(count, kernels.lanes), nullptr};
  if (segment.tokens) {
    finish.bias = bias_of(work, token, count, bias);
    finish.group_maxima = work.block_maxima(block);
  }
  if (scan_pair(work, segment, token, count, finish, sums, largest)) return;
  unsigned task = kSum | (segment.tokens ? kCombine | kFirst : 0u);
  std::fill(sums, sums + width + 1, 0.0);
  if (segment.present == 0) fill_constant(combined, count, kernels.lanes);
  for (size_t index = 0; index < width; ++index) {
    const RowSource& source = work.sources[index];
    largest[index] = kImpossible;
    if ((segment.present >> index & 1u) == 0) continue;
    const unsigned extra = source.needs_largest ? kLargest : 0u;
    const SourceResult result = run_source(source, kernels, token, count, task | extra, combined);
    sums[index] = result.sum;
    largest[index] = result.largest;
    task &= ~static_cast<unsigned>(kFirst);
  }
  if (segment.tokens) sums[width] = kernels.finish_block[static_cast<int>(sum_of(work.normalize))](finish);
}

// Log-sum-exp in nats out of a sum of 2^y; divided by scale * temperature, which undoes the rounding of scale.
double nats_of(const RowSource& source, double sum) {
  return (std::log2(sum) - source.offset) / (static_cast<double>(source.scale) / source.inverse);
}

bool close_softmax(const RowWork& work, RowSource& source, size_t index, double* words) {
  const size_t width = work.sources.size();
  double sum = 0.0;
  float largest = kImpossible;
  for (int64_t block = 0; block < work.num_blocks; ++block) {
    sum += work.sums[block * (width + 1) + index];
    largest = std::max(largest, work.largest[block * width + index]);
  }
  *words = sum;
  const int64_t end = work.arguments().end_id;
  if (end >= 0 && end < source.view->vocab) {
    const float logit = read_logit(source.view->dtype, source.logits, end);
    sum += std::exp2(static_cast<double>(source.scale) * logit + source.offset);
    largest = std::max(largest, logit);
  }
  if (!std::isnan(sum) && !(sum >= kSmallestSum && sum <= kLargestSum)) return false;
  source.softmax.known = true;
  source.softmax.log_sum_exp = nats_of(source, sum);
  source.softmax.best_log_prob = largest * source.inverse - source.softmax.log_sum_exp;
  return true;
}

void set_constants(RowWork& work) {
  for (Segment& segment : work.segments) {
    double nats = 0.0;
    for (size_t index = 0; index < work.sources.size(); ++index) {
      const RowSource& source = work.sources[index];
      const double here = (segment.present >> index & 1u) != 0
                              ? nats_of(source, 1.0) - source.softmax.log_sum_exp  // y = 0, normalised
                              : source.unmapped_log_prob();
      nats = here == kNever ? kNever : nats + source.weight * here;
      if (nats == kNever) break;
    }
    segment.constant = nats * kLog2E;
  }
}

// A token of the best score in the block of group maxima `group` (offset within the segment), and whether the terms
// its score is summed from are small enough for float32.
bool is_fine(const RowWork& work, const Segment& segment, int64_t group, float best) {
  const Kernels& kernels = work.kernels();
  const int64_t token = segment.first + group / kernels.lanes * kGroupSpan;
  const int64_t count = std::min(kGroupSpan, segment.last - token);
  float combined[kGroupSpan + kMaxLanes];
  float bias[kGroupSpan + kMaxLanes];
  int32_t offsets[kGroupSpan + kMaxLanes];
  combine_tokens(work, segment, token, count, combined);
  const FinishArguments span{combined, bias_of(work, token, count, bias), round_up(count, kernels.lanes), nullptr};
  if (kernels.collect_above(span, best, offsets) == 0) return false;
  double magnitude = 0.0;
  for (const RowSource& source : work.sources) {
    if (token + offsets[0] >= source.view->vocab) continue;
    const double logit = read_logit(source.view->dtype, source.logits, token + offsets[0]);
    magnitude += std::fabs(source.weight * (source.scale * logit + source.offset));
  }
  return magnitude <= kCoarse;
}

// Log2 of the summed fused scores of all tokens but the end; false when float32 may have hidden or blurred some.
bool close_combined(RowWork& work, double* log2_sum) {
  const size_t width = work.sources.size();
  double highest = kNever;
  for (const Segment& segment : work.segments) {
    if (segment.tokens) highest = std::max(highest, segment.constant);
  }
  double total = 0.0;
  double lost = 0.0;
  double best_score = kNever;
  bool fine = true;
  for (const Segment& segment : work.segments) {
    if (!segment.tokens || segment.constant == kNever) continue;
    double sum = 0.0;
    for (int64_t block = segment.first_block; block < segment.first_block + segment.num_blocks(); ++block) {
      sum += work.sums[block * (width + 1) + width];
    }
    const float* maxima = work.block_maxima(segment.first_block);
    const int64_t num_maxima = segment.num_blocks() * work.groups_per_block() * work.kernels().lanes;
    const float* best = std::max_element(maxima, maxima + num_maxima);
    if (*best + segment.constant > best_score) {
      best_score = *best + segment.constant;
      fine = is_fine(work, segment, best - maxima, *best);
    }
    if (!(sum <= kLargestSum)) return false;
    const double factor = std::exp2(segment.constant - highest);
    total += sum * factor;
    if (*best > kImpossible || work.normalize == Normalize::end_factored) {
      lost += static_cast<double>(segment.last - segment.first) * 0x1p-126 * factor;
    }
  }
  *log2_sum = total > 0.0 ? std::log2(total) + highest : kNever;
  return fine && lost <= total * std::exp2(-kLostBits);
}

}  // namespace

bool close_scan(RowWork& work, RowResult& result) {
  double words[kMaxSources];
  for (size_t index = 0; index < work.sources.size(); ++index) {
    RowSource& source = work.sources[index];
    if (!close_softmax(work, source, index, &words[index])) return false;
    if (std::isnan(source.softmax.log_sum_exp)) result.flagged = true;
  }
  if (result.flagged) return true;
  set_constants(work);
  work.shift = 0.0;
  if (work.normalize == Normalize::none) return true;
  double fused;
  if (!close_combined(work, &fused)) return false;
  if (work.normalize == Normalize::local) {
    const double end = end_log_score(work) * kLog2E;
    const double high = std::max(end, fused);
    if (high > kNever) work.shift = -(high + std::log2(std::exp2(end - high) + std::exp2(fused - high))) * kLn2;
    return true;
  }
  const RowSource& acoustic = work.sources[0];
  if (!(words[0] >= kSmallestSum)) return false;
  work.shift = nats_of(acoustic, words[0]) - acoustic.softmax.log_sum_exp - fused * kLn2;
  return true;
}

void scan_blocks(RowWork& work, int64_t first, int64_t last) {
  for (const Segment& segment : work.segments) {
    const int64_t stop = std::min(last, segment.first_block + segment.num_blocks());
    for (int64_t block = std::max(first, segment.first_block); block < stop; ++block) {
      scan_block(work, segment, block);
    }
  }
}

void combine_tokens(const RowWork& work, const Segment& segment, int64_t token, int64_t count, float* combined) {
  const int lanes = work.kernels().lanes;
  if (work.general) {
    std::copy_n(work.combined.data() + token, count, combined);
    std::fill(combined + count, combined + round_up(count, lanes), kImpossible);
    return;
  }
  if (segment.present == 0) fill_constant(combined, count, lanes);
  unsigned task = kCombine | kFirst;
  for (size_t index = 0; index < work.sources.size(); ++index) {
    if ((segment.present >> index & 1u) == 0) continue;
    run_source(work.sources[index], work.kernels(), token, count, task, combined);
    task = kCombine;
  }
}

void plan_one_pass(RowWork& work) {
  for (RowSource& source : work.sources) {
    source.offset = -source.scale * first_largest(source, work.kernels());
    if (!(std::fabs(source.offset) <= work.kernels().offset_limit)) work.general = true;
  }
  if (work.general) return;
  cut_segments(work);
  work.sums.resize(work.num_blocks * (work.sources.size() + 1));
  work.largest.resize(work.num_blocks * work.sources.size());
  // Groups past the end of a block are never written, and must never win.
  work.maxima.assign(work.num_blocks * work.groups_per_block() * work.kernels().lanes, kImpossible);
}

}  // namespace shallowfusion
