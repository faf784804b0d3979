#include "ctc_search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "float_mode.h"
#include "half.h"
#include "thread_pool.h"

namespace shallowfusion {
namespace {

constexpr float kImpossible = -std::numeric_limits<float>::infinity();
constexpr float kLargestLogProb = 1e-3f;   // rounding of a log-softmax
constexpr double kLargestSum = 1.05;       // of the probabilities of the first frame
constexpr size_t kSmallest = 4096;         // prefixes or paths not worth collecting
constexpr double kRescaleBelow = 0x1p-64;  // masses shrink by many frames before a rescaling pays

bool better(double rank, int64_t order, double other_rank, int64_t other_order) {
  return rank != other_rank ? rank > other_rank : order < other_order;
}

std::string shown(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

}  // namespace

CtcUtterance::CtcUtterance(const CtcModel& model, uint32_t start_state)
    : model_(&model), prefixes_(model.labels, model.language, start_state) {
  live_.push_back(Entry{0, {}, {}});
  live_[0].blank.value = live_[0].blank.best = 1.0;
  prefixes_[0].live = 0;
  row_.resize(model.labels.size());
  probs_.resize(model.labels.size(), Prob{-1, 0.0});
}

// Reads one frame; a bad one sets the error.
bool CtcUtterance::read(const char* frame, bool half, int64_t stride) {
  const size_t size = row_.size();
  for (size_t label = 0; label < size; ++label) {
    const char* at = frame + static_cast<int64_t>(label) * stride;
    if (half) {
      uint16_t bits;
      std::memcpy(&bits, at, sizeof(bits));
      row_[label] = half_to_float(bits);
    } else {
      std::memcpy(&row_[label], at, sizeof(float));
    }
  }
  size_t best = 0;
  for (size_t label = 0; label < size; ++label) {
    if (!(row_[label] <= kLargestLogProb)) {
      const std::string where = "frame " + std::to_string(frame_) + ", label " + std::to_string(label);
      error_ = std::isnan(row_[label])
                   ? where + " is NaN; the acoustic model overflowed or was given bad audio."
                   : where + " is " + shown(row_[label]) + ", but log-probabilities are at most 0; pass log_softmax(logits).";
      return false;
    }
    if (row_[label] > row_[best]) best = label;
  }
  const float largest = row_[best];
  if (largest == kImpossible) {
    error_ = "frame " + std::to_string(frame_) + " makes every label impossible (-inf); check the acoustic model.";
    return false;
  }
  if (frame_ == 0) {
    double sum = 0.0;
    for (const float value : row_) sum += std::exp(static_cast<double>(value));
    if (sum > kLargestSum) {
      error_ = "the probabilities of frame 0 sum to " + shown(sum) + ", wanted at most 1; pass log_softmax(logits).";
      return false;
    }
  }
  prune_labels(static_cast<int32_t>(best));
  largest_ = largest;
  offset_ += largest_;
  return true;
}

void CtcUtterance::prune_labels(int32_t best_label) {
  const CtcRules& rules = model_->rules;
  if (row_[rules.blank] >= rules.blank_skip_log_prob) {
    const float blank = row_[rules.blank];
    std::fill(row_.begin(), row_.end(), kImpossible);
    row_[rules.blank] = blank;
    return;
  }
  const auto count = static_cast<int64_t>(row_.size());
  if (rules.top_labels > 0 && rules.top_labels < count) {
    sorted_labels_.clear();
    for (int32_t label = 0; label < count; ++label) sorted_labels_.emplace_back(row_[label], label);
    const auto before = [](const auto& one, const auto& other) {
      return one.first != other.first ? one.first > other.first : one.second < other.second;
    };
    std::nth_element(sorted_labels_.begin(), sorted_labels_.begin() + rules.top_labels, sorted_labels_.end(), before);
    for (auto at = sorted_labels_.begin() + rules.top_labels; at != sorted_labels_.end(); ++at) {
      row_[at->second] = kImpossible;
    }
  }
  if (rules.token_min_log_prob > -std::numeric_limits<double>::infinity()) {
    for (int32_t label = 0; label < count; ++label) {
      if (row_[label] < rules.token_min_log_prob && label != best_label) row_[label] = kImpossible;
    }
  }
}

// Over the largest of the frame; most labels are never asked for.
double CtcUtterance::prob(int32_t label) {
  Prob& known = probs_[label];
  if (known.frame != frame_) known = {frame_, std::exp(row_[label] - largest_)};
  return known.value;
}

// A prefix at which another delimiter changes nothing.
bool CtcUtterance::is_boundary(int32_t node) const {
  return model_->rules.delimiter >= 0 && (node == 0 || prefixes_[node].label == model_->rules.delimiter);
}

int32_t CtcUtterance::push(Entry& entry, Mass& mass) {
  if (entry.node == 0) return -1;
  if (mass.pushed < 0) {
    mass.pushed = static_cast<int32_t>(paths_.size());
    paths_.push_back({mass.path, mass.start, mass.end});
  }
  return mass.pushed;
}

// The same prefix one frame on: a blank, its last label again, or its parent's extension.
void CtcUtterance::stay_entry(const Entry& old) {
  const CtcPrefix& node = prefixes_[old.node];
  const double blank_prob = prob(model_->rules.blank);
  const bool boundary = is_boundary(old.node);
  const int32_t label = old.node == 0 ? model_->rules.delimiter : node.label;
  const double label_prob = label < 0 ? 0.0 : prob(label);
  next_.emplace_back();
  Entry& entry = next_.back();
  entry.node = old.node;
  entry.blank = old.label.best > old.blank.best ? old.label : old.blank;
  entry.blank.best *= blank_prob;
  entry.blank.value = combine(old.blank.value, old.label.value) * blank_prob;
  entry.label = boundary && old.blank.best > old.label.best ? old.blank : old.label;
  entry.label.best *= label_prob;
  entry.label.value = (boundary ? combine(old.blank.value, old.label.value) : old.label.value) * label_prob;
  entry.label.end = static_cast<int32_t>(frame_) + 1;
  entry.label.pushed = -1;
  if (old.node == 0) return;
  const int32_t place = prefixes_[node.parent].live;
  if (place < 0) return;
  Entry& above = live_[place];
  const bool repeats = prefixes_[node.parent].label == label;
  double factor = label_prob * node.factor;
  const double apart = node.extra - prefixes_[node.parent].extra;
  if (apart != 0.0) factor *= std::exp(apart);
  const double from = repeats ? above.blank.value : combine(above.blank.value, above.label.value);
  entry.label.value = combine(entry.label.value, from * factor);
  Mass& source = !repeats && above.label.best > above.blank.best ? above.label : above.blank;
  const double best = source.best * (model_->rules.last_times ? label_prob : factor);
  if (best > entry.label.best) {
    entry.label.best = best;
    entry.label.path = push(above, source);
    entry.label.start = static_cast<int32_t>(frame_);
  }
}

void CtcUtterance::stay() {
  next_.clear();
  orders_.clear();
  candidates_.clear();
  threshold_ = 0.0;
  const auto width = static_cast<int64_t>(row_.size()) + 1;
  for (size_t place = 0; place < live_.size(); ++place) {
    stay_entry(live_[place]);
    offer(place, static_cast<int64_t>(place) * width);
  }
  double best = 0.0;
  for (const Candidate& candidate : candidates_) best = std::max(best, candidate.rank);
  threshold_ = best * std::exp(-model_->rules.beam_margin);
  tighten(static_cast<size_t>(model_->rules.beam_size));
}

// Makes the entry a candidate; its order settles ties.
void CtcUtterance::offer(size_t number, int64_t order) {
  const Entry& entry = next_[number];
  const double rank = prefixes_[entry.node].rank;
  const auto index = static_cast<int32_t>(number);
  orders_.push_back(order);
  const auto add = [&](double value, int64_t place, uint8_t which) {
    if (value > 0.0 && value >= threshold_) candidates_.push_back({value, place, index, which});
  };
  if (model_->rules.rank_paths) {
    add(entry.blank.value * rank, 2 * order, 1);
    add(entry.label.value * rank, 2 * order + 1, 2);
  } else {
    add(combine(entry.blank.value, entry.label.value) * rank, 2 * order, 3);
  }
}

// With more than `count` candidates, drops all but the best beam_size and raises the threshold to the worst of them.
void CtcUtterance::tighten(size_t count) {
  const auto keep = static_cast<size_t>(model_->rules.beam_size);
  if (candidates_.size() < keep || candidates_.size() < count) return;
  const auto before = [](const Candidate& one, const Candidate& other) {
    return better(one.rank, one.order, other.rank, other.order);
  };
  std::nth_element(candidates_.begin(), candidates_.begin() + (keep - 1), candidates_.end(), before);
  candidates_.resize(keep);
  threshold_ = std::max(threshold_, candidates_[keep - 1].rank);
}

// No label can multiply the rank of a child of the node by more, as phrases go.
double CtcUtterance::most_of_phrases(int32_t node) const {
  const PhraseAutomaton* phrases = model_->language.phrases.get();
  if (phrases == nullptr) return 1.0;
  const uint32_t state = prefixes_[node].phrase;
  const double ends = std::max<double>(0.0, phrases->closing(state));
  const bool after_word =
      prefixes_[node].word_characters == 0 || (node != 0 && model_->labels[prefixes_[node].label].ends_word);
  const int64_t symbols = after_word ? model_->symbols_after_word : model_->symbols_in_word;
  return std::exp(ends + model_->phrase_gain + phrases->most_held(state, symbols)) * (1.0 + 1e-6);
}

// Labels that can still make a candidate, best first.
void CtcUtterance::sort_labels() {
  double largest = 0.0;
  for (const Entry& entry : live_) {
    const double mass = combine(entry.blank.value, entry.label.value);
    largest = std::max(largest, mass * most_of_phrases(entry.node));
  }
  const double reach = largest * std::max(model_->child_factor, model_->close_factor);
  // A hair below the exact bound: the mass is a product of rounded numbers.
  const double cut =
      threshold_ > 0.0 ? largest_ + std::log(threshold_ / reach) - 1e-6 : -std::numeric_limits<double>::infinity();
  sorted_labels_.clear();
  const auto count = static_cast<int32_t>(row_.size());
  for (int32_t label = 0; label < count; ++label) {
    if (row_[label] < cut || row_[label] == kImpossible || label == model_->rules.blank) continue;
    sorted_labels_.emplace_back(prob(label), label);
  }
  std::sort(sorted_labels_.begin(), sorted_labels_.end(), [](const auto& one, const auto& other) {
    return one.first != other.first ? one.first > other.first : one.second < other.second;
  });
}

void CtcUtterance::extend() {
  sort_labels();
  for (size_t place = 0; place < live_.size(); ++place) extend_entry(place);
}

void CtcUtterance::extend_entry(size_t place) {
  const size_t limit = static_cast<size_t>(model_->rules.beam_size) + std::max<size_t>(64, model_->rules.beam_size);
  const int32_t parent = live_[place].node;
  const double all = combine(live_[place].blank.value, live_[place].label.value);
  const double of_phrases = most_of_phrases(parent);
  const double largest_factor = std::max(model_->child_factor, model_->close_factor);
  const bool boundary = is_boundary(parent);
  const bool after_end = parent != 0 && model_->labels[prefixes_[parent].label].ends_word;
  for (const auto& [label_prob, label] : sorted_labels_) {
    const double reach = all * label_prob;
    if (reach == 0.0 || reach * largest_factor * of_phrases < threshold_) break;
    if (boundary && label == model_->rules.delimiter) continue;
    Entry& above = live_[place];
    const bool repeats = prefixes_[parent].label == label;
    const double from = (repeats ? above.blank.value : all) * label_prob;
    const bool closes = model_->labels[label].begins_word || after_end;
    const double factor = closes ? largest_factor : model_->child_factor;
    if (from == 0.0 || from * factor * of_phrases < threshold_) continue;
    if (of_phrases > 1.0) {  // a look is cheaper than a child
      const double worth = prefixes_.phrase_worth(parent, label);
      if (from * factor * (worth == 0.0 ? 1.0 : std::exp(worth)) < threshold_) continue;
    }
    const int32_t node = prefixes_.child(parent, label);
    CtcPrefix& prefix = prefixes_[node];
    if (prefix.live >= 0) continue;  // its parent's part was added when it stayed
    prefix.extra = prefixes_[parent].extra;
    const double value = from * prefix.factor;
    if (value * prefix.rank < threshold_ || value == 0.0) continue;
    Mass& source = !repeats && above.label.best > above.blank.best ? above.label : above.blank;
    next_.emplace_back();
    Entry& entry = next_.back();
    entry.node = node;
    entry.label.value = value;
    entry.label.best = source.best * label_prob * (model_->rules.last_times ? 1.0 : prefix.factor);
    entry.label.path = push(above, source);
    entry.label.start = static_cast<int32_t>(frame_);
    entry.label.end = static_cast<int32_t>(frame_) + 1;
    const auto width = static_cast<int64_t>(row_.size()) + 1;
    offer(next_.size() - 1, static_cast<int64_t>(place) * width + label + 1);
    tighten(limit);
  }
}

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
    return better(one.rank, one.order, other.rank, other.order);
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

void CtcUtterance::advance(const char* frame, bool half, int64_t label_stride) {
  if (!error_.empty() || !read(frame, half, label_stride)) return;
  stay();
  extend();
  if (model_->rules.merge_texts) merge_equal_texts();
  keep_best();
  if (model_->rules.last_times) rank_times();
  ++frame_;
  if (live_.empty()) {
    error_ = "no hypothesis survived frame " + std::to_string(frame_ - 1) + "; prune less (token_min_log_prob, top_labels).";
    live_.push_back(Entry{0, {}, {}});
    return;
  }
  rescale();
  collect();
}

}  // namespace shallowfusion
