#include "beam_state.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace shallowfusion {
namespace {

constexpr int64_t kEndLengths = 3;    // lengths that must all have fallen behind before ESPnet's search stops
constexpr double kEndMargin = -10.0;  // nats
constexpr int64_t kEndLag = 2;        // ESPnet compares token counts with lengths that include start and end

// base ** exponent, held inside float32's normal range.
double power(double base, double exponent) {
  constexpr double smallest = std::numeric_limits<float>::min();
  constexpr double largest = std::numeric_limits<float>::max();
  return std::min(std::max(std::pow(base, exponent), smallest), largest);
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

BeamState::BeamState(BeamRules rules, int64_t num_utterances, int64_t num_parts)
    : rules_(std::move(rules)), sorted_end_ids_(rules_.end_ids), arena_(num_parts) {
  if (num_utterances < 0 || num_parts < 0) refuse("num_utterances and num_parts must be at least 0.");
  if (rules_.beam_size < 1 || rules_.max_new_tokens < 1) refuse("beam_size and max_new_tokens must be at least 1.");
  if (!rules_.length_penalty && rules_.stop_rule != StopRule::whisper) {
    refuse("length_penalty None is for stop_rule 'whisper' only.");
  }
  std::sort(sorted_end_ids_.begin(), sorted_end_ids_.end());
  const double finished_wanted = std::nearbyint(static_cast<double>(rules_.beam_size) * rules_.patience);
  max_candidates_ = static_cast<int64_t>(std::min(finished_wanted, 1e15));
  if (rules_.stop_rule == StopRule::whisper && !(finished_wanted >= 1)) {
    refuse("beam_size * patience must round to at least 1, got " + std::to_string(rules_.beam_size) + " * " +
           std::to_string(rules_.patience) + ".");
  }
  searches_.resize(num_utterances);
  for (Search& search : searches_) search.live.push_back(NodeArena::kRoot);
}

const BeamState::Search& BeamState::search_at(int64_t utterance) const {
  const auto count = static_cast<int64_t>(searches_.size());
  if (utterance < 0 || utterance >= count) {
    refuse("utterance must be from 0 to " + std::to_string(count - 1) + ", got " + std::to_string(utterance) + ".");
  }
  if (searches_[utterance].released) refuse("utterance " + std::to_string(utterance) + " was released.");
  return searches_[utterance];
}

BeamState::Search& BeamState::search_at(int64_t utterance) {
  return const_cast<Search&>(std::as_const(*this).search_at(utterance));
}

void BeamState::advance(const BeamInput& input, const BeamOutput& output) {
  ++num_steps_;
  candidates_.clear();
  offsets_.assign(1, 0);
  for (int64_t row = 0; row < input.num_active; ++row) {  // everything is checked before anything changes
    Search& search = search_at(input.utterances[row]);
    if (search.done) {
      refuse("utterance " + std::to_string(input.utterances[row]) + " is done; leave it out of the step.");
    }
    if (search.last_step == num_steps_) {
      refuse("utterances must be distinct, got " + std::to_string(input.utterances[row]) + " twice.");
    }
    search.last_step = num_steps_;
    gather(input, row, search);
    if (rules_.recombination != Recombination::none) recombine(offsets_.back());
    offsets_.push_back(candidates_.size());
  }
  for (int64_t row = 0; row < input.num_active; ++row) {
    Search& search = search_at(input.utterances[row]);
    advance_search(search, candidates_.data() + offsets_[row],
                   static_cast<int64_t>(offsets_[row + 1] - offsets_[row]));
    const auto live = static_cast<int64_t>(search.live.size());
    const int64_t first = row * rules_.beam_size;
    for (int64_t lane = 0; lane < rules_.beam_size; ++lane) {
      const bool alive = lane < live;
      const int64_t dead_token = rules_.end_ids.empty() ? 0 : rules_.end_ids.front();
      output.tokens[first + lane] = alive ? chosen_[lane]->token : dead_token;
      output.parents[first + lane] = alive ? chosen_[lane]->parent : 0;
      output.totals[first + lane] = alive ? chosen_[lane]->total : -std::numeric_limits<float>::infinity();
    }
    output.done[row] = search.done;
  }
}

// Appends the possible candidates of one utterance to `candidates_`.
void BeamState::gather(const BeamInput& input, int64_t row, const Search& search) {
  const size_t first = candidates_.size();
  const auto live = static_cast<int64_t>(search.live.size());
  for (int64_t column = 0; column < input.num_candidates; ++column) {
    const int64_t at = row * input.num_candidates + column;
    const float total = input.totals[at];
    const int64_t parent = input.parents[at];
    const int64_t token = input.tokens[at];
    if (!std::isfinite(total) || parent == -1) continue;
    if (parent < 0 || parent >= live) {
      refuse("parents must be live lanes below " + std::to_string(live) + ", got " + std::to_string(parent) + ".");
    }
    if (token < 0) {
      refuse("tokens must be at least 0, got " + std::to_string(token) + "; mark an impossible one by total -inf.");
    }
    if (candidates_.size() > first && total > candidates_.back().total) {
      refuse("candidates must come best first, got " + std::to_string(total) + " late.");
    }
    candidates_.push_back({total, static_cast<int32_t>(parent), token, input.parts + at * arena_.num_parts()});
  }
}

// Merges candidates with equal lane and token; lanes are distinct, so no others have equal tokens.
void BeamState::recombine(size_t first) {
  const auto begin = candidates_.begin() + static_cast<std::ptrdiff_t>(first);
  std::vector<size_t> order(candidates_.end() - begin);
  std::iota(order.begin(), order.end(), size_t{0});
  const auto same = [&](size_t one, size_t other) {
    return begin[one].parent == begin[other].parent && begin[one].token == begin[other].token;
  };
  std::stable_sort(order.begin(), order.end(), [&](size_t one, size_t other) {
    return std::pair(begin[one].parent, begin[one].token) < std::pair(begin[other].parent, begin[other].token);
  });
  std::vector<bool> kept(order.size(), true);
  for (size_t at = 1, better = 0; at < order.size(); ++at) {
    if (!same(order[at], order[better])) {
      better = at;
      continue;
    }
    kept[order[at]] = false;
    if (rules_.recombination == Recombination::logsumexp) {
      Candidate& winner = begin[order[better]];
      const double total = winner.total;
      winner.total = static_cast<float>(total + std::log1p(std::exp(begin[order[at]].total - total)));
    }
  }
  size_t count = 0;
  for (size_t at = 0; at < kept.size(); ++at) {
    if (kept[at]) begin[count++] = begin[at];
  }
  if (count == order.size()) return;
  candidates_.resize(first + count);
  std::stable_sort(candidates_.begin() + static_cast<std::ptrdiff_t>(first), candidates_.end(),
                   [](const Candidate& one, const Candidate& other) { return one.total > other.total; });
}

void BeamState::advance_search(Search& search, const Candidate* candidates, int64_t count) {
  chosen_.clear();
  if (count == 0) {
    finish_live(search);
    search.done = true;
  } else {
    select(search, candidates, count);
    finish_ending(search);
    next_live_.clear();
    for (const Candidate* candidate : chosen_) {
      const int32_t parent = search.live[candidate->parent];
      next_live_.push_back(arena_.add(parent, candidate->token, candidate->total, candidate->parts));
    }
    drop_live(search);
    search.live.assign(next_live_.begin(), next_live_.end());
    ++search.length;
    search.done = stops(search);
    if (search.done && rules_.stop_rule == StopRule::whisper) finish_live(search);
    if (rules_.stop_rule == StopRule::espnet && search.length >= rules_.max_new_tokens) finish_live(search);
  }
  if (search.done) drop_live(search);
}

// Splits the candidates of one utterance into those that finish (`ending_`) and those that live on (`chosen_`).
void BeamState::select(const Search& search, const Candidate* candidates, int64_t count) {
  ending_.clear();
  switch (rules_.stop_rule) {
    case StopRule::hf:
      return select_hf(search, candidates, count);
    case StopRule::whisper:
      return select_whisper(search, candidates, count);
    case StopRule::espnet:
      return select_espnet(candidates, count);
  }
}

void BeamState::select_hf(const Search& search, const Candidate* candidates, int64_t count) {
  const bool at_limit = search.length + 1 >= rules_.max_new_tokens;
  for (int64_t rank = 0; rank < count; ++rank) {
    if (at_limit || ends(candidates[rank].token)) {
      if (rank < rules_.beam_size) ending_.push_back(&candidates[rank]);
    } else if (static_cast<int64_t>(chosen_.size()) < rules_.beam_size) {
      chosen_.push_back(&candidates[rank]);
    }
  }
}

void BeamState::select_whisper(const Search& search, const Candidate* candidates, int64_t count) {
  const auto finished = static_cast<int64_t>(search.finished.size());
  for (int64_t rank = 0; rank < count && static_cast<int64_t>(chosen_.size()) < rules_.beam_size; ++rank) {
    if (!ends(candidates[rank].token)) {
      chosen_.push_back(&candidates[rank]);
    } else if (finished + static_cast<int64_t>(ending_.size()) < max_candidates_) {
      ending_.push_back(&candidates[rank]);
    }
  }
}

void BeamState::select_espnet(const Candidate* candidates, int64_t count) {
  for (int64_t rank = 0; rank < std::min(count, rules_.beam_size); ++rank) {
    (ends(candidates[rank].token) ? ending_ : chosen_).push_back(&candidates[rank]);
  }
}

void BeamState::finish_ending(Search& search) {
  for (const Candidate* candidate : ending_) {
    const int32_t node =
        arena_.add(search.live[candidate->parent], candidate->token, candidate->total, candidate->parts);
    search.finished.push_back(finished(node, search.length + 1, ends(candidate->token)));
  }
  if (rules_.stop_rule == StopRule::hf && !ending_.empty()) keep_best(search);
}

void BeamState::finish_live(Search& search) {
  size_t count = search.live.size();
  if (rules_.stop_rule == StopRule::whisper) {
    const auto beam_size = static_cast<size_t>(rules_.beam_size);
    count = std::min(count, beam_size - std::min(beam_size, search.finished.size()));
  }
  for (size_t lane = 0; lane < count; ++lane) {
    arena_.retain(search.live[lane]);
    search.finished.push_back(finished(search.live[lane], search.length, false));
  }
  if (rules_.stop_rule == StopRule::hf) keep_best(search);
}

// Sorts the pool, best key first, and cuts it to beam_size.
void BeamState::keep_best(Search& search) {
  std::stable_sort(search.finished.begin(), search.finished.end(),
                   [](const Finished& one, const Finished& other) { return one.key > other.key; });
  while (search.finished.size() > static_cast<size_t>(rules_.beam_size)) {
    arena_.release(search.finished.back().node);
    search.finished.pop_back();
  }
}

bool BeamState::stops(const Search& search) const {
  if (search.live.empty() || search.length >= rules_.max_new_tokens) return true;
  switch (rules_.stop_rule) {
    case StopRule::hf:
      return cannot_improve(search);
    case StopRule::whisper:
      return static_cast<int64_t>(search.finished.size()) >= max_candidates_;
    case StopRule::espnet:
      return end_detected(search);
  }
  return true;
}

bool BeamState::cannot_improve(const Search& search) const {
  if (static_cast<int64_t>(search.finished.size()) < rules_.beam_size) return false;
  if (rules_.early_stopping == EarlyStopping::first || rules_.beam_size == 1) return true;
  const bool longest = rules_.early_stopping == EarlyStopping::never && *rules_.length_penalty > 0;
  const int64_t length = longest ? rules_.max_new_tokens : search.length;
  return key(arena_.total(search.live.front()), length, false) <= search.finished.back().key;
}

bool BeamState::end_detected(const Search& search) const {
  double best = -std::numeric_limits<double>::infinity();
  double best_of_length[kEndLengths] = {best, best, best};
  for (const Finished& finished : search.finished) {
    const double total = arena_.total(finished.node);
    best = std::max(best, total);
    const int64_t age = search.length - kEndLag - finished.length;
    if (age >= 0 && age < kEndLengths) best_of_length[age] = std::max(best_of_length[age], total);
  }
  return std::all_of(std::begin(best_of_length), std::end(best_of_length),
                     [&](double total) { return std::isfinite(total) && total - best < kEndMargin; });
}

bool BeamState::ends(int64_t token) const {
  return std::binary_search(sorted_end_ids_.begin(), sorted_end_ids_.end(), token);
}

double BeamState::key(float total, int64_t length, bool ended) const {
  if (rules_.stop_rule == StopRule::whisper) {
    const int64_t words = ended ? length - 1 : length;
    if (!rules_.length_penalty) return total / static_cast<double>(std::max<int64_t>(1, words));
    return total / power(static_cast<double>(5 + words) / 6, *rules_.length_penalty);
  }
  const double scale = power(static_cast<double>(std::max<int64_t>(1, length)), *rules_.length_penalty);
  return rules_.stop_rule == StopRule::hf ? total / static_cast<float>(scale) : total / scale;
}

BeamState::Finished BeamState::finished(int32_t node, int64_t length, bool ended) const {
  return {node, length, key(arena_.total(node), length, ended), ended, !ended};
}

void BeamState::drop_live(Search& search) {
  for (const int32_t node : search.live) arena_.release(node);
  search.live.clear();
}

void BeamState::force_finish(int64_t utterance) {
  Search& search = search_at(utterance);
  if (search.done) return;
  finish_live(search);
  drop_live(search);
  search.done = true;
}

std::vector<FinishedHypothesis> BeamState::results(int64_t utterance, int64_t n_best) const {
  const Search& search = search_at(utterance);
  if (n_best < 1) refuse("n_best must be at least 1, got " + std::to_string(n_best) + ".");
  if (!search.done) refuse("utterance " + std::to_string(utterance) + " is not done; call force_finish first.");
  std::vector<Finished> ranked = search.finished;
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](const Finished& one, const Finished& other) { return one.key > other.key; });
  ranked.resize(std::min<int64_t>(n_best, static_cast<int64_t>(ranked.size())));
  std::vector<FinishedHypothesis> results;
  for (const Finished& finished : ranked) {
    std::vector<int32_t> path;
    for (int32_t node = finished.node; node != NodeArena::kRoot; node = arena_.parent(node)) path.push_back(node);
    std::reverse(path.begin(), path.end());
    FinishedHypothesis result{{}, arena_.total(finished.node), finished.key, {}, {}, finished.ended, finished.forced};
    float before = 0.0f;
    for (const int32_t node : path) {
      result.token_ids.push_back(arena_.token(node));
      result.token_totals.push_back(arena_.total(node) - before);
      result.parts.insert(result.parts.end(), arena_.parts(node), arena_.parts(node) + arena_.num_parts());
      before = arena_.total(node);
    }
    if (finished.ended) result.token_ids.pop_back();
    results.push_back(std::move(result));
  }
  return results;
}

void BeamState::release(int64_t utterance) {
  Search& search = search_at(utterance);
  drop_live(search);
  for (const Finished& finished : search.finished) arena_.release(finished.node);
  search.finished = {};
  search.released = search.done = true;
}

}  // namespace shallowfusion
