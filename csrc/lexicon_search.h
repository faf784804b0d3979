// Beam search of CTC or ASG models whose words come from a lexicon of spellings, or which has no words: flashlight's,
// by facts.
//
// A beam holds the best alignments; those that agree in words, place in the lexicon, last label and ending are one.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <unordered_map>
#include <vector>

#include "ngram_table.h"

namespace shallowfusion {

struct LexiconRules {
  int64_t num_labels = 0;
  int64_t blank = 0;  // -1 = none, which goes with transitions
  int64_t silence = 0;
  int64_t beam_size = 50;
  int64_t top_labels = 0;  // looked at in each frame
  double beam_margin = 50.0;
  double lm_weight = 0.0;
  double lm_scale = 1.0;  // times nats is the unit of language scores
  double word_score = 0.0;
  double unknown_score = -std::numeric_limits<double>::infinity();
  double silence_score = 0.0;
  bool log_add = false;
  // [num_labels, num_labels], added where the row's label stands in the frame after the column's (ASG); empty = CTC.
  std::vector<float> transitions = {};
};

// The spellings of a lexicon as a trie; a node's `best` is the largest word score at or below it, where the scores of
// words of one spelling are added as logarithms.
class SpellingTrie {
 public:
  struct Node {
    std::unordered_map<int32_t, int32_t> children;
    std::vector<int32_t> words;
    double best = -std::numeric_limits<double>::infinity();
  };

  SpellingTrie() : nodes_(1) {}
  void insert(const int32_t* labels, int64_t count, int32_t word, double score);
  // Hands scores up, once all words are in.
  void smear();
  const Node& at(int32_t node) const { return nodes_[static_cast<size_t>(node)]; }
  int64_t num_words() const { return num_words_; }  // one more than the largest

 private:
  std::vector<Node> nodes_;
  int64_t num_words_ = 0;
};

// What an n-gram table says of word histories; each history is a number.
class WordHistories {
 public:
  WordHistories(std::shared_ptr<const NgramTable> table, std::vector<uint32_t> ids, double scale);
  // Scaled log-prob of a word after a history, and the history after it; 0 without a table.
  double score(int32_t history, int32_t word, int32_t* next);
  double finish(int32_t history) const;

 private:
  struct Entry {
    uint32_t state;
    double log_prob;
  };
  std::shared_ptr<const NgramTable> table_;
  double scale_;
  std::vector<uint32_t> ids_;  // of each word in the table
  std::vector<Entry> entries_;
  std::unordered_map<uint64_t, int32_t> known_;
};

struct LexiconResult {
  double score;
  std::vector<int32_t> labels;  // [frames + 2], silence at both ends
  std::vector<int32_t> words;
};

// One utterance in progress.
class LexiconSearch {
 public:
  // `trie` null = no lexicon: labels are the words of the language model.
  LexiconSearch(const LexiconRules& rules, std::shared_ptr<const SpellingTrie> trie, int32_t unknown_word,
                std::shared_ptr<const NgramTable> table, std::vector<uint32_t> ids);
  void step(const float* emissions, int64_t frames);
  void end();
  std::vector<LexiconResult> results() const;
  int64_t num_frames() const { return frames_; }

 private:
  struct Path {
    double score;
    int32_t history;
    int32_t node;
    int32_t label;
    bool ends_in_blank;
    int32_t word;  // closed here, -1 = none
    int32_t parent;  // in trace_
  };
  struct Trace {
    int32_t parent;
    int32_t label;
    int32_t word;
  };

  template <bool kHasTransitions>
  void frame(const float* emissions);
  // What a label says of its frame after a path.
  template <bool kHasTransitions>
  double heard(const Path& path, int32_t label, const float* emissions) const;
  void extend_spelling(const Path& path, int32_t label, double emission);
  void extend_free(const Path& path, int32_t label, double emission);
  void add(double score, int32_t history, int32_t node, int32_t label, bool ends_in_blank, int32_t word,
           const Path& parent);
  void store();

  LexiconRules rules_;
  std::shared_ptr<const SpellingTrie> trie_;
  int32_t unknown_word_;
  WordHistories histories_;
  int64_t frames_ = 0;
  double best_ = 0.0;
  std::vector<Path> beam_;  // `parent` is the path's own place in trace_
  std::vector<Path> candidates_;
  std::vector<Trace> trace_;
  std::vector<int32_t> order_;
};

}  // namespace shallowfusion
