#include "lexicon_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

namespace shallowfusion {
namespace {

constexpr int32_t kRoot = 0;
constexpr int32_t kStart = 0;  // the history without words
constexpr double kImpossibleScore = -std::numeric_limits<double>::infinity();

}  // namespace

void SpellingTrie::insert(const int32_t* labels, int64_t count, int32_t word, double score) {
  int32_t node = kRoot;
  for (int64_t i = 0; i < count; ++i) {
    const auto found = nodes_[node].children.find(labels[i]);
    if (found != nodes_[node].children.end()) {
      node = found->second;
      continue;
    }
    const auto child = static_cast<int32_t>(nodes_.size());
    nodes_[node].children.emplace(labels[i], child);
    nodes_.emplace_back();
    node = child;
  }
  nodes_[node].words.push_back(word);
  num_words_ = std::max(num_words_, int64_t{word} + 1);
  const double high = std::max(nodes_[node].best, score);
  const double low = std::min(nodes_[node].best, score);
  nodes_[node].best = high == kImpossibleScore ? high : high + std::log1p(std::exp(low - high));
}

void SpellingTrie::smear() {
  // Children come after their parents.
  for (size_t node = nodes_.size(); node-- > 0;) {
    for (const auto& child : nodes_[node].children) {
      nodes_[node].best = std::max(nodes_[node].best, nodes_[child.second].best);
    }
  }
}

WordHistories::WordHistories(std::shared_ptr<const NgramTable> table, std::vector<uint32_t> ids, double scale)
    : table_(std::move(table)), scale_(scale), ids_(std::move(ids)) {
  entries_.push_back({table_ == nullptr ? 0 : table_->start_state(), 0.0});
}

double WordHistories::score(int32_t history, int32_t word, int32_t* next) {
  const uint64_t key = static_cast<uint64_t>(static_cast<uint32_t>(history)) << 32 | static_cast<uint32_t>(word);
  const auto found = known_.find(key);
  if (found != known_.end()) {
    *next = found->second;
    return entries_[static_cast<size_t>(found->second)].log_prob;
  }
  Entry entry{0, 0.0};
  if (table_ != nullptr) {
    entry.log_prob = scale_ * table_->score(entries_[history].state, ids_[word], &entry.state);
  }
  *next = static_cast<int32_t>(entries_.size());
  entries_.push_back(entry);
  known_.emplace(key, *next);
  return entry.log_prob;
}

double WordHistories::finish(int32_t history) const {
  return table_ == nullptr ? 0.0 : scale_ * table_->end(entries_[history].state);
}

LexiconSearch::LexiconSearch(const LexiconRules& rules, std::shared_ptr<const SpellingTrie> trie, int32_t unknown_word,
                             std::shared_ptr<const NgramTable> table, std::vector<uint32_t> ids)
    : rules_(rules),
      trie_(std::move(trie)),
      unknown_word_(unknown_word),
      histories_(std::move(table), std::move(ids), rules.lm_scale) {
  const auto silence = static_cast<int32_t>(rules_.silence);
  trace_.push_back({-1, silence, -1});
  beam_.push_back({0.0, kStart, kRoot, silence, false, -1, 0});
  order_.resize(static_cast<size_t>(rules_.num_labels));
}

void LexiconSearch::add(double score, int32_t history, int32_t node, int32_t label, bool ends_in_blank, int32_t word,
                        const Path& parent) {
  best_ = std::max(best_, score);
  if (score < best_ - rules_.beam_margin || !(score > kImpossibleScore)) return;
  candidates_.push_back({score, history, node, label, ends_in_blank, word, parent.parent});
}

template <bool kHasTransitions>
double LexiconSearch::heard(const Path& path, int32_t label, const float* emissions) const {
  double emission = emissions[label];
  if constexpr (kHasTransitions) {  // nothing comes before the first frame
    if (frames_ > 0) emission += rules_.transitions[static_cast<size_t>(label * rules_.num_labels + path.label)];
  }
  return emission;
}

void LexiconSearch::extend_spelling(const Path& path, int32_t label, double emission) {
  const SpellingTrie::Node& from = trie_->at(path.node);
  const auto child = from.children.find(label);
  if (child == from.children.end()) return;
  const SpellingTrie::Node& node = trie_->at(child->second);
  const double promised = path.node == kRoot ? 0.0 : from.best;
  const double score = path.score + emission + (label == rules_.silence ? rules_.silence_score : 0.0);
  // Without a blank, spellings say repeats by labels of their own.
  const bool is_new = path.ends_in_blank || label != path.label || rules_.blank < 0;
  if (is_new && !node.children.empty()) {
    const double change = rules_.lm_weight * (node.best - promised);
    add(score + change, path.history, child->second, label, false, -1, path);
  }
  for (const int32_t word : node.words) {
    // A word of one label that is held for several frames is said once.
    if (path.node == kRoot && path.label == label) continue;
    int32_t history;
    const double log_prob = histories_.score(path.history, word, &history);
    add(score + rules_.lm_weight * (log_prob - promised) + rules_.word_score, history, kRoot, label, false, word, path);
  }
  if (node.words.empty() && rules_.unknown_score > kImpossibleScore) {
    int32_t history;
    const double log_prob = histories_.score(path.history, unknown_word_, &history);
    add(score + rules_.lm_weight * (log_prob - promised) + rules_.unknown_score, history, kRoot, label, false,
        unknown_word_, path);
  }
}

void LexiconSearch::extend_free(const Path& path, int32_t label, double emission) {
  const double score = path.score + emission + (label == rules_.silence ? rules_.silence_score : 0.0);
  if (label == rules_.blank) {
    add(score, path.history, kRoot, label, true, -1, path);
  } else if (label != path.label || path.ends_in_blank) {
    int32_t history;
    const double log_prob = histories_.score(path.history, label, &history);
    add(score + rules_.lm_weight * log_prob, history, kRoot, label, false, -1, path);
  } else {
    add(score, path.history, kRoot, label, false, -1, path);
  }
}

template <bool kHasTransitions>
void LexiconSearch::frame(const float* emissions) {
  std::iota(order_.begin(), order_.end(), 0);
  const auto before = [emissions](int32_t a, int32_t b) {
    return emissions[a] != emissions[b] ? emissions[a] > emissions[b] : a < b;
  };
  const int64_t looked_at = std::min(rules_.top_labels, rules_.num_labels);
  std::partial_sort(order_.begin(), order_.begin() + looked_at, order_.end(), before);
  best_ = kImpossibleScore;
  candidates_.clear();
  const auto silence = static_cast<int32_t>(rules_.silence);
  [[maybe_unused]] const auto blank = static_cast<int32_t>(rules_.blank);
  for (const Path& path : beam_) {
    for (int64_t rank = 0; rank < looked_at; ++rank) {
      const int32_t label = order_[static_cast<size_t>(rank)];
      const double emission = heard<kHasTransitions>(path, label, emissions);
      trie_ == nullptr ? extend_free(path, label, emission) : extend_spelling(path, label, emission);
    }
    if (trie_ == nullptr) continue;
    if (!path.ends_in_blank || path.node == kRoot) {
      const int32_t label = path.node == kRoot ? silence : path.label;
      const double bonus = label == silence ? rules_.silence_score : 0.0;
      const double emission = heard<kHasTransitions>(path, label, emissions);
      add(path.score + emission + bonus, path.history, path.node, label, false, -1, path);
    }
    if constexpr (!kHasTransitions) {
      add(path.score + emissions[blank], path.history, path.node, blank, true, -1, path);
    }
  }
  store();
}

void LexiconSearch::store() {
  const auto key = [](const Path& path) {
    return std::make_tuple(path.history, path.node, path.label, path.ends_in_blank);
  };
  const double least = best_ - rules_.beam_margin;
  const auto lost = [least](const Path& path) { return path.score < least; };
  candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), lost), candidates_.end());
  std::stable_sort(candidates_.begin(), candidates_.end(), [&](const Path& a, const Path& b) {
    return key(a) != key(b) ? key(a) < key(b) : a.score > b.score;
  });
  size_t kept = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    if (kept > 0 && key(candidates_[kept - 1]) == key(candidates_[i])) {
      Path& first = candidates_[kept - 1];
      if (!rules_.log_add) continue;
      const double high = std::max(first.score, candidates_[i].score);
      first.score = high + std::log1p(std::exp(std::min(first.score, candidates_[i].score) - high));
    } else {
      candidates_[kept++] = candidates_[i];
    }
  }
  candidates_.resize(kept);
  std::stable_sort(candidates_.begin(), candidates_.end(),
                   [](const Path& a, const Path& b) { return a.score > b.score; });
  if (candidates_.size() > static_cast<size_t>(rules_.beam_size)) candidates_.resize(rules_.beam_size);
  beam_.swap(candidates_);
  for (Path& path : beam_) {
    trace_.push_back({path.parent, path.label, path.word});
    path.parent = static_cast<int32_t>(trace_.size()) - 1;
  }
}

void LexiconSearch::step(const float* emissions, int64_t frames) {
  for (int64_t t = 0; t < frames; ++t, ++frames_) {
    const float* row = emissions + t * rules_.num_labels;
    rules_.transitions.empty() ? frame<false>(row) : frame<true>(row);
  }
}

void LexiconSearch::end() {
  const auto closed = [](const Path& path) { return path.node == kRoot; };
  const bool any_closed = std::any_of(beam_.begin(), beam_.end(), closed);
  best_ = kImpossibleScore;
  candidates_.clear();
  for (const Path& path : beam_) {
    if (any_closed && !closed(path)) continue;
    const double score = path.score + rules_.lm_weight * histories_.finish(path.history);
    add(score, path.history, path.node, static_cast<int32_t>(rules_.silence), false, -1, path);
  }
  store();
}

std::vector<LexiconResult> LexiconSearch::results() const {
  std::vector<LexiconResult> found;
  for (const Path& path : beam_) {
    LexiconResult result{path.score, {}, {}};
    for (int32_t at = path.parent; at >= 0; at = trace_[at].parent) {
      result.labels.push_back(trace_[at].label);
      if (trace_[at].word >= 0) result.words.push_back(trace_[at].word);
    }
    std::reverse(result.labels.begin(), result.labels.end());
    std::reverse(result.words.begin(), result.words.end());
    found.push_back(std::move(result));
  }
  return found;
}

}  // namespace shallowfusion
