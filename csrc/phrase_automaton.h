// Aho-Corasick automaton that boosts phrases of token ids. Described in shallowfusion/phrases/automaton.py.
#pragma once

#include <cstdint>
#include <vector>

namespace shallowfusion {

// Token sequences to look for. Pattern i holds tokens[offsets[i]] .. tokens[offsets[i + 1] - 1]; credits are what a
// match of its first tokens is worth; `phrases` tells which patterns are spellings of the same phrase.
//
// Patterns may hold kWordBoundary between tokens. With `classes` (bit 0: a token begins inside a word, bit 1: it ends
// inside one; tokens past the end do neither) every text has one boundary between two tokens unless a word goes on from
// one to the other, and one at its beginning and its end. Without, no text has any.
struct PhrasePatterns {
  const int32_t* tokens;
  const double* credits;
  const int64_t* offsets;  // [count + 1]
  const int64_t* phrases;  // [count]
  int64_t count;
  const uint8_t* classes = nullptr;  // [num_classes]
  int64_t num_classes = 0;
};

constexpr int32_t kWordBoundary = INT32_MAX;

// A node is a beginning of patterns, numbered level by level; a state is the longest suffix of the tokens that is a
// node. `gain` is what arriving at a node is worth for good: the last credits of the phrases that end there, each once.
// `held` is lent to the match in progress and taken back when it goes on or fails.
//
// Immutable once built, so any number of threads may read it. 28 bytes per node; the children of a node lie side by side.
class PhraseAutomaton {
 public:
  // Throws std::invalid_argument for empty patterns, negative tokens and credits that are not finite.
  explicit PhraseAutomaton(const PhrasePatterns& patterns);

  int64_t num_states() const { return static_cast<int64_t>(nodes_.size()) - 1; }
  uint32_t start_state() const { return bounded(kRoot); }
  float held(uint32_t state) const { return nodes_[state].held; }
  // What phrases gain that are complete if the word ends here.
  float closing(uint32_t state) const { return nodes_[state].closing; }
  // The state if the word ends here; itself if it has ended.
  uint32_t bounded(uint32_t state) const { return nodes_[state].bounded; }
  // The longest state but itself that a match in progress can go on from.
  uint32_t suffix(uint32_t state) const { return nodes_[state].suffix; }

  // A token and the boundaries beside it: the state they lead to, and what arriving there is worth, `held` counted.
  struct Arrival {
    uint32_t state;
    float value;
  };
  Arrival arrive(uint32_t state, int32_t token) const;

  // The same without loans: what the token gains for good, that of a word it ends included. `state` becomes the new one.
  double say(uint32_t* state, int32_t token) const {
    return say_after(state, token, begins_inside(token) ? 0.0 : closing(*state));
  }
  // The same on top of `closed`, the gain of the word before included or not.
  double say_after(uint32_t* state, int32_t token, double closed) const;
  bool begins_inside(int32_t token) const { return has_class(token, 1); }
  bool ends_word(int32_t token) const { return !begins_inside(token); }

  // The start or the root: where the state stands once its match has failed.
  uint32_t fallback(uint32_t state) const { return nodes_[state].token == kWordBoundary ? start_state() : kRoot; }
  // Tokens that lead elsewhere from the state than from its fallback, sorted.
  void turns(uint32_t state, std::vector<int32_t>* found) const;

  // Calls visit(token) for the tokens and boundaries by which patterns go on from exactly this state, in rising order.
  template <typename Visit>
  void each_child(uint32_t state, Visit visit) const {
    for (uint32_t child = nodes_[state].first_child; child < nodes_[state + 1].first_child; ++child) {
      visit(nodes_[child].token);
    }
  }

  // Tokens whose bonus from a state is not that from the root, sorted; `with_first`: not nothing. The values are what
  // comes on top of `closing`, and without `with_first` of that from the root.
  struct Arc {
    int32_t token;
    float value;
  };
  void arcs(uint32_t state, bool with_first, std::vector<Arc>* found) const;

 private:
  static constexpr uint32_t kRoot = 0;

  struct Node {
    int32_t token;  // the last one
    uint32_t first_child;
    uint32_t suffix;   // the longest proper suffix that is a node
    uint32_t bounded;  // the state after a boundary
    float gain;
    float held;
    float closing;
  };

  bool ends_inside(int32_t token) const { return has_class(token, 2); }
  bool has_class(int32_t token, uint8_t bit) const {
    return token < static_cast<int64_t>(classes_.size()) && (classes_[token] & bit) != 0;
  }
  bool is_bounded(uint32_t state) const { return classes_.empty() || nodes_[state].token == kWordBoundary; }
  uint32_t next(uint32_t state, int32_t token) const;
  uint32_t find_child(uint32_t node, int32_t token) const;
  // Tokens of a class that lead from a state, or its suffixes but for those in `left_out`, to a node; sorted.
  std::vector<int32_t> tokens_from(uint32_t state, bool inside, const std::vector<uint32_t>& left_out) const;
  // The last node of each pattern, and the parent of each node.
  std::vector<uint32_t> lay_out(const PhrasePatterns& patterns, std::vector<uint32_t>* parents);
  void link_suffixes(const std::vector<uint32_t>& parents);
  void value(const PhrasePatterns& patterns, const std::vector<uint32_t>& last_nodes,
             const std::vector<uint32_t>& parents);

  std::vector<uint8_t> classes_;
  std::vector<int32_t> inside_;  // the tokens that begin inside a word
  std::vector<Node> nodes_;      // and one past the last, for the end of its children
};

}  // namespace shallowfusion
