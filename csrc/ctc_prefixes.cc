#include "ctc_prefixes.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "capacity_error.h"

namespace shallowfusion {
namespace {

constexpr uint64_t kEmptyHash = 0xcbf29ce484222325u;  // FNV-1a, 64 bits
constexpr int32_t kUsualWord = 6;                     // characters; longer unknown words cost more

uint64_t hash_byte(uint64_t hash, uint8_t byte) { return (hash ^ byte) * 0x100000001b3u; }

uint64_t hash_bytes(uint64_t hash, const std::string& bytes) {
  for (const char byte : bytes) hash = hash_byte(hash, static_cast<uint8_t>(byte));
  return hash;
}

}  // namespace

CtcPrefixes::CtcPrefixes(const std::vector<CtcLabel>& labels, const CtcLanguage& language,
                         const CtcPhraseSteps* phrase_steps, uint32_t start_state)
    : labels_(&labels), language_(&language), phrase_steps_(phrase_steps), slots_(64, -1) {
  nodes_.push_back(CtcPrefix{-1, -1, 0.0, 0.0, 1.0, 1.0, kEmptyHash, kEmptyHash, 0, start_state, CtcLexicon::kRoot,
                             CtcLexicon::kRoot, 0, -1, -1});
  if (phrase_steps == nullptr) return;
  nodes_[0].phrase = language.phrases->start_state();
  nodes_[0].most_of_phrases = phrase_steps->most(phrase_site(nodes_[0]));
}

size_t CtcPrefixes::slot(int32_t parent, int32_t label) const {
  uint64_t key = (static_cast<uint64_t>(static_cast<uint32_t>(parent)) << 32) | static_cast<uint32_t>(label);
  key = (key ^ (key >> 31)) * 0x9e3779b97f4a7c15u;
  const size_t mask = slots_.size() - 1;
  size_t at = static_cast<size_t>(key >> 32) & mask;
  while (slots_[at] >= 0 && (nodes_[slots_[at]].parent != parent || nodes_[slots_[at]].label != label)) {
    at = (at + 1) & mask;
  }
  return at;
}

void CtcPrefixes::rehash(size_t num_slots) {
  slots_.assign(num_slots, -1);
  for (size_t node = 1; node < nodes_.size(); ++node) {
    slots_[slot(nodes_[node].parent, nodes_[node].label)] = static_cast<int32_t>(node);
  }
}

int32_t CtcPrefixes::child(int32_t parent, int32_t label) {
  size_t at = slot(parent, label);
  if (slots_[at] >= 0) return slots_[at];
  if (nodes_.size() >= static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw CapacityError("a CTC search holds 2^31 - 1 prefixes; use a smaller beam_size.");
  }
  if (2 * (nodes_.size() + 1) > slots_.size()) {
    rehash(2 * slots_.size());
    at = slot(parent, label);
  }
  CtcPrefix node = nodes_[parent];
  node.parent = parent;
  node.label = label;
  node.live = -1;
  make(node, nodes_[parent]);
  const auto number = static_cast<int32_t>(nodes_.size());
  if (node.last_close == -2) node.last_close = number;
  nodes_.push_back(node);
  slots_[at] = number;
  return number;
}

void CtcPrefixes::make(CtcPrefix& node, const CtcPrefix& above) const {
  const CtcLabel& label = (*labels_)[node.label];
  const bool after_end = above.label >= 0 && (*labels_)[above.label].ends_word;
  if ((label.begins_word || after_end) && node.word_characters > 0) {
    node.closed_hash = node.word_hash;
    node.last_close = -2;  // itself, once it has a number
    close_word(node);
  }
  const bool spaced = node.word_characters == 0 && node.text_hash != kEmptyHash;
  spell(node, label);
  if (phrase_steps_ != nullptr && !label.text.empty()) say(node, phrase_site(above), spaced);
  node.fused += language_->label_bonus;
  if (language_->table != nullptr && language_->label_level) {
    const double log_prob = language_->table->score(node.lm_state, label.language_word, &node.lm_state);
    node.lm += log_prob;
    node.fused += language_->weight * log_prob;
  }
  node.factor = node.fused == above.fused ? 1.0 : std::exp(node.fused - above.fused);
  if (phrase_steps_ != nullptr) node.most_of_phrases = phrase_steps_->most(phrase_site(node));
  const double partly = partial(node);
  const bool is_lent = phrase_steps_ != nullptr && partly == phrase_steps_->held(node.phrase);
  node.rank = partly == 0.0 ? 1.0 : is_lent ? phrase_steps_->loan(node.phrase) : std::exp(partly);
}

void CtcPrefixes::spell(CtcPrefix& node, const CtcLabel& label) const {
  if (label.text.empty()) return;
  if (node.word_characters == 0 && node.text_hash != kEmptyHash) node.text_hash = hash_byte(node.text_hash, ' ');
  node.text_hash = hash_bytes(node.text_hash, label.text);
  node.word_hash = hash_bytes(node.word_hash, label.text);
  node.word_characters += count_characters(label.text);
  if (language_->lexicon != nullptr) node.lexicon = language_->lexicon->advance(node.lexicon, label.text);
  if (language_->hotwords != nullptr) node.hotword = language_->hotwords->advance(node.hotword, label.text);
}

// Phrases gain for good here; what they lend only ranks.
void CtcPrefixes::say(CtcPrefix& node, const PhraseSite& site, bool spaced) const {
  const CtcPhraseSteps::Step step = phrase_steps_->step(site, node.label);
  if (!std::isnan(step.gain)) {
    node.phrase = step.state;
    node.fused += step.gain;
    return;
  }
  if (spaced) node.fused += language_->phrases->say(&node.phrase, ' ');
  for (const char byte : (*labels_)[node.label].text) {
    node.fused += language_->phrases->say(&node.phrase, static_cast<uint8_t>(byte));
  }
}

PhraseSite CtcPrefixes::phrase_site(const CtcPrefix& above) const {
  const bool after_end = above.label >= 0 && (*labels_)[above.label].ends_word;
  const bool is_begun = above.text_hash != kEmptyHash;
  return {above.phrase, is_begun, is_begun && (after_end || above.word_characters == 0)};
}

void CtcPrefixes::close_word(CtcPrefix& node) const {
  const CtcLanguage& language = *language_;
  if (language.lexicon != nullptr) {
    const LexiconWord* word = language.lexicon->word(node.lexicon);
    const uint32_t id = word == nullptr ? language.table->unknown_word() : word->language_word;
    const double log_prob = language.table->score(node.lm_state, id, &node.lm_state);
    node.lm += log_prob;
    node.fused += language.weight * log_prob;
    if (word == nullptr || word->known == 0) node.fused += language.unknown_word;
  }
  if (language.hotwords != nullptr && language.hotwords->word(node.hotword) != nullptr) {
    node.fused += language.hotword_weight;
  }
  node.fused += language.word_bonus;
  node.lexicon = node.hotword = CtcLexicon::kRoot;
  node.word_characters = 0;
  node.word_hash = kEmptyHash;
}

double CtcPrefixes::partial(const CtcPrefix& node) const {
  const CtcLanguage& language = *language_;
  const double held = phrase_steps_ == nullptr ? 0.0 : phrase_steps_->held(node.phrase);
  if (node.word_characters == 0) return held;
  const int32_t wanted = language.hotwords == nullptr ? 0 : language.hotwords->shortest(node.hotword);
  if (wanted != 0) return held + language.hotword_weight * node.word_characters / wanted;
  if (language.lexicon == nullptr) return held;
  const uint32_t known = language.lexicon->known(node.lexicon);
  double unknown = 0.0;
  for (size_t set = 0; set < language.unknown_prefixes.size(); ++set) {
    if ((known >> set & 1) == 0) unknown += language.unknown_prefixes[set];
  }
  if (unknown == 0.0) return held;
  const double scale = static_cast<double>(std::max(node.word_characters, kUsualWord)) / kUsualWord;
  return held + unknown * scale;
}

CtcEnding CtcPrefixes::ending(int32_t number) const {
  const CtcLanguage& language = *language_;
  CtcPrefix node = nodes_[number];
  if (node.word_characters > 0 || (language.score_empty_word && language.lexicon != nullptr)) close_word(node);
  if (language.phrases != nullptr) node.fused += language.phrases->closing(node.phrase);
  const uint32_t state = node.lm_state;
  if (language.table != nullptr && language.score_end) {
    const double log_prob = language.table->end(state);
    node.lm += log_prob;
    node.fused += language.weight * log_prob;
  }
  return {node.fused, node.lm, state};
}

uint64_t CtcPrefixes::history_hash(int32_t node, int64_t words) const {
  uint64_t hash = kEmptyHash;
  const auto take = [&hash](uint64_t value) { hash = (hash ^ value) * 0x9e3779b97f4a7c15u; hash ^= hash >> 32; };
  take(nodes_[node].word_hash);
  take(nodes_[node].phrase);
  for (int32_t at = nodes_[node].last_close; words > 0 && at >= 0; --words) {
    take(nodes_[at].closed_hash);
    at = nodes_[nodes_[at].parent].last_close;
  }
  return hash;
}

std::vector<int32_t> CtcPrefixes::compact(const std::vector<int32_t>& live) {
  std::vector<int32_t> numbers(nodes_.size(), -1);
  numbers[0] = 0;
  for (const int32_t node : live) numbers[node] = 0;
  for (size_t node = nodes_.size(); node-- > 1;) {
    if (numbers[node] == 0) numbers[nodes_[node].parent] = 0;
  }
  int32_t next = 0;
  for (size_t node = 0; node < nodes_.size(); ++node) {
    if (numbers[node] < 0) continue;
    CtcPrefix moved = nodes_[node];
    numbers[node] = next;
    if (moved.parent >= 0) moved.parent = numbers[moved.parent];
    if (moved.last_close >= 0) moved.last_close = numbers[moved.last_close];
    nodes_[next++] = moved;
  }
  nodes_.resize(next);
  size_t num_slots = 64;
  while (num_slots < 4 * nodes_.size()) num_slots *= 2;
  rehash(num_slots);
  return numbers;
}

}  // namespace shallowfusion
