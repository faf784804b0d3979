#include "phrase_automaton.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>

namespace shallowfusion {
namespace {

void check(const PhrasePatterns& patterns) {
  for (int64_t i = 0; i < patterns.count; ++i) {
    const std::string name = "pattern " + std::to_string(i);
    if (patterns.offsets[i] >= patterns.offsets[i + 1]) throw std::invalid_argument(name + " has no tokens.");
    for (int64_t k = patterns.offsets[i]; k < patterns.offsets[i + 1]; ++k) {
      if (patterns.tokens[k] < 0) {
        throw std::invalid_argument(name + " holds the token " + std::to_string(patterns.tokens[k]) +
                                    "; tokens must be at least 0.");
      }
      if (!std::isfinite(patterns.credits[k])) throw std::invalid_argument(name + " has a credit that is not finite.");
    }
  }
}

}  // namespace

PhraseAutomaton::PhraseAutomaton(const PhrasePatterns& patterns) {
  check(patterns);
  if (patterns.num_classes > 0) classes_.assign(patterns.classes, patterns.classes + patterns.num_classes);
  for (size_t token = 0; token < classes_.size(); ++token) {
    if (begins_inside(static_cast<int32_t>(token))) inside_.push_back(static_cast<int32_t>(token));
  }
  std::vector<uint32_t> parents;
  const std::vector<uint32_t> last_nodes = lay_out(patterns, &parents);
  link_suffixes(parents);
  value(patterns, last_nodes, parents);
}

std::vector<uint32_t> PhraseAutomaton::lay_out(const PhrasePatterns& patterns, std::vector<uint32_t>* parents) {
  // One level after the other, so that the children of a node lie side by side, sorted by token.
  const auto length = [&](int64_t i) { return patterns.offsets[i + 1] - patterns.offsets[i]; };
  std::vector<uint32_t> node_of(patterns.count, kRoot);  // of the tokens read so far
  std::vector<int64_t> live(patterns.count);
  std::iota(live.begin(), live.end(), int64_t{0});
  nodes_.assign(1, Node{-1, 0, kRoot, kRoot, 0.0F, 0.0F, 0.0F});
  parents->assign(1, kRoot);
  for (int64_t depth = 0; !live.empty(); ++depth) {
    const auto token = [&](int64_t i) { return patterns.tokens[patterns.offsets[i] + depth]; };
    std::sort(live.begin(), live.end(), [&](int64_t left, int64_t right) {
      return node_of[left] != node_of[right] ? node_of[left] < node_of[right] : token(left) < token(right);
    });
    const auto first_node = static_cast<uint32_t>(nodes_.size());
    for (const int64_t i : live) {
      const bool is_new =
          nodes_.size() == first_node || parents->back() != node_of[i] || nodes_.back().token != token(i);
      if (is_new) {
        if (nodes_.size() >= std::numeric_limits<uint32_t>::max() - 1) throw std::invalid_argument("too many phrases.");
        nodes_.push_back(Node{token(i), 0, kRoot, kRoot, 0.0F, 0.0F, 0.0F});
        parents->push_back(node_of[i]);
      }
      node_of[i] = static_cast<uint32_t>(nodes_.size() - 1);
    }
    live.erase(std::remove_if(live.begin(), live.end(), [&](int64_t i) { return length(i) == depth + 1; }),
               live.end());
  }
  nodes_.push_back(Node{-1, 0, kRoot, kRoot, 0.0F, 0.0F, 0.0F});
  for (size_t node = 1; node < parents->size(); ++node) ++nodes_[(*parents)[node] + 1].first_child;
  nodes_[0].first_child = 1;
  for (size_t node = 1; node < nodes_.size(); ++node) nodes_[node].first_child += nodes_[node - 1].first_child;
  return node_of;
}

void PhraseAutomaton::link_suffixes(const std::vector<uint32_t>& parents) {
  for (uint32_t node = 1; node < parents.size(); ++node) {
    if (parents[node] != kRoot) nodes_[node].suffix = next(nodes_[parents[node]].suffix, nodes_[node].token);
  }
  for (uint32_t node = 0; node < parents.size(); ++node) {
    nodes_[node].bounded = is_bounded(node) ? node : next(node, kWordBoundary);
  }
}

void PhraseAutomaton::value(const PhrasePatterns& patterns, const std::vector<uint32_t>& last_nodes,
                            const std::vector<uint32_t>& parents) {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  std::vector<double> best(parents.size(), kNone);  // of patterns that go on
  std::vector<std::map<int64_t, double>> ends(parents.size());
  for (int64_t i = 0; i < patterns.count; ++i) {
    uint32_t node = last_nodes[i];
    int64_t k = patterns.offsets[i + 1] - 1;
    const auto [own, is_new] = ends[node].try_emplace(patterns.phrases[i], patterns.credits[k]);
    if (!is_new) own->second = std::max(own->second, patterns.credits[k]);
    while ((node = parents[node]) != kRoot) best[node] = std::max(best[node], patterns.credits[--k]);
  }
  std::vector<double> given(parents.size(), 0.0);  // for phrases that are beginnings of the node
  std::vector<uint32_t> next_end(parents.size(), kRoot);  // the longest suffix at which phrases end
  for (uint32_t node = 1; node < parents.size(); ++node) {
    given[node] = given[parents[node]];
    for (const auto& [phrase, credit] : ends[node]) given[node] += std::max(0.0, credit);
    nodes_[node].held = static_cast<float>(std::max(0.0, best[node] - given[node]));
    next_end[node] = ends[nodes_[node].suffix].empty() ? next_end[nodes_[node].suffix] : nodes_[node].suffix;
    std::map<int64_t, double> all = ends[node];
    for (uint32_t other = next_end[node]; other != kRoot; other = next_end[other]) {
      for (const auto& [phrase, credit] : ends[other]) {
        const auto [own, is_new] = all.try_emplace(phrase, credit);
        if (!is_new) own->second = std::max(own->second, credit);
      }
    }
    double sum = 0.0;
    for (const auto& [phrase, credit] : all) sum += credit;
    nodes_[node].gain = static_cast<float>(sum);
  }
  for (uint32_t node = 0; node < parents.size(); ++node) {
    nodes_[node].closing = is_bounded(node) ? 0.0F : nodes_[nodes_[node].bounded].gain;
  }
}

uint32_t PhraseAutomaton::find_child(uint32_t node, int32_t token) const {
  uint32_t first = nodes_[node].first_child;
  const uint32_t end = nodes_[node + 1].first_child;
  uint32_t last = end;
  while (last - first > 8) {
    const uint32_t middle = first + (last - first) / 2;
    (nodes_[middle].token < token ? first : last) = middle;
  }
  while (first < end && nodes_[first].token < token) ++first;
  return first < end && nodes_[first].token == token ? first : kRoot;
}

uint32_t PhraseAutomaton::next(uint32_t state, int32_t token) const {
  while (true) {
    const uint32_t child = find_child(state, token);
    if (child != kRoot || state == kRoot) return child;
    state = nodes_[state].suffix;
  }
}

PhraseAutomaton::Arrival PhraseAutomaton::arrive(uint32_t state, int32_t token) const {
  uint32_t target = next(begins_inside(token) ? state : bounded(state), token);
  float value = nodes_[target].gain;
  if (!ends_inside(token)) {
    value += closing(target);
    target = bounded(target);
  }
  return {target, value + nodes_[target].held};
}

double PhraseAutomaton::say_after(uint32_t* state, int32_t token, double closed) const {
  *state = next(begins_inside(token) ? *state : bounded(*state), token);
  double gain = closed + nodes_[*state].gain;
  if (!ends_inside(token)) {
    gain += closing(*state);
    *state = bounded(*state);
  }
  return gain;
}

std::vector<int32_t> PhraseAutomaton::tokens_from(uint32_t state, bool inside,
                                                  const std::vector<uint32_t>& left_out) const {
  std::vector<int32_t> found;
  for (uint32_t node = state;; node = nodes_[node].suffix) {
    if (std::find(left_out.begin(), left_out.end(), node) == left_out.end()) {
      each_child(node, [&](int32_t token) {
        if (token != kWordBoundary && begins_inside(token) == inside) found.push_back(token);
      });
    }
    if (node == kRoot) break;
  }
  return found;
}

void PhraseAutomaton::arcs(uint32_t state, bool with_first, std::vector<Arc>* found) const {
  // From the root, tokens inside a word may begin patterns that may begin there, others also those that begin a word.
  std::vector<uint32_t> left_out;
  if (!with_first) left_out.push_back(kRoot);
  const float closed = closing(state);
  std::vector<int32_t> tokens = closed != 0.0F ? inside_ : tokens_from(state, true, left_out);
  if (!with_first) left_out.push_back(start_state());
  const std::vector<int32_t> outside = tokens_from(bounded(state), false, left_out);
  tokens.insert(tokens.end(), outside.begin(), outside.end());
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  found->clear();
  for (const int32_t token : tokens) {
    float value = arrive(state, token).value - (begins_inside(token) ? closed : 0.0F);
    if (!with_first) value -= arrive(kRoot, token).value;
    found->push_back({token, value});
  }
}

void PhraseAutomaton::turns(uint32_t state, std::vector<int32_t>* found) const {
  const uint32_t start = start_state();
  std::vector<uint32_t> left_out{kRoot};
  if (fallback(state) == start) left_out.push_back(start);
  *found = tokens_from(state, true, left_out);
  const std::vector<int32_t> outside = tokens_from(bounded(state), false, {kRoot, start});
  found->insert(found->end(), outside.begin(), outside.end());
  std::sort(found->begin(), found->end());
  found->erase(std::unique(found->begin(), found->end()), found->end());
}

}  // namespace shallowfusion
