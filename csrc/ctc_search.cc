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

std::string shown(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

}  // namespace

CtcUtterance::CtcUtterance(const CtcModel& model, uint32_t start_state)
    : model_(&model), prefixes_(model.labels, model.language, model.phrase_steps.get(), start_state) {
  live_.push_back(Entry{0, {}, {}});
  live_[0].blank.value = live_[0].blank.best = 1.0;
  prefixes_[0].live = 0;
  row_.resize(model.labels.size());
  probs_.resize(model.labels.size(), Prob{-1, 0.0});
  if (model.phrase_steps != nullptr) label_places_.resize(model.labels.size());
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
    return one.is_before(other);
  };
  std::nth_element(candidates_.begin(), candidates_.begin() + (keep - 1), candidates_.end(), before);
  candidates_.resize(keep);
  threshold_ = std::max(threshold_, candidates_[keep - 1].rank);
}

// Labels that can still make a candidate, best first.
void CtcUtterance::sort_labels() {
  double largest = 0.0;
  for (const Entry& entry : live_) {
    const double mass = combine(entry.blank.value, entry.label.value);
    largest = std::max(largest, mass * prefixes_[entry.node].most_of_phrases);
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
  if (sorted_labels_.empty()) return;
  if (model_->phrase_steps != nullptr) {
    std::fill(label_places_.begin(), label_places_.end(), LabelPlace{0.0, -1});
    for (size_t place = 0; place < sorted_labels_.size(); ++place) {
      label_places_[sorted_labels_[place].second] = {sorted_labels_[place].first, static_cast<int32_t>(place)};
    }
  }
  for (size_t place = 0; place < live_.size(); ++place) extend_entry(place);
}

void CtcUtterance::extend_entry(size_t place) {
  const int32_t parent = live_[place].node;
  const double all = combine(live_[place].blank.value, live_[place].label.value);
  const double factor = all * std::max(model_->child_factor, model_->close_factor);
  const float most = prefixes_[parent].most_of_phrases;
  if (factor * most * sorted_labels_[0].first < threshold_) return;
  const bool after_end = parent != 0 && model_->labels[prefixes_[parent].label].ends_word;
  const Above above{static_cast<int32_t>(place), parent, all, is_boundary(parent), after_end};
  if (most != 1.0F) {
    extend_in_phrases(above, factor);
    return;
  }
  for (const auto& [label_prob, label] : sorted_labels_) {
    if (all * label_prob == 0.0 || factor * label_prob < threshold_) return;
    extend_by(above, label_prob, label, 1.0);
  }
}

// Labels in order, until none that is usual to the phrases can make a candidate, and all others that can.
void CtcUtterance::extend_in_phrases(const Above& above, double factor) {
  const CtcPhraseSteps& steps = *model_->phrase_steps;
  const PhraseSite site = prefixes_.phrase_site(prefixes_[above.node]);
  const CtcPhraseSteps::Own own = steps.own(site);
  if (steps.is_full(own)) {
    const double most = factor * prefixes_[above.node].most_of_phrases;
    for (const auto& [label_prob, label] : sorted_labels_) {
      if (above.all * label_prob == 0.0 || most * label_prob < threshold_) return;
      const float worth = own.first[label].factor;
      if (factor * worth * label_prob >= threshold_) extend_by(above, label_prob, label, worth);
    }
    return;
  }
  own_places_.clear();
  const auto add = [&](int32_t label, float phrase_factor) {
    const LabelPlace& found = label_places_[label];
    if (found.place < 0 || factor * phrase_factor * found.prob < threshold_) return;
    own_places_.emplace_back(found.place, phrase_factor);
  };
  for (const CtcPhraseSteps::Step* step = own.first; step != own.last; ++step) add(step->label, step->factor);
  for (const int32_t label : steps.silent()) add(label, steps.silent_factor(site));
  std::sort(own_places_.begin(), own_places_.end());
  const CtcPhraseSteps::Usual usual = steps.usual(site);
  auto next_own = own_places_.begin();
  for (size_t next = 0; next < sorted_labels_.size(); ++next) {
    const auto [label_prob, label] = sorted_labels_[next];
    if (above.all * label_prob == 0.0 || factor * usual.most * label_prob < threshold_) break;
    const bool is_own = next_own != own_places_.end() && next_own->first == static_cast<int32_t>(next);
    const float worth = is_own ? next_own->second : usual.factor(label);
    next_own += is_own;
    if (factor * worth * label_prob >= threshold_) extend_by(above, label_prob, label, worth);
  }
  for (; next_own != own_places_.end(); ++next_own) {
    const auto [label_prob, label] = sorted_labels_[next_own->first];
    extend_by(above, label_prob, label, next_own->second);
  }
}

void CtcUtterance::extend_by(const Above& above, double label_prob, int32_t label, double phrase_factor) {
  if (above.at_boundary && label == model_->rules.delimiter) return;
  const int32_t parent = above.node;
  Entry& source_entry = live_[above.place];
  const bool repeats = prefixes_[parent].label == label;
  const double from = (repeats ? source_entry.blank.value : above.all) * label_prob;
  const bool closes = model_->labels[label].begins_word || above.after_end;
  const double factor = closes ? std::max(model_->child_factor, model_->close_factor) : model_->child_factor;
  if (from == 0.0 || from * factor * phrase_factor < threshold_) return;  // a look is cheaper than a child
  const int32_t node = prefixes_.child(parent, label);
  CtcPrefix& prefix = prefixes_[node];
  if (prefix.live >= 0) return;  // its parent's part was added when it stayed
  prefix.extra = prefixes_[parent].extra;
  const double value = from * prefix.factor;
  if (value * prefix.rank < threshold_ || value == 0.0) return;
  Mass& source =
      !repeats && source_entry.label.best > source_entry.blank.best ? source_entry.label : source_entry.blank;
  next_.emplace_back();
  Entry& entry = next_.back();
  entry.node = node;
  entry.label.value = value;
  entry.label.best = source.best * label_prob * (model_->rules.last_times ? 1.0 : prefix.factor);
  entry.label.path = push(source_entry, source);
  entry.label.start = static_cast<int32_t>(frame_);
  entry.label.end = static_cast<int32_t>(frame_) + 1;
  const auto width = static_cast<int64_t>(row_.size()) + 1;
  offer(next_.size() - 1, static_cast<int64_t>(above.place) * width + label + 1);
  tighten(static_cast<size_t>(model_->rules.beam_size) + std::max<size_t>(64, model_->rules.beam_size));
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
