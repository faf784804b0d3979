// Back-off n-gram language model as a trie of sorted children; natural logs. Described in shallowfusion/ngrams/table.py.
#pragma once

#include <cstdint>
#include <vector>

#include "word_table.h"

namespace shallowfusion {

// The n-grams of one order as read: words [count, order], log-probs and back-offs [count].
struct NgramArrays {
  const int32_t* words;
  const float* log_probs;
  const float* back_offs;
  int64_t count;
};

// A node is an n-gram: the root is the empty one, its children the unigrams, node 1 + word. Nodes of one order are
// sorted by their words, so the children of a node lie side by side, sorted. `suffix` leads to the longest proper
// suffix that is a node. A state is the node of the longest suffix of the history that can still matter: one that has
// children or a back-off.
//
// Immutable once built, so any number of threads may read it. 24 bytes per n-gram.
class NgramTable final : public WordTable {
 public:
  // orders[n - 1] holds the n-grams of n words. Throws std::invalid_argument for words out of range, unigrams that are
  // not every word once, the same n-gram twice, and log-probs or back-offs that are NaN or +inf.
  NgramTable(int64_t num_words, const std::vector<NgramArrays>& orders, int64_t begin_word, int64_t end_word,
             int64_t unknown_word);

  // Log-prob of `word` after `state`, O(order * log children); writes the state after it.
  float score(uint32_t state, uint32_t word, uint32_t* next_state) const override {
    float back_off = 0.0F;
    for (uint32_t node = state; node != kRoot; node = suffix_[node]) {
      const uint32_t child = find_child(node, word);
      if (child != kRoot) {
        *next_state = state_of_[child];
        return back_off + log_prob_[child];
      }
      back_off += back_off_[node];
    }
    *next_state = state_of_[1 + word];
    return back_off + log_prob_[1 + word];
  }

  // Log-prob of the end of the sentence.
  float end(uint32_t state) const override {
    uint32_t next_state;
    return score(state, end_word_, &next_state);
  }

  // Writes the log-prob of every word after `state`, `log_probs` [num_words]: one pass over the unigrams, then the
  // n-grams that extend the state.
  void dense(uint32_t state, float* log_probs) const;

  uint32_t start_state() const { return start_state_; }  // after the begin word
  uint32_t null_state() const { return kRoot; }          // after nothing

  uint32_t num_words() const override { return num_words_; }
  uint32_t num_states() const override { return static_cast<uint32_t>(word_.size()); }  // states are below this
  int64_t order() const { return order_; }
  uint32_t begin_word() const { return begin_word_; }
  uint32_t end_word() const { return end_word_; }
  uint32_t unknown_word() const override { return unknown_word_; }
  int64_t num_bytes() const;

  // The arrays as they lie, one entry per node (first_child: and one more), for look-ups elsewhere.
  const std::vector<uint32_t>& words() const { return word_; }
  const std::vector<uint32_t>& first_children() const { return first_child_; }
  const std::vector<uint32_t>& suffixes() const { return suffix_; }
  const std::vector<uint32_t>& states() const { return state_of_; }
  const std::vector<float>& log_probs() const { return log_prob_; }
  const std::vector<float>& back_offs() const { return back_off_; }

 private:
  static constexpr uint32_t kRoot = 0;

  struct Level;

  uint32_t find_child(uint32_t node, uint32_t word) const;
  static Level sorted_level(const NgramArrays& given, int64_t order, const Level* longer);
  void lay_out(const std::vector<Level>& levels);
  void link_suffixes();
  void choose_states();

  uint32_t num_words_;
  uint32_t begin_word_;
  uint32_t end_word_;
  uint32_t unknown_word_;
  uint32_t start_state_ = kRoot;
  int64_t order_;
  std::vector<uint32_t> word_;         // the last word of each node
  std::vector<uint32_t> first_child_;  // [nodes + 1]
  std::vector<uint32_t> suffix_;
  std::vector<uint32_t> state_of_;  // the state a search is in once it has seen this n-gram
  std::vector<uint32_t> parent_;    // only while building
  std::vector<float> log_prob_;
  std::vector<float> back_off_;
};

}  // namespace shallowfusion
