// From the beam of a CTC search to its hypotheses; the batch.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "ctc_search.h"
#include "float_mode.h"
#include "thread_pool.h"

namespace shallowfusion {
namespace {

constexpr double kRounding = 1.0 + 1e-6;  // bounds must hold for products of rounded numbers

double log_add(double one, double other) {
  const double largest = std::max(one, other);
  if (largest == -std::numeric_limits<double>::infinity()) return largest;
  return largest + std::log1p(std::exp(std::min(one, other) - largest));
}

}  // namespace

CtcModel::CtcModel(CtcRules rules_given, std::vector<CtcLabel> labels_given, CtcLanguage language_given)
    : rules(rules_given), labels(std::move(labels_given)), language(std::move(language_given)) {
  const auto gain = [](double value) { return std::max(0.0, value); };
  const auto raises = [](double nats) { return nats > 0.0; };
  const bool unbounded = language.weight < 0.0 || std::any_of(language.unknown_prefixes.begin(),
                                                              language.unknown_prefixes.end(), raises);
  const double hotword = language.hotwords == nullptr ? 0.0 : gain(language.hotword_weight);
  const double label = gain(language.label_bonus) + hotword;
  const double close = label + gain(language.word_bonus) + hotword + gain(language.unknown_word);
  const double infinity = std::numeric_limits<double>::infinity();
  child_factor = unbounded ? infinity : std::exp(label) * kRounding;
  close_factor = unbounded ? infinity : std::exp(close) * kRounding;
  if (language.phrases != nullptr) {
    phrase_steps = std::make_unique<CtcPhraseSteps>(labels, rules.blank, language.phrases);
  }
}

// Live prefixes with their final scores, best first; equal texts are one.
std::vector<CtcUtterance::Ending> CtcUtterance::endings(bool ended) const {
  const CtcRules& rules = model_->rules;
  std::vector<Ending> found;
  std::unordered_map<uint64_t, size_t> places;
  for (size_t index = 0; index < live_.size(); ++index) {
    const Entry& entry = live_[index];
    const CtcPrefix& node = prefixes_[entry.node];
    const double mass = combine(entry.blank.value, entry.label.value);
    if (mass <= 0.0) continue;
    const double asr = std::log(mass) + offset_ - node.fused - node.extra;
    const CtcEnding ending = ended ? prefixes_.ending(entry.node) : CtcEnding{node.fused, node.lm, node.lm_state};
    if (rules.delimiter >= 0 || rules.merge_texts) {
      const auto [at, is_new] = places.emplace(node.text_hash, found.size());
      if (!is_new) {
        Ending& first = found[at->second];
        first.asr = rules.use_max ? std::max(first.asr, asr) : log_add(first.asr, asr);
        const Entry& timed = live_[first.timed];
        const bool later = std::max(entry.blank.best, entry.label.best) > std::max(timed.blank.best, timed.label.best);
        if (rules.last_times && later) {
          first.timed = static_cast<int32_t>(index);
          if (model_->language.score_empty_word) first.ending = ending;
        }
        continue;
      }
    }
    found.push_back({static_cast<int32_t>(index), asr, ending, 0.0, static_cast<int32_t>(index)});
  }
  double best = -std::numeric_limits<double>::infinity();
  for (Ending& one : found) {
    one.total = one.asr + one.ending.fused + prefixes_[live_[one.entry].node].extra;
    best = std::max(best, one.total);
  }
  const auto outside = [&](const Ending& one) { return one.total < best - rules.beam_margin; };
  found.erase(std::remove_if(found.begin(), found.end(), outside), found.end());
  std::stable_sort(found.begin(), found.end(),
                   [](const Ending& one, const Ending& other) { return one.total > other.total; });
  return found;
}

std::vector<int32_t> CtcUtterance::labels_of(int32_t node) const {
  std::vector<int32_t> labels;
  for (; node > 0; node = prefixes_[node].parent) labels.push_back(prefixes_[node].label);
  std::reverse(labels.begin(), labels.end());
  return labels;
}

std::vector<CtcLive> CtcUtterance::live() const {
  std::vector<CtcLive> found;
  if (!error_.empty()) return found;
  for (const Entry& entry : live_) {
    const CtcPrefix& node = prefixes_[entry.node];
    CtcLive made{"", false, node.extra};
    bool fresh = true;  // the next text begins a word
    for (const int32_t number : labels_of(entry.node)) {
      const CtcLabel& label = model_->labels[number];
      fresh = fresh || label.begins_word;
      if (!label.text.empty()) {
        if (fresh && !made.text.empty()) made.text += ' ';
        made.text += label.text;
        fresh = false;
      }
      fresh = fresh || label.ends_word;
    }
    made.is_open = !fresh;
    found.push_back(std::move(made));
  }
  return found;
}

CtcHypothesis CtcUtterance::hypothesis(const Ending& ending) const {
  const Entry& entry = live_[ending.entry];
  CtcHypothesis made;
  made.total = ending.total;
  made.asr = ending.asr;
  made.lm = ending.ending.lm;
  made.lm_state = ending.ending.lm_state;
  made.extra = prefixes_[entry.node].extra;
  spell(entry, made);
  if (ending.timed != ending.entry) {
    CtcHypothesis other;
    spell(live_[ending.timed], other);
    made.word_frames = other.word_frames;
  }
  return made;
}

// Writes labels, text and times of a prefix.
void CtcUtterance::spell(const Entry& entry, CtcHypothesis& made) const {
  made.labels = labels_of(entry.node);
  made.label_frames.resize(2 * made.labels.size());
  const Mass& mass = entry.label.best > entry.blank.best ? entry.label : entry.blank;
  PathNode last{mass.path, mass.start, mass.end};
  for (size_t index = made.labels.size(); index-- > 0;) {
    made.label_frames[2 * index] = last.start;
    made.label_frames[2 * index + 1] = last.end;
    if (last.previous >= 0) last = paths_[last.previous];
  }
  bool fresh = true;  // the next text begins a word
  for (size_t index = 0; index < made.labels.size(); ++index) {
    const CtcLabel& label = model_->labels[made.labels[index]];
    fresh = fresh || label.begins_word;
    if (!label.text.empty()) {
      if (fresh) {
        if (!made.text.empty()) made.text += ' ';
        made.word_frames.push_back(made.label_frames[2 * index]);
        made.word_frames.push_back(made.label_frames[2 * index + 1]);
        fresh = false;
      }
      made.text += label.text;
      made.word_frames.back() = made.label_frames[2 * index + 1];
    }
    fresh = fresh || label.ends_word;
  }
}

std::vector<CtcHypothesis> CtcUtterance::results(int64_t n_best, bool ended) const {
  std::vector<CtcHypothesis> hypotheses;
  if (!error_.empty()) return hypotheses;
  for (const Ending& ending : endings(ended)) {
    if (static_cast<int64_t>(hypotheses.size()) == n_best) break;
    hypotheses.push_back(hypothesis(ending));
  }
  return hypotheses;
}

CtcState::CtcState(std::shared_ptr<const CtcModel> model, const std::vector<uint32_t>& start_states)
    : model_(std::move(model)) {
  utterances_.reserve(start_states.size());
  for (const uint32_t state : start_states) utterances_.emplace_back(*model_, state);
}

void CtcState::step(const CtcFrames& frames, int threads) {
  if (frames.num_utterances != num_utterances()) {
    throw std::invalid_argument("log_probs holds " + std::to_string(frames.num_utterances) +
                                " utterances, the state " + std::to_string(num_utterances()) + ".");
  }
  parallel_for(num_utterances(), threads, [&](int64_t number) {
    const FlushDenormals flush;
    CtcUtterance& utterance = utterances_[number];
    const char* frame = frames.data + number * frames.strides[0];
    for (int64_t index = 0; index < frames.counts[number]; ++index, frame += frames.strides[1]) {
      utterance.advance(frame, frames.half, frames.strides[2]);
    }
  });
}

void CtcState::set_extras(const std::vector<std::vector<double>>& extras) {
  if (static_cast<int64_t>(extras.size()) != num_utterances()) {
    throw std::invalid_argument("extras must have one list per utterance, " + std::to_string(num_utterances()) +
                                ", got " + std::to_string(extras.size()) + ".");
  }
  for (size_t number = 0; number < extras.size(); ++number) {
    const size_t wanted = utterances_[number].live().size();
    if (extras[number].size() != wanted) {
      throw std::invalid_argument("extras[" + std::to_string(number) + "] must have one number per live prefix, " +
                                  std::to_string(wanted) + ", got " + std::to_string(extras[number].size()) + ".");
    }
    for (const double extra : extras[number]) {
      if (!std::isfinite(extra)) throw std::invalid_argument("extras must be finite.");
    }
  }
  for (size_t number = 0; number < extras.size(); ++number) utterances_[number].set_extras(extras[number]);
}

const CtcUtterance& CtcState::utterance(int64_t number) const {
  if (number < 0 || number >= num_utterances()) {
    throw std::invalid_argument("utterance must be from 0 to " + std::to_string(num_utterances() - 1) + ", got " +
                                std::to_string(number) + ".");
  }
  return utterances_[number];
}

std::vector<std::vector<CtcHypothesis>> CtcState::results(int64_t n_best, bool ended, int threads) const {
  std::vector<std::vector<CtcHypothesis>> found(utterances_.size());
  parallel_for(num_utterances(), threads, [&](int64_t number) { found[number] = utterances_[number].results(n_best, ended); });
  return found;
}

}  // namespace shallowfusion
