// What the fuzzers share: one seeded generator, and each part as a function that says whether its invariants held.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "ngram_table.h"
#include "phrase_automaton.h"

namespace fuzz {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline std::mt19937 generator(1);
inline long refusals = 0;  // bad calls that raised

inline int draw(int lowest, int highest) { return std::uniform_int_distribution<int>(lowest, highest)(generator); }

inline bool one_in(int count) { return draw(1, count) == 1; }

template <typename Value>
const Value& pick(const std::vector<Value>& values) {
  return values[static_cast<size_t>(draw(0, static_cast<int>(values.size()) - 1))];
}

inline double draw_between(double lowest, double highest) {
  return std::uniform_real_distribution<double>(lowest, highest)(generator);
}

// Any number that a setting may be given: mostly small, now and then what breaks arithmetic.
inline double wild() {
  static const std::vector<double> values{0.0,   -0.0,   1.0,    -1.0,      1e-300,
                                          1e300, -1e300, 3.4e38, kInfinity, -kInfinity,
                                          std::numeric_limits<double>::quiet_NaN()};
  return one_in(2) ? draw_between(-3.0, 3.0) : pick(values);
}

// Prints what is wrong; false.
inline bool wrong(const char* what) {
  std::printf("%s\n", what);
  return false;
}

std::unique_ptr<shallowfusion::NgramTable> random_table(int num_words);
std::unique_ptr<shallowfusion::PhraseAutomaton> random_phrases(const std::vector<int32_t>& tokens, bool is_wild);

bool fuzz_pool();
bool fuzz_beams();
bool fuzz_mirror();
bool fuzz_arpa();
bool fuzz_table();
bool fuzz_phrases();
bool fuzz_ctc();
bool fuzz_phrase_steps();
bool fuzz_prefix_scores();
bool fuzz_lexicon_search();
bool fuzz_step();
bool fuzz_statistics();
bool fuzz_ranges();
bool fuzz_rounding();
bool fuzz_attention();
bool fuzz_int8();
bool fuzz_tiles();

}  // namespace fuzz
