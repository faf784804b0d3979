// Words as a trie of bytes; tells whether a partly spelled word can still become a known one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace shallowfusion {

// One entry: `language_word` is its id in the language model, `known` the sets of known words it is in, a bit each;
// entries in none spell a word but open no prefix.
struct LexiconWord {
  std::string spelling;
  uint32_t language_word;
  uint32_t known;
};

class CtcLexicon {
 public:
  static constexpr int32_t kRoot = 0;
  static constexpr int32_t kOutside = -1;

  explicit CtcLexicon(std::vector<LexiconWord> words);  // spellings are distinct

  int32_t advance(int32_t node, const std::string& bytes) const;
  // The word spelled by a node; null when there is none.
  const LexiconWord* word(int32_t node) const;
  // Characters of the shortest known word through a node; 0 when no known word goes through it.
  int32_t shortest(int32_t node) const { return node == kOutside ? 0 : nodes_[node].shortest; }
  // The sets that have words through a node, a bit each.
  uint32_t known(int32_t node) const { return node == kOutside ? 0 : nodes_[node].known; }
  const std::vector<LexiconWord>& words() const { return words_; }

 private:
  struct Node {
    int32_t first_child;
    int32_t num_children;
    int32_t word;  // -1: none
    int32_t shortest;
    uint32_t known;
    uint8_t byte;
  };

  int32_t child(int32_t node, uint8_t byte) const;

  std::vector<LexiconWord> words_;  // sorted by spelling
  std::vector<Node> nodes_;         // breadth first; the children of a node lie together, by byte
};

// Characters of UTF-8 text.
int32_t count_characters(const std::string& bytes);

}  // namespace shallowfusion
