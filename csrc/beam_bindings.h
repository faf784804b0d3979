// What the bindings of the beam state and of its mirror share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "beam_state.h"

namespace shallowfusion {

template <typename Choice>
inline Choice choose(const char* name, const std::string& value,
              std::initializer_list<std::pair<const char*, Choice>> choices) {
  for (const auto& [text, choice] : choices) {
    if (value == text) return choice;
  }
  throw std::invalid_argument(std::string(name) + " has the unknown value '" + value + "'.");
}

inline BeamRules beam_rules(int64_t beam_size, std::vector<int64_t> end_ids, int64_t max_new_tokens,
                            const std::string& stop_rule, std::optional<double> length_penalty,
                            const std::string& early_stopping, double patience, const std::string& recombination) {
  return {beam_size,
          std::move(end_ids),
          max_new_tokens,
          choose<StopRule>("stop_rule", stop_rule,
                           {{"hf", StopRule::hf}, {"whisper", StopRule::whisper}, {"espnet", StopRule::espnet}}),
          length_penalty,
          choose<EarlyStopping>("early_stopping", early_stopping,
                                {{"heuristic", EarlyStopping::heuristic},
                                 {"first", EarlyStopping::first},
                                 {"never", EarlyStopping::never}}),
          patience,
          choose<Recombination>("recombination", recombination,
                                {{"none", Recombination::none},
                                 {"max", Recombination::max},
                                 {"logsumexp", Recombination::logsumexp}})};
}

inline pybind11::dict to_dict(const FinishedHypothesis& hypothesis, int64_t num_parts) {
  pybind11::dict record;
  record["token_ids"] = pybind11::tuple(pybind11::cast(hypothesis.token_ids));
  record["total"] = hypothesis.total;
  record["key"] = hypothesis.key;
  const auto length = static_cast<int64_t>(hypothesis.token_totals.size());
  record["token_totals"] = pybind11::array_t<float>({length}, hypothesis.token_totals.data());
  record["parts"] = pybind11::array_t<float>({length, num_parts}, hypothesis.parts.data());
  record["ended"] = hypothesis.ended;
  record["forced"] = hypothesis.forced;
  return record;
}

}  // namespace shallowfusion
