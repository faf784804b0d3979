// Aho-Corasick automaton that boosts phrases of token ids. Described in shallowfusion/phrases/automaton.py.
#pragma once

#include <cstdint>
#include <vector>

namespace shallowfusion {

// Token sequences to look for. Pattern i holds tokens[offsets[i]] .. tokens[offsets[i + 1] - 1]; credits are what a
// match of its first tokens is worth; `phrases` tells which patterns are spellings of the same phrase.
struct PhrasePatterns {
  const int32_t* tokens;
  const double* credits;
  const int64_t* offsets;  // [count + 1]
  const int64_t* phrases;  // [count]
  int64_t count;
};

// A node is a beginning of patterns, numbered level by level; a state is the longest suffix of the tokens that is a
// node. `gain` is what arriving at a node is worth for good: the last credits of the phrases that end there, each once.
// `held` is lent to the match in progress and taken back when it goes on or fails.
//
// Immutable once built, so any number of threads may read it. 24 bytes per node.
class PhraseAutomaton {
 public:
  // Throws std::invalid_argument for empty patterns, negative tokens and credits that are not finite.
  explicit PhraseAutomaton(const PhrasePatterns& patterns);

  int64_t num_states() const { return static_cast<int64_t>(token_.size()); }
  uint32_t next(uint32_t state, int32_t token) const;
  float held(uint32_t state) const { return held_[state]; }
  float gain(uint32_t state) const { return gain_[state]; }

  struct Arc {
    int32_t token;
    uint32_t target;
  };
  // The tokens that lead from a state to nodes of more than one token, sorted; `with_first`: to any but the root.
  void arcs(uint32_t state, bool with_first, std::vector<Arc>* found) const;

 private:
  static constexpr uint32_t kRoot = 0;

  uint32_t find_child(uint32_t node, int32_t token) const;
  std::vector<uint32_t> lay_out(const PhrasePatterns& patterns);  // the last node of each pattern
  void link_suffixes();
  void value(const PhrasePatterns& patterns, const std::vector<uint32_t>& last_nodes);

  std::vector<int32_t> token_;  // the last token of each node
  std::vector<uint32_t> parent_;
  std::vector<uint32_t> first_child_;  // [nodes + 1]
  std::vector<uint32_t> suffix_;  // the longest proper suffix that is a node
  std::vector<float> gain_;
  std::vector<float> held_;
};

}  // namespace shallowfusion
