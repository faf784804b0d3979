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
  const std::vector<uint32_t> last_nodes = lay_out(patterns);
  link_suffixes();
  value(patterns, last_nodes);
}

std::vector<uint32_t> PhraseAutomaton::lay_out(const PhrasePatterns& patterns) {
  // One level after the other, so that the children of a node lie side by side, sorted by token.
  const auto length = [&](int64_t i) { return patterns.offsets[i + 1] - patterns.offsets[i]; };
  std::vector<uint32_t> node_of(patterns.count, kRoot);  // of the tokens read so far
  std::vector<int64_t> live(patterns.count);
  std::iota(live.begin(), live.end(), int64_t{0});
  token_.assign(1, -1);
  parent_.assign(1, kRoot);
  for (int64_t depth = 0; !live.empty(); ++depth) {
    const auto token = [&](int64_t i) { return patterns.tokens[patterns.offsets[i] + depth]; };
    std::sort(live.begin(), live.end(), [&](int64_t left, int64_t right) {
      return node_of[left] != node_of[right] ? node_of[left] < node_of[right] : token(left) < token(right);
    });
    const auto first_node = static_cast<uint32_t>(token_.size());
    for (const int64_t i : live) {
      const bool is_new =
          token_.size() == first_node || parent_.back() != node_of[i] || token_.back() != token(i);
      if (is_new) {
        if (token_.size() >= std::numeric_limits<uint32_t>::max()) throw std::invalid_argument("too many phrases.");
        token_.push_back(token(i));
        parent_.push_back(node_of[i]);
      }
      node_of[i] = static_cast<uint32_t>(token_.size() - 1);
    }
    live.erase(std::remove_if(live.begin(), live.end(), [&](int64_t i) { return length(i) == depth + 1; }),
               live.end());
  }
  first_child_.assign(token_.size() + 1, 0);
  for (size_t node = 1; node < token_.size(); ++node) ++first_child_[parent_[node] + 1];
  first_child_[0] = 1;
  std::partial_sum(first_child_.begin(), first_child_.end(), first_child_.begin());
  return node_of;
}

void PhraseAutomaton::link_suffixes() {
  suffix_.assign(token_.size(), kRoot);
  for (uint32_t node = 1; node < token_.size(); ++node) {
    if (parent_[node] != kRoot) suffix_[node] = next(suffix_[parent_[node]], token_[node]);
  }
}

void PhraseAutomaton::value(const PhrasePatterns& patterns, const std::vector<uint32_t>& last_nodes) {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  std::vector<double> best(token_.size(), kNone);  // of patterns that go on
  std::vector<std::map<int64_t, double>> ends(token_.size());
  for (int64_t i = 0; i < patterns.count; ++i) {
    uint32_t node = last_nodes[i];
    int64_t k = patterns.offsets[i + 1] - 1;
    const auto [own, is_new] = ends[node].try_emplace(patterns.phrases[i], patterns.credits[k]);
    if (!is_new) own->second = std::max(own->second, patterns.credits[k]);
    while ((node = parent_[node]) != kRoot) best[node] = std::max(best[node], patterns.credits[--k]);
  }
  gain_.assign(token_.size(), 0.0F);
  held_.assign(token_.size(), 0.0F);
  std::vector<double> given(token_.size(), 0.0);  // for phrases that are beginnings of the node
  std::vector<uint32_t> next_end(token_.size(), kRoot);  // the longest suffix at which phrases end
  for (uint32_t node = 1; node < token_.size(); ++node) {
    given[node] = given[parent_[node]];
    for (const auto& [phrase, credit] : ends[node]) given[node] += std::max(0.0, credit);
    held_[node] = static_cast<float>(std::max(0.0, best[node] - given[node]));
    next_end[node] = ends[suffix_[node]].empty() ? next_end[suffix_[node]] : suffix_[node];
    std::map<int64_t, double> all = ends[node];
    for (uint32_t other = next_end[node]; other != kRoot; other = next_end[other]) {
      for (const auto& [phrase, credit] : ends[other]) {
        const auto [own, is_new] = all.try_emplace(phrase, credit);
        if (!is_new) own->second = std::max(own->second, credit);
      }
    }
    double sum = 0.0;
    for (const auto& [phrase, credit] : all) sum += credit;
    gain_[node] = static_cast<float>(sum);
  }
}

uint32_t PhraseAutomaton::find_child(uint32_t node, int32_t token) const {
  const auto first = token_.begin() + first_child_[node];
  const auto last = token_.begin() + first_child_[node + 1];
  const auto found = std::lower_bound(first, last, token);
  return found != last && *found == token ? static_cast<uint32_t>(found - token_.begin()) : kRoot;
}

uint32_t PhraseAutomaton::next(uint32_t state, int32_t token) const {
  while (true) {
    const uint32_t child = find_child(state, token);
    if (child != kRoot || state == kRoot) return child;
    state = suffix_[state];
  }
}

PhraseAutomaton::Arrival PhraseAutomaton::arrive(uint32_t state, int32_t token) const {
  uint32_t target = next(begins_inside(token) ? state : bounded(state), token);
  float value = gain_[target];
  if (!ends_inside(token)) {
    value += closing(target);
    target = bounded(target);
  }
  return {target, value + held_[target]};
}

double PhraseAutomaton::say_after(uint32_t* state, int32_t token, double closed) const {
  *state = next(begins_inside(token) ? *state : bounded(*state), token);
  double gain = closed + gain_[*state];
  if (!ends_inside(token)) {
    gain += closing(*state);
    *state = bounded(*state);
  }
  return gain;
}

std::vector<std::vector<double>> PhraseAutomaton::most_worth(const std::vector<int64_t>& symbols) const {
  // Where a token has no child it goes on from the suffix, so what the suffix can reach bounds it.
  std::vector<double> most(held_.begin(), held_.end());
  std::vector<double> further(most.size());
  std::vector<std::vector<double>> found;
  int64_t done = 0;
  for (const int64_t wanted : symbols) {
    for (; done < wanted; ++done) {
      for (uint32_t node = 0; node < most.size(); ++node) {
        double best = node == kRoot ? most[kRoot] : further[suffix_[node]];
        for (uint32_t child = first_child_[node]; child < first_child_[node + 1]; ++child) {
          best = std::max(best, gain_[child] + most[child]);
        }
        further[node] = best;
      }
      for (size_t node = 0; node < most.size(); ++node) most[node] = std::max<double>(held_[node], further[node]);
    }
    found.push_back(most);
  }
  return found;
}

std::vector<int32_t> PhraseAutomaton::tokens_from(uint32_t state, bool inside,
                                                  const std::vector<uint32_t>& left_out) const {
  std::vector<int32_t> found;
  for (uint32_t node = state;; node = suffix_[node]) {
    if (std::find(left_out.begin(), left_out.end(), node) == left_out.end()) {
      for (uint32_t child = first_child_[node]; child < first_child_[node + 1]; ++child) {
        if (token_[child] != kWordBoundary && begins_inside(token_[child]) == inside) found.push_back(token_[child]);
      }
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
