#include "ctc_lexicon.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace shallowfusion {

int32_t count_characters(const std::string& bytes) {
  return static_cast<int32_t>(
      std::count_if(bytes.begin(), bytes.end(), [](char byte) { return (static_cast<uint8_t>(byte) & 0xc0u) != 0x80u; }));
}

CtcLexicon::CtcLexicon(std::vector<LexiconWord> words) : words_(std::move(words)) {
  std::sort(words_.begin(), words_.end(),
            [](const LexiconWord& one, const LexiconWord& other) { return one.spelling < other.spelling; });
  struct Span {
    size_t begin, end, depth;
  };
  nodes_.push_back(Node{0, 0, -1, 0, 0, 0});
  std::vector<Span> spans{{0, words_.size(), 0}};
  std::vector<int32_t> parents{-1};
  for (size_t index = 0; index < spans.size(); ++index) {
    auto [at, end, depth] = spans[index];
    if (at < end && words_[at].spelling.size() == depth) {
      nodes_[index].word = static_cast<int32_t>(at);
      nodes_[index].known = words_[at].known;
      if (words_[at].known != 0) nodes_[index].shortest = std::max(1, count_characters(words_[at].spelling));
      ++at;
      if (at < end && words_[at].spelling.size() == depth) {
        throw std::invalid_argument("a lexicon must hold each word once, got '" + words_[at].spelling + "' twice.");
      }
    }
    nodes_[index].first_child = static_cast<int32_t>(nodes_.size());
    while (at < end) {
      const auto byte = static_cast<uint8_t>(words_[at].spelling[depth]);
      size_t last = at;
      while (last < end && static_cast<uint8_t>(words_[last].spelling[depth]) == byte) ++last;
      nodes_.push_back(Node{0, 0, -1, 0, 0, byte});
      spans.push_back({at, last, depth + 1});
      parents.push_back(static_cast<int32_t>(index));
      ++nodes_[index].num_children;
      at = last;
    }
  }
  for (size_t index = nodes_.size(); index-- > 1;) {
    const int32_t own = nodes_[index].shortest;
    int32_t& above = nodes_[parents[index]].shortest;
    nodes_[parents[index]].known |= nodes_[index].known;
    if (own != 0 && (above == 0 || own < above)) above = own;
  }
}

int32_t CtcLexicon::child(int32_t node, uint8_t byte) const {
  const auto begin = nodes_.begin() + nodes_[node].first_child;
  const auto end = begin + nodes_[node].num_children;
  const auto found =
      std::lower_bound(begin, end, byte, [](const Node& other, uint8_t wanted) { return other.byte < wanted; });
  return found == end || found->byte != byte ? kOutside : static_cast<int32_t>(found - nodes_.begin());
}

int32_t CtcLexicon::advance(int32_t node, const std::string& bytes) const {
  for (size_t index = 0; index < bytes.size() && node != kOutside; ++index) {
    node = child(node, static_cast<uint8_t>(bytes[index]));
  }
  return node;
}

const LexiconWord* CtcLexicon::word(int32_t node) const {
  return node == kOutside || nodes_[node].word < 0 ? nullptr : &words_[nodes_[node].word];
}

}  // namespace shallowfusion
