// CTC prefix beam search over a batch of utterances, frame by frame. The rules are described in
// shallowfusion/ctc/search.py; the Python twin search_reference.py works in the log domain and defines correct.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ctc_prefixes.h"

namespace shallowfusion {

struct CtcRules {
  int32_t blank;
  int32_t delimiter;  // -1: none
  int64_t beam_size;
  bool use_max;               // Viterbi instead of the sum over alignments
  double token_min_log_prob;  // -inf: no label is pruned
  int64_t top_labels;         // 0: all
  double beam_margin;         // inf: none
  double blank_skip_log_prob;  // above 0: never
  bool rank_paths;             // a prefix ending in blank and in its label take two places in the beam
  int64_t history_words;       // 0: off
  bool merge_texts;            // different labels may spell the same text, which is then one hypothesis
  bool last_times;             // times are those of the lowest-ranked path that joined, not of the best alignment
};

struct CtcHypothesis {
  std::string text;
  std::vector<int32_t> labels;
  std::vector<int32_t> label_frames;  // [labels, 2]: first frame and the one after the last
  std::vector<int32_t> word_frames;   // [words, 2]
  double total;
  double asr;
  double lm;
  uint32_t lm_state;
  double extra;
};

// A prefix in the beam.
struct CtcLive {
  std::string text;
  bool is_open;  // a word is being spelled
  double extra;
};

// The scores of one step; strides in bytes, the caller owns the memory.
struct CtcFrames {
  const char* data;
  bool half;
  int64_t strides[3];
  int64_t num_utterances;
  const int64_t* counts;  // [utterances]
};

struct CtcModel {
  CtcRules rules;
  std::vector<CtcLabel> labels;
  CtcLanguage language;
  double child_factor;  // no label can multiply a rank by more, closing ones apart
  double close_factor;
  std::unique_ptr<const CtcPhraseSteps> phrase_steps;  // null without phrases

  CtcModel(CtcRules rules, std::vector<CtcLabel> labels, CtcLanguage language);
};

// One utterance. Masses are probabilities times exp(fused + extra), scaled by powers of two so that the best stays near 1:
// no logarithm is taken on the way, and what lies 700 nats below the best is gone.
class CtcUtterance {
 public:
  CtcUtterance(const CtcModel& model, uint32_t start_state);

  void advance(const char* frame, bool half, int64_t label_stride);
  std::vector<CtcHypothesis> results(int64_t n_best, bool ended) const;
  std::vector<CtcLive> live() const;
  void set_extras(const std::vector<double>& extras);  // in the order of `live`
  const std::string& error() const { return error_; }
  int64_t num_frames() const { return frame_; }
  int64_t num_prefixes() const { return static_cast<int64_t>(prefixes_.size()); }

 private:
  struct Mass {
    double value = 0.0;
    double best = 0.0;  // of the best alignment alone; with last_times, the larger the lower its path ranked
    int32_t path = -1;  // frames of the labels before the last
    int32_t start = -1;
    int32_t end = -1;
    int32_t pushed = -1;  // path including the last label, once it was needed
  };

  struct Entry {
    int32_t node;
    Mass blank;
    Mass label;
  };

  struct Candidate {
    double rank;
    int64_t order;
    int32_t entry;
    uint8_t which;  // 1: blank, 2: label, 3: both

    bool is_before(const Candidate& other) const { return rank != other.rank ? rank > other.rank : order < other.order; }
  };

  struct Prob {
    int64_t frame;  // it was worked out for
    double value;
  };

  struct PathNode {
    int32_t previous, start, end;
  };

  struct Ending {
    int32_t entry;
    double asr;
    CtcEnding ending;
    double total;
    int32_t timed;  // the entry whose word times are shown
  };

  struct LabelPlace {
    double prob;
    int32_t place;  // in sorted_labels_; -1: not there
  };

  // A live prefix while its children are made.
  struct Above {
    int32_t place;
    int32_t node;
    double all;
    bool at_boundary;
    bool after_end;  // every label begins a word
  };

  bool read(const char* frame, bool half, int64_t stride);
  void prune_labels(int32_t best_label);
  double prob(int32_t label);
  double combine(double one, double other) const { return model_->rules.use_max ? (one < other ? other : one) : one + other; }
  bool is_boundary(int32_t node) const;
  void stay();
  void stay_entry(const Entry& old);
  void extend();
  void extend_entry(size_t place);
  void extend_in_phrases(const Above& above, double factor);
  void extend_by(const Above& above, double label_prob, int32_t label, double phrase_factor);
  void offer(size_t entry, int64_t order);
  void tighten(size_t count);
  void sort_labels();
  void merge_equal_texts();
  void merge_group(size_t begin, size_t end, bool blank);
  void keep_best();
  void drop_equal_histories(std::vector<Candidate>& kept);
  void rank_times();
  void rescale();
  void collect();
  int32_t push(Entry& entry, Mass& mass);
  std::vector<Ending> endings(bool ended) const;
  CtcHypothesis hypothesis(const Ending& ending) const;
  void spell(const Entry& entry, CtcHypothesis& made) const;
  std::vector<int32_t> labels_of(int32_t node) const;

  const CtcModel* model_;
  CtcPrefixes prefixes_;
  std::vector<Entry> live_;
  std::vector<PathNode> paths_;
  double offset_ = 0.0;  // nats: log of what the masses were divided by
  int64_t frame_ = 0;
  size_t prefix_limit_ = 4096;
  size_t path_limit_ = 4096;
  std::string error_;

  // Scratch of one frame, kept to save allocations.
  std::vector<float> row_;  // log-probs, -inf where pruned
  double largest_ = 0.0;    // of the row
  std::vector<Prob> probs_;
  std::vector<std::pair<double, int32_t>> sorted_labels_;
  std::vector<Entry> next_;
  std::vector<int64_t> orders_;
  std::vector<Candidate> candidates_;
  std::vector<std::pair<uint64_t, int32_t>> texts_;
  std::vector<uint64_t> seen_;
  double threshold_ = 0.0;  // no candidate below it can stay

  std::vector<LabelPlace> label_places_;  // [labels]; only with phrases
  std::vector<std::pair<int32_t, float>> own_places_;
};

// A batch in progress. Not thread-safe: one call at a time.
class CtcState {
 public:
  CtcState(std::shared_ptr<const CtcModel> model, const std::vector<uint32_t>& start_states);

  void step(const CtcFrames& frames, int threads);
  const CtcUtterance& utterance(int64_t number) const;
  void set_extras(const std::vector<std::vector<double>>& extras);
  int64_t num_utterances() const { return static_cast<int64_t>(utterances_.size()); }
  std::vector<std::vector<CtcHypothesis>> results(int64_t n_best, bool ended, int threads) const;

 private:
  std::shared_ptr<const CtcModel> model_;
  std::vector<CtcUtterance> utterances_;
};

}  // namespace shallowfusion
