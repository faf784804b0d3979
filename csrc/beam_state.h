// Beam search over scored candidates, for a batch of utterances. The rules are described in
// shallowfusion/search/beam_state.py; its Python twin beam_state_reference.py has the same structure.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "node_arena.h"

namespace shallowfusion {

enum class StopRule { hf, whisper, espnet };
enum class EarlyStopping { heuristic, first, never };
enum class Recombination { none, max, logsumexp };

struct BeamRules {
  int64_t beam_size;
  std::vector<int64_t> end_ids;
  int64_t max_new_tokens;
  StopRule stop_rule;
  std::optional<double> length_penalty;  // empty: whisper's total / length
  EarlyStopping early_stopping;
  double patience;
  Recombination recombination;
};

// Candidates of one step, best first; the caller owns the memory.
struct BeamInput {
  int64_t num_active;
  int64_t num_candidates;
  const int64_t* utterances;  // [active]
  const float* totals;        // [active, candidates]
  const int64_t* parents;     // [active, candidates]
  const int64_t* tokens;      // [active, candidates]
  const float* parts;         // [active, candidates, parts]
};

// Lanes after one step, best first; the caller owns the memory.
struct BeamOutput {
  int64_t* tokens;   // [active, beam_size]
  int64_t* parents;  // [active, beam_size]
  float* totals;     // [active, beam_size]
  bool* done;        // [active]
};

struct FinishedHypothesis {
  std::vector<int64_t> token_ids;  // without the end token
  float total;
  double key;
  std::vector<float> token_totals;  // [tokens], the end token's last if `ended`
  std::vector<float> parts;         // [tokens, parts]
  bool ended;
  bool forced;
};

// Not thread-safe: one call at a time. Bad arguments throw std::invalid_argument and change nothing.
class BeamState {
 public:
  BeamState(BeamRules rules, int64_t num_utterances, int64_t num_parts);

  void advance(const BeamInput& input, const BeamOutput& output);
  void force_finish(int64_t utterance);
  std::vector<FinishedHypothesis> results(int64_t utterance, int64_t n_best) const;
  void release(int64_t utterance);

  bool is_done(int64_t utterance) const { return search_at(utterance).done; }
  int64_t num_live(int64_t utterance) const { return static_cast<int64_t>(search_at(utterance).live.size()); }
  int64_t num_finished(int64_t utterance) const { return static_cast<int64_t>(search_at(utterance).finished.size()); }
  int64_t num_nodes() const { return arena_.num_nodes(); }
  int64_t num_parts() const { return arena_.num_parts(); }
  int64_t beam_size() const { return rules_.beam_size; }

 private:
  struct Candidate {
    float total;
    int32_t parent;
    int64_t token;
    const float* parts;
  };

  struct Finished {
    int32_t node;
    int64_t length;  // the end token counted
    double key;
    bool ended;
    bool forced;
  };

  struct Search {
    std::vector<int32_t> live;  // a node per lane, best first
    std::vector<Finished> finished;
    int64_t length = 0;
    int64_t last_step = -1;  // finds an utterance that is named twice in one step
    bool done = false;
    bool released = false;
  };

  const Search& search_at(int64_t utterance) const;
  Search& search_at(int64_t utterance);

  void gather(const BeamInput& input, int64_t row, const Search& search);
  void recombine(size_t first);
  void advance_search(Search& search, const Candidate* candidates, int64_t count);

  void select(const Search& search, const Candidate* candidates, int64_t count);
  void select_hf(const Search& search, const Candidate* candidates, int64_t count);
  void select_whisper(const Search& search, const Candidate* candidates, int64_t count);
  void select_espnet(const Candidate* candidates, int64_t count);
  void finish_ending(Search& search);
  void finish_live(Search& search);
  void keep_best(Search& search);
  bool stops(const Search& search) const;
  bool cannot_improve(const Search& search) const;
  bool end_detected(const Search& search) const;

  bool ends(int64_t token) const;
  double key(float total, int64_t length, bool ended) const;
  Finished finished(int32_t node, int64_t length, bool ended) const;
  void drop_live(Search& search);

  BeamRules rules_;
  std::vector<int64_t> sorted_end_ids_;
  int64_t max_candidates_;  // whisper: finished hypotheses that make an utterance done
  NodeArena arena_;
  std::vector<Search> searches_;
  int64_t num_steps_ = 0;

  // Scratch of one `advance`, kept to save allocations.
  std::vector<Candidate> candidates_;
  std::vector<size_t> offsets_;           // first candidate of each active utterance, and the end
  std::vector<const Candidate*> ending_;  // candidates of one utterance that finish, best first
  std::vector<const Candidate*> chosen_;  // candidates of one utterance that live on, in lane order
  std::vector<int32_t> next_live_;
};

}  // namespace shallowfusion
