// Random calls, good and bad, of the C++ core under sanitizers: `build/sanitized/fuzz [SEED [SHARE]]`; see `make fuzz`.
#include "fuzz.h"

#include <cstdlib>

namespace {

struct Part {
  const char* name;
  int rounds;
  bool (*run)();
};

// Rounds that take some seconds each.
constexpr Part kParts[] = {
    {"page pools", 3000, fuzz::fuzz_pool},
    {"beam states", 3000, fuzz::fuzz_beams},
    {"beam mirrors", 3000, fuzz::fuzz_mirror},
    {"ARPA files", 30000, fuzz::fuzz_arpa},
    {"n-gram tables", 3000, fuzz::fuzz_table},
    {"phrase automata", 3000, fuzz::fuzz_phrases},
    {"phrases by labels", 1000, fuzz::fuzz_phrase_steps},
    {"CTC searches", 2000, fuzz::fuzz_ctc},
    {"CTC prefix scores", 2000, fuzz::fuzz_prefix_scores},
    {"lexicon searches", 2000, fuzz::fuzz_lexicon_search},
    {"fused steps", 2000, fuzz::fuzz_step},
    {"row statistics", 2000, fuzz::fuzz_statistics},
    {"range sums", 2000, fuzz::fuzz_ranges},
    {"rounded rows", 2000, fuzz::fuzz_rounding},
    {"attention over frames", 1000, fuzz::fuzz_attention},
    {"int8 products", 2000, fuzz::fuzz_int8},
    {"tile products", 2000, fuzz::fuzz_tiles},
};

}  // namespace

int main(int count, char** arguments) {
  const auto seed = static_cast<unsigned>(count > 1 ? std::atoi(arguments[1]) : 1);
  const double share = count > 2 ? std::atof(arguments[2]) : 1.0;
  for (const Part& part : kParts) {
    fuzz::refusals = 0;
    const int rounds = static_cast<int>(part.rounds * share);
    for (int round = 0; round < rounds; ++round) {
      // Each round can be run alone: its draws depend on nothing before it.
      fuzz::generator.seed(seed + 1000003u * static_cast<unsigned>(round));
      try {
        if (part.run()) continue;
      } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
      }
      std::printf("%s: round %d of seed %u failed\n", part.name, round, seed);
      return 1;
    }
    std::printf("%d %s, %ld bad calls refused\n", rounds, part.name, fuzz::refusals);
    std::fflush(stdout);
  }
  return 0;
}
