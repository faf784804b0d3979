// Exact selection by group maxima: the best P tokens lie in groups whose maximum is at least the P-th largest one.
//
// The groups' tokens are read again and scored in float64, so float32 only ever decides what is looked at; equal
// scores keep the lower token because tokens are looked at in ascending order.
#include <algorithm>
#include <functional>

#include "fused_step_row.h"

namespace shallowfusion {
namespace {

class BestList {
 public:
  BestList(std::vector<Entry>& entries, int64_t size) : entries_(entries), size_(size) { entries_.clear(); }

  void offer(const Entry& entry) {
    if (entry.score == kNever) return;
    if (static_cast<int64_t>(entries_.size()) == size_) {
      if (!better(entry, entries_.front())) return;
      std::pop_heap(entries_.begin(), entries_.end(), better);
      entries_.pop_back();
    }
    entries_.push_back(entry);
    std::push_heap(entries_.begin(), entries_.end(), better);
  }

 private:
  std::vector<Entry>& entries_;  // heap, worst in front
  int64_t size_;
};

// The sparse bonus of one row.
struct RowBonus {
  const int32_t* tokens = nullptr;
  const float* values = nullptr;
  int64_t count = 0;

  explicit RowBonus(const RowWork& work) {
    const StepArguments& arguments = work.arguments();
    if (arguments.bonus_offsets == nullptr) return;
    const int64_t first = arguments.bonus_offsets[work.row];
    tokens = arguments.bonus_tokens + first;
    values = arguments.bonus_values + first;
    count = arguments.bonus_offsets[work.row + 1] - first;
  }
  bool holds(int64_t token) const { return std::find(tokens, tokens + count, token) != tokens + count; }
};

double score_of(const RowWork& work, int64_t token, double bonus) {
  const double bias = static_bias_of(work, token);
  if (bias == kNever) return kNever;
  const bool end = token == work.arguments().end_id;
  const bool acoustic_end = end && work.normalize == Normalize::end_factored;
  double score = acoustic_end ? log_prob_of(work.sources[0], token) : increment_of(work, token) + work.shift;
  if (std::isnan(score) || score == kNever) return kNever;  // -inf + inf: nothing is possible
  score += bias + bonus;
  return end ? score : score + work.arguments().length_bonus[work.row];
}

// The `rank`-th largest of the group maxima; -inf = fewer than that are possible.
//
// Maxima of groups of groups come first: at least `rank` groups reach the `rank`-th largest of those.
float rank_bound(RowWork& work, int64_t rank) {
  const Kernels& kernels = work.kernels();
  const auto count = static_cast<int64_t>(work.maxima.size());
  std::vector<float>& found = work.survivors;
  if (rank > count) return kImpossible;
  const FinishArguments groups{work.maxima.data(), nullptr, count, nullptr};
  const int64_t num_bins = (count + kGroupSpan - 1) / kGroupSpan * kernels.lanes;
  float bound = kImpossible;
  if (rank <= num_bins) {
    found.resize(num_bins);
    kernels.finish_block[static_cast<int>(SumOf::nothing)]({groups.combined, nullptr, count, found.data()});
    std::nth_element(found.begin(), found.begin() + (rank - 1), found.end(), std::greater<float>());
    bound = found[rank - 1];
  }
  work.places.resize(count);
  found.resize(kernels.collect_above(groups, bound, work.places.data()));
  for (size_t at = 0; at < found.size(); ++at) found[at] = work.maxima[work.places[at]];
  std::nth_element(found.begin(), found.begin() + (rank - 1), found.end(), std::greater<float>());
  return found[rank - 1];
}

// Adds each segment's constant to its group maxima and returns how far float32 may be off, in log2 units.
float level_maxima(RowWork& work) {
  double highest = kNever;
  double lowest = 0.0;
  for (const Segment& segment : work.segments) {
    if (segment.tokens) highest = std::max(highest, segment.constant);
  }
  double magnitude = 1.0;
  for (const RowSource& source : work.sources) magnitude += std::fabs(source.weight * source.offset);
  for (Segment& segment : work.segments) {
    if (!segment.tokens) continue;
    const double constant = segment.constant == kNever ? kNever : segment.constant - highest;
    segment.constant = constant;
    if (constant > kNever) lowest = std::min(lowest, constant);
    if (constant == 0.0) continue;
    float* maxima = work.block_maxima(segment.first_block);
    const int64_t count = segment.num_blocks() * work.groups_per_block() * work.kernels().lanes;
    for (int64_t group = 0; group < count; ++group) maxima[group] += static_cast<float>(constant);
  }
  return static_cast<float>(0x1p-19 * (magnitude - lowest));
}

void look_at_span(const RowWork& work, const Segment& segment, int64_t token, int64_t count, float threshold,
                  const RowBonus& bonus, BestList& best) {
  float combined[kGroupSpan + kMaxLanes];
  float scratch[kGroupSpan + kMaxLanes];
  int32_t offsets[kGroupSpan + kMaxLanes];
  combine_tokens(work, segment, token, count, combined);
  const FinishArguments span{combined, bias_of(work, token, count, scratch), round_up(count, work.kernels().lanes),
                             nullptr};
  const int64_t found = work.kernels().collect_above(span, threshold, offsets);
  for (int64_t index = 0; index < found; ++index) {
    const int64_t candidate = token + offsets[index];
    if (offsets[index] >= count || candidate == work.arguments().end_id || bonus.holds(candidate)) continue;
    best.offer({score_of(work, candidate, 0.0), candidate});
  }
}

void look_above(RowWork& work, float threshold, const RowBonus& bonus, BestList& best) {
  const int lanes = work.kernels().lanes;
  for (const Segment& segment : work.segments) {
    if (!segment.tokens || segment.constant == kNever) continue;
    const int64_t num_maxima = segment.num_blocks() * work.groups_per_block() * lanes;
    const FinishArguments maxima{work.block_maxima(segment.first_block), nullptr, num_maxima, nullptr};
    const int64_t reached = work.kernels().collect_above(maxima, threshold, work.places.data());
    int64_t next = segment.first;
    for (int64_t at = 0; at < reached; ++at) {
      const int64_t token = segment.first + work.places[at] / lanes * kGroupSpan;
      if (token < next) continue;  // another group of a span already looked at
      next = token + kGroupSpan;
      const int64_t count = std::min(kGroupSpan, segment.last - token);
      look_at_span(work, segment, token, count, threshold - static_cast<float>(segment.constant), bonus, best);
    }
  }
}

}  // namespace

double static_bias_of(const RowWork& work, int64_t token) {
  if (!work.arguments().allows(work.row, token)) return kNever;
  return work.arguments().token_bias == nullptr ? 0.0 : work.arguments().token_bias[token];
}

double log_prob_of(const RowSource& source, int64_t token) {
  const int64_t id = source.id_of(token);
  if (id < 0) return source.unmapped_log_prob();
  const double logit = read_logit(source.view->dtype, source.logits, id);
  if (std::isnan(source.softmax.log_sum_exp)) return source.softmax.log_sum_exp;
  if (logit == kNever) return kNever;  // so is every logit of a row whose log-sum-exp is -inf
  return (logit - source.softmax.origin()) * source.inverse + source.softmax.origin_log_prob();
}

double increment_of(const RowWork& work, int64_t token) {
  if (work.arguments().combine == Combine::mixture) {
    double terms[kMaxSources];
    double highest = kNever;
    int used = 0;
    for (const RowSource& source : work.sources) {
      if (source.weight == 0.0) continue;
      terms[used] = std::log(source.weight) + log_prob_of(source, token);
      highest = std::max(highest, terms[used++]);
    }
    if (highest == kNever) return kNever;
    double sum = 0.0;
    for (int term = 0; term < used; ++term) sum += std::exp(terms[term] - highest);
    return std::log(sum) + highest;
  }
  // Logits and constants are summed apart: equal sums of logits stay equal whatever the constants round to.
  double logits = 0.0;
  double constants = 0.0;
  for (const RowSource& source : work.sources) {
    if (source.weight == 0.0) continue;
    const int64_t id = source.id_of(token);
    if (id < 0) {
      const double value = source.unmapped_log_prob();
      if (value == kNever) return kNever;
      constants += source.weight * value;
      continue;
    }
    const double logit = read_logit(source.view->dtype, source.logits, id);
    if (logit == kNever) return kNever;
    logits += source.weight * ((logit - source.softmax.origin()) * source.inverse);
    constants += source.weight * source.softmax.origin_log_prob();
  }
  return logits + constants;
}

double end_log_score(const RowWork& work) {
  const int64_t end = work.arguments().end_id;
  if (end < 0) return kNever;
  const double bias = static_bias_of(work, end);
  return bias == kNever ? kNever : increment_of(work, end) + bias;
}

void select_row(RowWork& work, RowResult& result) {
  const StepArguments& arguments = work.arguments();
  const RowBonus bonus(work);
  BestList best(result.best, std::min(arguments.top_k, arguments.vocab()));
  const float margin = level_maxima(work);
  // Tokens with a bonus are scored apart; their groups may hold nothing else that counts, so look that much further.
  const int64_t rank = std::min(arguments.top_k, arguments.vocab()) + bonus.count;
  const float bound = rank_bound(work, rank);
  const float threshold = bound - (margin + std::fabs(bound) * 0x1p-19f);
  if (std::isfinite(threshold)) {
    look_above(work, threshold, bonus, best);
  } else {  // few tokens are possible, or float32 cannot rank them: score each
    for (int64_t token = 0; token < arguments.vocab(); ++token) {
      if (token != arguments.end_id && !bonus.holds(token)) best.offer({score_of(work, token, 0.0), token});
    }
  }
  double end_bonus = 0.0;
  for (int64_t entry = 0; entry < bonus.count; ++entry) {
    const int64_t token = bonus.tokens[entry];
    if (token == arguments.end_id) {
      end_bonus = bonus.values[entry];
    } else {
      best.offer({score_of(work, token, bonus.values[entry]), token});
    }
  }
  if (arguments.end_id >= 0) best.offer({score_of(work, arguments.end_id, end_bonus), arguments.end_id});
}

}  // namespace shallowfusion
