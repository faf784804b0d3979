// What phrases say of each label of a CTC alphabet from each of their states, worked out once, so that a search looks
// it up. Most labels are worth the same from every state (they leave all phrases, or begin one); each state has a few
// others, those by which its phrases go on.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ctc_labels.h"
#include "phrase_automaton.h"

namespace shallowfusion {

// Where the phrases stand at a prefix, to look at labels from there.
struct PhraseSite {
  uint32_t state;
  bool is_begun;  // a word is being spelled or done: a label that begins one says a space first
  bool begins;    // every label begins a word
};

// Immutable once built, so any number of threads may read it. 32 bytes per state of the phrases, 16 per own label.
class CtcPhraseSteps {
 public:
  struct Step {
    int32_t label;
    uint32_t state;  // it leads to
    float gain;      // for good; NaN where several add up, which are to be said one by one
    float factor;    // a hair above what the rank of the child is multiplied by, loans included
  };

  // Of labels that are not as usual at a site, by label; where they are many, of all labels, in their places.
  struct Own {
    const Step* first;
    const Step* last;
  };

  enum Kind : uint8_t { kStays, kCloses, kSilent };  // what a label does to the word before it

  // What the other labels with text multiply a rank by at most.
  struct Usual {
    const float* factors;  // [labels]
    const Kind* kinds;     // [labels]
    float closing_factor;
    float most;  // of all

    float factor(int32_t label) const {
      return kinds[label] == kCloses ? factors[label] * closing_factor : factors[label];
    }
  };

  // `blank` is never asked for.
  CtcPhraseSteps(const std::vector<CtcLabel>& labels, int32_t blank, std::shared_ptr<const PhraseAutomaton> phrases);

  Step step(const PhraseSite& site, int32_t label) const;
  Own own(const PhraseSite& site) const;
  bool is_full(const Own& own) const { return own.last - own.first == static_cast<ptrdiff_t>(labels_.size()); }
  Usual usual(const PhraseSite& site) const;
  // The most that any label multiplies a rank by, and what those do that have no text and stay in their state.
  float most(const PhraseSite& site) const;
  float silent_factor(const PhraseSite& site) const;
  const std::vector<int32_t>& silent() const { return silent_; }
  // What is held in a state, and exp of it.
  float held(uint32_t state) const { return places_[state].held; }
  double loan(uint32_t state) const { return places_[state].loan; }

 private:
  // What is usual depends on how the text ends: within a word, at its end without a space, with one, or not begun.
  enum Table : uint8_t { kInWord, kBounded, kAfterWord, kUnbegun };
  static constexpr size_t kTables = 4;

  // What a search asks of a state, side by side.
  struct Place {
    uint32_t first;  // of its own labels in `own_`, those in a word before those after one
    uint32_t num_in_word : 31;
    uint32_t is_bounded : 1;
    float most[2];  // in a word and after one
    float held;
    float closing;
    double loan;
  };

  Table table(const PhraseSite& site) const {
    if (!site.is_begun) return kUnbegun;
    if (site.begins) return kAfterWord;
    return places_[site.state].is_bounded ? kBounded : kInWord;
  }
  float closing(const PhraseSite& site) const { return site.is_begun ? places_[site.state].closing : 0.0F; }
  Step usual_step(const PhraseSite& site, int32_t label) const;
  bool says_space(Table table, int32_t label) const;
  Step walk(uint32_t state, Table table, int32_t label) const;
  void fill_usual();
  void fill_own(uint32_t state, bool after_word);
  void fill_up(const PhraseSite& site, size_t first);
  void find_own(uint32_t state, Table table);
  void collect(uint32_t state, uint32_t end, Table table, bool closing, bool spaced);

  std::vector<CtcLabel> labels_;
  std::shared_ptr<const PhraseAutomaton> phrases_;
  std::vector<std::vector<int32_t>> by_byte_;  // labels by their first byte
  std::vector<int32_t> silent_;
  std::vector<Step> usual_;      // [tables, labels]
  std::vector<float> usual_factors_;  // [tables, labels]
  std::vector<Kind> kinds_;      // [tables, labels]
  float most_usual_[kTables];
  std::vector<Place> places_;    // [states + 1]
  std::vector<Step> own_;
  std::vector<int32_t> found_;   // scratch of the building
};

}  // namespace shallowfusion
