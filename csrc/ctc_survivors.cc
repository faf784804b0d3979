// The end of a frame of the CTC search: who stays, at which scale, and what nothing needs any more.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ctc_search.h"

namespace shallowfusion {
namespace {

constexpr size_t kSmallest = 4096;         // prefixes or paths not worth collecting
constexpr double kRescaleBelow = 0x1p-64;  // masses shrink by many frames before a rescaling pays

}  // namespace

// Equal texts of different labels go on as one: their blank-ended masses meet, and those with equal last labels.
void CtcUtterance::merge_equal_texts() {
  for (const bool blank : {true, false}) {
    texts_.clear();
    for (size_t index = 0; index < next_.size(); ++index) {
      const CtcPrefix& node = prefixes_[next_[index].node];
      if ((blank ? next_[index].blank : next_[index].label).value == 0.0) continue;
      const uint64_t ending = blank ? 0 : static_cast<uint64_t>(static_cast<int64_t>(node.label) + 2);
      const uint64_t key = (node.text_hash + (node.word_characters > 0)) ^ (ending * 0x9e3779b97f4a7c15u);
      texts_.emplace_back(key, static_cast<int32_t>(index));
    }
    std::sort(texts_.begin(), texts_.end());
    for (size_t begin = 0; begin < texts_.size();) {
      size_t end = begin + 1;
      while (end < texts_.size() && texts_[end].first == texts_[begin].first) ++end;
      if (end - begin > 1) merge_group(begin, end, blank);
      begin = end;
    }
  }
  candidates_.clear();
  std::vector<int64_t> orders;
  orders.swap(orders_);
  for (size_t index = 0; index < next_.size(); ++index) offer(index, orders[index]);
}

void CtcUtterance::merge_group(size_t begin, size_t end, bool blank) {
  const auto mass = [&](size_t at) -> Mass& {
    Entry& entry = next_[texts_[at].second];
    return blank ? entry.blank : entry.label;
  };
  size_t largest = begin;
  for (size_t at = begin + 1; at < end; ++at) {
    if (mass(at).value > mass(largest).value) largest = at;
  }
  for (size_t at = begin; at < end; ++at) {
    if (at == largest) continue;
    const double apart =
        prefixes_[next_[texts_[largest].second].node].extra - prefixes_[next_[texts_[at].second].node].extra;
    const double value = apart == 0.0 ? mass(at).value : mass(at).value * std::exp(apart);
    mass(largest).value = combine(mass(largest).value, value);
    mass(at) = Mass{};
  }
}

// Keeps the best of those that agree in the words and the ending that scores can still depend on.
void CtcUtterance::drop_equal_histories(std::vector<Candidate>& kept) {
  size_t mask = 63;
  while (mask < 2 * kept.size()) mask = 2 * mask + 1;
  seen_.assign(mask + 1, 0);
  size_t count = 0;
  for (const Candidate& candidate : kept) {
    const int32_t node = next_[candidate.entry].node;
    uint64_t key = prefixes_.history_hash(node, model_->rules.history_words);
    key ^= candidate.which == 1 ? 0 : 0x9e3779b97f4a7c15u * static_cast<uint64_t>(prefixes_[node].label + 2);
    key |= 1;  // 0 marks a free slot
    size_t at = (key >> 20) & mask;
    while (seen_[at] != 0 && seen_[at] != key) at = (at + 1) & mask;
    if (seen_[at] == key) continue;
    seen_[at] = key;
    kept[count++] = candidate;
  }
  kept.resize(count);
}

void CtcUtterance::keep_best() {
  double best = 0.0;
  for (const Candidate& candidate : candidates_) best = std::max(best, candidate.rank);
  const double lowest = best * std::exp(-model_->rules.beam_margin);
  const auto outside = [lowest](const Candidate& candidate) { return candidate.rank < lowest; };
  candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), outside), candidates_.end());
  tighten(0);
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& one, const Candidate& other) {
    return one.is_before(other);
  });
  if (model_->rules.history_words > 0) drop_equal_histories(candidates_);
  for (const Entry& entry : live_) prefixes_[entry.node].live = -1;
  live_.clear();
  for (const Candidate& candidate : candidates_) {
    Entry& entry = next_[candidate.entry];
    int32_t place = prefixes_[entry.node].live;
    if (place < 0) {
      place = static_cast<int32_t>(live_.size());
      prefixes_[entry.node].live = place;
      live_.push_back(Entry{entry.node, {}, {}});
    }
    if (candidate.which & 1) live_[place].blank = entry.blank;
    if (candidate.which & 2) live_[place].label = entry.label;
  }
}

// With last_times, `best` says how low a path ranks.
void CtcUtterance::rank_times() {
  for (Entry& entry : live_) {
    const double rank = prefixes_[entry.node].rank;
    for (Mass* mass : {&entry.blank, &entry.label}) mass->best = mass->value > 0.0 ? 1.0 / (mass->value * rank) : 0.0;
  }
}

void CtcUtterance::rescale() {
  double largest = 0.0;
  for (const Entry& entry : live_) largest = std::max({largest, entry.blank.value, entry.label.value});
  if (largest >= kRescaleBelow && largest <= 1.0 / kRescaleBelow) return;
  if (!(largest > 0.0) || std::isinf(largest)) {  // 0: all are NaN
    error_ = "the scores of frame " + std::to_string(frame_ - 1) +
             " are past the range of float64; make weights, bonuses and hotword scores smaller.";
    return;
  }
  const int exponent = std::ilogb(largest);
  const double scale = std::scalbn(1.0, -exponent);
  for (Entry& entry : live_) {
    for (Mass* mass : {&entry.blank, &entry.label}) {
      mass->value *= scale;
      mass->best *= scale;
    }
  }
  offset_ += exponent * std::log(2.0);
}

// Masses take up what is new of their prefix's extra; the largest change goes into the common scale.
void CtcUtterance::set_extras(const std::vector<double>& extras) {
  if (!error_.empty() || live_.empty()) return;
  double largest = -std::numeric_limits<double>::infinity();
  for (size_t place = 0; place < live_.size(); ++place) {
    largest = std::max(largest, extras[place] - prefixes_[live_[place].node].extra);
  }
  for (size_t place = 0; place < live_.size(); ++place) {
    CtcPrefix& node = prefixes_[live_[place].node];
    const double scale = std::exp(extras[place] - node.extra - largest);
    for (Mass* mass : {&live_[place].blank, &live_[place].label}) {
      mass->value *= scale;
      mass->best *= scale;
    }
    node.extra = extras[place];
  }
  offset_ += largest;
  if (model_->rules.last_times) rank_times();
  rescale();
}

// Frees prefixes and paths that nothing live needs.
void CtcUtterance::collect() {
  if (prefixes_.size() > prefix_limit_) {
    std::vector<int32_t> nodes;
    for (const Entry& entry : live_) nodes.push_back(entry.node);
    const std::vector<int32_t> numbers = prefixes_.compact(nodes);
    for (Entry& entry : live_) entry.node = numbers[entry.node];
    prefix_limit_ = std::max<size_t>(kSmallest, 2 * prefixes_.size());
  }
  if (paths_.size() <= path_limit_) return;
  std::vector<int32_t> numbers(paths_.size(), -1);
  const auto visit = [this](auto change) {
    for (Entry& entry : live_) {
      for (int32_t* link : {&entry.blank.path, &entry.blank.pushed, &entry.label.path, &entry.label.pushed}) {
        if (*link >= 0) change(*link);
      }
    }
  };
  visit([&](int32_t& link) { numbers[link] = 0; });
  for (size_t path = paths_.size(); path-- > 0;) {
    if (numbers[path] == 0 && paths_[path].previous >= 0) numbers[paths_[path].previous] = 0;
  }
  int32_t next = 0;
  for (size_t path = 0; path < paths_.size(); ++path) {
    if (numbers[path] < 0) continue;
    numbers[path] = next;
    PathNode moved = paths_[path];
    if (moved.previous >= 0) moved.previous = numbers[moved.previous];
    paths_[next++] = moved;
  }
  paths_.resize(next);
  visit([&](int32_t& link) { link = numbers[link]; });
  path_limit_ = std::max<size_t>(kSmallest, 2 * paths_.size());
}

}  // namespace shallowfusion
