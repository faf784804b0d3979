// The tree of label prefixes a CTC search has met, with what language models and bonuses say of each.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ctc_labels.h"
#include "ctc_lexicon.h"
#include "ctc_phrase_steps.h"
#include "phrase_automaton.h"
#include "word_table.h"

namespace shallowfusion {

// What words and labels are worth; all in nats, weights applied unless said otherwise.
struct CtcLanguage {
  std::shared_ptr<const WordTable> table;  // null: no language model
  bool label_level = false;               // the table's words are labels, not words
  double weight = 0.0;
  double word_bonus = 0.0;   // per closed word
  double label_bonus = 0.0;  // per label
  double unknown_word = 0.0;
  // Ranks only, while a word is being spelled that no word of a set begins with; scaled up beyond six characters.
  std::vector<double> unknown_prefixes{0.0};
  bool score_end = true;
  bool score_empty_word = false;  // a text that ends with a delimiter closes one more, unknown word
  std::shared_ptr<const CtcLexicon> lexicon;   // null: no word-level table
  std::shared_ptr<const CtcLexicon> hotwords;  // null: none
  double hotword_weight = 0.0;
  std::shared_ptr<const PhraseAutomaton> phrases;  // of bytes of text; null: none
};

struct CtcPrefix {
  int32_t parent;  // -1: the empty prefix
  int32_t label;
  double fused;   // weighted language scores and bonuses so far
  double lm;      // unweighted language log-prob so far
  double factor;  // exp(fused - fused of the parent)
  double rank;    // exp of what only ranks: the word being spelled
  uint64_t text_hash;
  uint64_t word_hash;    // of the word being spelled
  uint64_t closed_hash;  // of the word this prefix closed
  uint32_t lm_state;
  int32_t lexicon;
  int32_t hotword;
  int32_t word_characters;  // of the word being spelled; 0 between words
  int32_t last_close;       // the prefix, itself included, that last closed a word; -1: none
  int32_t live;             // place in the beam; -1: none
  double extra = 0.0;       // nats that the caller set of a live prefix; others have their parent's
  uint32_t phrase = 0;      // state of the automaton after the text
  float most_of_phrases = 1.0F;  // no label multiplies the rank of a child by more, as phrases go
};

// What the end of the utterance adds to a prefix.
struct CtcEnding {
  double fused;
  double lm;
  uint32_t lm_state;  // before the end of the sentence
};

class CtcPrefixes {
 public:
  // `phrase_steps`: of the language's phrases; null without any.
  CtcPrefixes(const std::vector<CtcLabel>& labels, const CtcLanguage& language, const CtcPhraseSteps* phrase_steps,
              uint32_t start_state);

  int32_t child(int32_t parent, int32_t label);  // found or made
  PhraseSite phrase_site(const CtcPrefix& above) const;
  CtcEnding ending(int32_t node) const;
  uint64_t history_hash(int32_t node, int64_t words) const;

  CtcPrefix& operator[](int32_t node) { return nodes_[node]; }
  const CtcPrefix& operator[](int32_t node) const { return nodes_[node]; }
  size_t size() const { return nodes_.size(); }

  // Forgets prefixes that no live one descends from; returns the new number of each old prefix, -1 if gone.
  std::vector<int32_t> compact(const std::vector<int32_t>& live);

 private:
  void make(CtcPrefix& node, const CtcPrefix& above) const;
  void spell(CtcPrefix& node, const CtcLabel& label) const;
  void say(CtcPrefix& node, const PhraseSite& site, bool spaced) const;
  void close_word(CtcPrefix& node) const;
  double partial(const CtcPrefix& node) const;
  size_t slot(int32_t parent, int32_t label) const;
  void rehash(size_t num_slots);

  const std::vector<CtcLabel>* labels_;
  const CtcLanguage* language_;
  const CtcPhraseSteps* phrase_steps_;
  std::vector<CtcPrefix> nodes_;  // a parent before its children
  std::vector<int32_t> slots_;    // open addressing by (parent, label); -1 is free
};

}  // namespace shallowfusion
