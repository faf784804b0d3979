// Random calls, good and bad, of the page pool, the beam state and its mirror.
#include <vector>

#include "beam_mirror.h"
#include "beam_state.h"
#include "fuzz.h"
#include "page_pool.h"

namespace fuzz {
namespace {

using namespace shallowfusion;

int place_in(const std::vector<int64_t>& values) { return draw(0, static_cast<int>(values.size()) - 1); }

void call_pool(PagePool& pool, std::vector<int64_t>& live) {
  const int action = draw(0, 6);
  const int64_t count = static_cast<int64_t>(live.size());
  if (action == 0 || live.empty()) {
    live.push_back(pool.create());
  } else if (action == 1) {
    live.push_back(pool.fork(live[place_in(live)]));
  } else if (action == 2) {
    const int place = place_in(live);
    pool.release(live[place]);
    live.erase(live.begin() + place);
  } else if (action == 3) {
    pool.append(live[place_in(live)], draw(0, 9));
  } else if (action == 4) {
    std::vector<int32_t> slots(live.size());
    pool.append_each(live.data(), count, slots.data());
  } else if (action == 5) {
    std::vector<int64_t> parents(draw(0, 6));
    for (int64_t& parent : parents) parent = draw(-1, static_cast<int>(count));  // both ends are out of range
    std::vector<int64_t> forked(parents.size());
    pool.reorder(live.data(), count, parents.data(), static_cast<int64_t>(parents.size()), forked.data());
    live = forked;
  } else {
    std::vector<uint8_t> visible(live.size() * pool.high_water());
    pool.visibility(live.data(), count, visible.data());
    pool.release(draw(-5, 1 << 20));  // unknown
  }
}

void advance(BeamState& state, const std::vector<int64_t>& running, int step) {
  const size_t num_candidates = static_cast<size_t>(2 * state.beam_size());
  const size_t count = running.size() * num_candidates;
  const size_t lanes = running.size() * static_cast<size_t>(state.beam_size());
  std::vector<float> totals(count), parts(count * static_cast<size_t>(state.num_parts()), -1.0f), out_totals(lanes);
  std::vector<int64_t> parents(count), tokens(count), out_tokens(lanes), out_parents(lanes);
  std::vector<uint8_t> done(running.size());
  for (size_t i = 0; i < count; ++i) {
    const bool is_first = i % num_candidates == 0;
    const int num_live = static_cast<int>(state.num_live(running[i / num_candidates]));
    const float before = is_first || std::isinf(totals[i - 1]) ? static_cast<float>(-step) : totals[i - 1];
    totals[i] = draw(0, 30) ? before - 0.1f * static_cast<float>(draw(0, 3)) : -INFINITY;
    parents[i] = draw(0, 40) ? draw(0, num_live > 0 ? num_live - 1 : 0) : draw(-1, 9);
    tokens[i] = draw(0, 5);
  }
  state.advance({static_cast<int64_t>(running.size()), static_cast<int64_t>(num_candidates), running.data(),
                 totals.data(), parents.data(), tokens.data(), parts.data()},
                {out_tokens.data(), out_parents.data(), out_totals.data(), reinterpret_cast<bool*>(done.data())});
}

BeamRules random_rules() {
  BeamRules rules{};
  rules.beam_size = draw(1, 5);
  rules.end_ids = {3};
  rules.max_new_tokens = draw(1, 9);
  rules.stop_rule = static_cast<StopRule>(draw(0, 2));
  rules.length_penalty = 1.0;
  rules.early_stopping = static_cast<EarlyStopping>(draw(0, 2));
  rules.patience = 1.0;
  rules.recombination = Recombination::none;
  return rules;
}

}  // namespace

bool fuzz_pool() {
  PagePool pool(draw(1, 60), draw(1, 4));
  std::vector<int64_t> live;
  for (int call = 0; call < 60; ++call) {
    try {
      call_pool(pool, live);
    } catch (const std::exception&) {
      ++refusals;
    }
  }
  for (const int64_t sequence : live) {
    pool.slots(sequence);
    pool.pages(sequence);
    pool.release(sequence);
  }
  return pool.num_used() == 0 && pool.num_sequences() == 0;
}

bool fuzz_beams() {
  BeamRules rules = random_rules();
  rules.recombination = static_cast<Recombination>(draw(0, 2));
  const int num_utterances = draw(1, 3);
  BeamState state(rules, num_utterances, draw(0, 3));
  for (int step = 0; step < 12; ++step) {
    std::vector<int64_t> running;
    for (int utterance = 0; utterance < num_utterances; ++utterance) {
      if (!state.is_done(utterance)) running.push_back(utterance);
    }
    if (running.empty()) break;
    try {
      if (draw(0, 20) == 0) state.force_finish(running.front());
      else advance(state, running, step);
    } catch (const std::exception&) {
      ++refusals;
    }
  }
  for (int utterance = 0; utterance < num_utterances; ++utterance) {
    state.force_finish(utterance);
    state.results(utterance, draw(1, 9));
    state.release(utterance);
  }
  return state.num_nodes() == 0;
}

// Records of any integers: the mirror follows or refuses.
bool fuzz_mirror() {
  const int num_utterances = draw(1, 3);
  BeamMirror mirror(random_rules(), num_utterances, draw(1, 10), draw(0, 3));
  for (int step = 0; step < 8; ++step) {
    const int records = num_utterances + draw(0, 1);
    const auto words = static_cast<int64_t>(draw(0, 9) ? mirror.record_words() : draw(0, 40));
    std::vector<int32_t> entry(static_cast<size_t>(records * words));
    for (int32_t& word : entry) word = draw(0, 5) ? draw(-1, 4) : draw(INT32_MIN, INT32_MAX);
    for (int record = 0; words == mirror.record_words() && !one_in(20) && record < records; ++record) {
      int32_t* header = entry.data() + record * words;
      header[0] = static_cast<int32_t>(mirror.num_steps());
      header[1] = record < num_utterances && !mirror.beams().is_done(record) ? 1 : 0;
    }
    try {
      mirror.replay(entry.data(), records, words);
      if (one_in(6)) mirror.force_finish(draw(-1, num_utterances));
    } catch (const std::exception&) {
      ++refusals;
    }
  }
  for (int utterance = 0; utterance < num_utterances; ++utterance) {
    mirror.force_finish(utterance);
    mirror.beams().results(utterance, draw(1, 9));
  }
  return true;
}

}  // namespace fuzz
