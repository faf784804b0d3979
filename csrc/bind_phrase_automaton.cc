#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "phrase_automaton.h"

namespace py = pybind11;

namespace shallowfusion {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

int64_t check_vector(const char* name, const py::array& array) {
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one axis.");
  return array.shape(0);
}

void check_states(const PhraseAutomaton& automaton, const Array<int64_t>& states) {
  check_vector("states", states);
  for (py::ssize_t i = 0; i < states.shape(0); ++i) {
    if (states.at(i) < 0 || states.at(i) >= automaton.num_states()) {
      throw std::invalid_argument("states must be from 0 to " + std::to_string(automaton.num_states() - 1) +
                                  ", got " + std::to_string(states.at(i)) + ".");
    }
  }
}

py::ssize_t check_pairs(const PhraseAutomaton& automaton, const Array<int64_t>& states,
                        const Array<int64_t>& tokens) {
  check_states(automaton, states);
  if (check_vector("tokens", tokens) != states.shape(0)) {
    throw std::invalid_argument("states and tokens must have one length.");
  }
  return states.shape(0);
}

// Tokens past the largest are in no phrase, as it is itself.
int32_t known_token(int64_t token) { return static_cast<int32_t>(std::min<int64_t>(token, kWordBoundary - 1)); }

std::shared_ptr<PhraseAutomaton> create(const Array<int32_t>& tokens, const Array<double>& credits,
                                        const Array<int64_t>& offsets, const Array<int64_t>& phrases,
                                        const Array<uint8_t>& classes) {
  const int64_t count = check_vector("phrases", phrases);
  const int64_t total = check_vector("tokens", tokens);
  bool fits = check_vector("credits", credits) == total && check_vector("offsets", offsets) == count + 1;
  fits = fits && offsets.at(0) == 0 && offsets.at(count) == total;
  for (int64_t i = 0; fits && i < count; ++i) fits = offsets.at(i) <= offsets.at(i + 1);
  if (!fits) throw std::invalid_argument("offsets must grow from 0 to the number of tokens, one more than patterns.");
  const int64_t num_classes = check_vector("classes", classes);
  const PhrasePatterns patterns{tokens.data(),  credits.data(), offsets.data(), phrases.data(),
                                count,          classes.data(), num_classes};
  const py::gil_scoped_release released;
  return std::make_shared<PhraseAutomaton>(patterns);
}

py::array_t<int64_t> advance(const PhraseAutomaton& automaton, const Array<int64_t>& states,
                             const Array<int64_t>& tokens) {
  const py::ssize_t count = check_pairs(automaton, states, tokens);
  py::array_t<int64_t> after({count});
  const int64_t* from = states.data();
  const int64_t* given = tokens.data();
  int64_t* target = after.mutable_data();
  const py::gil_scoped_release released;
  for (py::ssize_t i = 0; i < count; ++i) {
    const auto state = static_cast<uint32_t>(from[i]);
    target[i] = given[i] < 0 ? state : automaton.arrive(state, known_token(given[i])).state;
  }
  return after;
}

py::tuple say(const PhraseAutomaton& automaton, const Array<int64_t>& states, const Array<int64_t>& tokens) {
  const py::ssize_t count = check_pairs(automaton, states, tokens);
  py::array_t<double> gains({count});
  py::array_t<int64_t> after({count});
  const int64_t* from = states.data();
  const int64_t* given = tokens.data();
  double* gained = gains.mutable_data();
  int64_t* target = after.mutable_data();
  {
    const py::gil_scoped_release released;
    for (py::ssize_t i = 0; i < count; ++i) {
      auto state = static_cast<uint32_t>(from[i]);
      gained[i] = given[i] < 0 ? 0.0 : automaton.say_after(&state, known_token(given[i]), 0.0);
      target[i] = state;
    }
  }
  return py::make_tuple(gains, after);
}

py::array_t<bool> ends_words(const PhraseAutomaton& automaton, const Array<int64_t>& tokens) {
  py::array_t<bool> found({static_cast<py::ssize_t>(check_vector("tokens", tokens))});
  for (py::ssize_t i = 0; i < tokens.shape(0); ++i) {
    found.mutable_at(i) = tokens.at(i) >= 0 && automaton.ends_word(known_token(tokens.at(i)));
  }
  return found;
}

py::tuple turns(const PhraseAutomaton& automaton) {
  const auto count = static_cast<py::ssize_t>(automaton.num_states());
  py::array_t<int64_t> fallbacks({count});
  py::array_t<int64_t> offsets({count + 1});
  int64_t* fallback = fallbacks.mutable_data();
  int64_t* offset = offsets.mutable_data();
  std::vector<int32_t> tokens;
  {
    const py::gil_scoped_release released;
    std::vector<int32_t> own;
    offset[0] = 0;
    for (py::ssize_t i = 0; i < count; ++i) {
      const auto state = static_cast<uint32_t>(i);
      fallback[i] = automaton.fallback(state);
      automaton.turns(state, &own);
      tokens.insert(tokens.end(), own.begin(), own.end());
      offset[i + 1] = static_cast<int64_t>(tokens.size());
    }
  }
  return py::make_tuple(fallbacks, offsets,
                        py::array_t<int32_t>(static_cast<py::ssize_t>(tokens.size()), tokens.data()));
}

// worth(state) of each.
template <typename Worth>
py::array_t<float> of_states(const PhraseAutomaton& automaton, const Array<int64_t>& states, const Worth& worth) {
  check_states(automaton, states);
  py::array_t<float> values({states.shape(0)});
  for (py::ssize_t i = 0; i < states.shape(0); ++i) {
    values.mutable_at(i) = worth(static_cast<uint32_t>(states.at(i)));
  }
  return values;
}

py::array_t<float> refunds(const PhraseAutomaton& automaton, const Array<int64_t>& states) {
  return of_states(automaton, states,
                   [&](uint32_t state) { return automaton.closing(state) - automaton.held(state); });
}

py::array_t<float> closing(const PhraseAutomaton& automaton, const Array<int64_t>& states) {
  return of_states(automaton, states, [&](uint32_t state) { return automaton.closing(state); });
}

py::array_t<float> held(const PhraseAutomaton& automaton, const Array<int64_t>& states) {
  return of_states(automaton, states, [&](uint32_t state) { return automaton.held(state); });
}

// With `shared_first` the bonuses from the root are left out and taken off.
py::tuple step(const PhraseAutomaton& automaton, const Array<int64_t>& states, bool shared_first) {
  check_states(automaton, states);
  const py::ssize_t rows = states.shape(0);
  py::array_t<int32_t> row_offsets({rows + 1});
  int32_t* offsets = row_offsets.mutable_data();
  std::vector<int32_t> tokens;
  std::vector<float> values;
  {
    const int64_t* from = states.data();
    const py::gil_scoped_release released;
    std::vector<PhraseAutomaton::Arc> arcs;
    offsets[0] = 0;
    for (py::ssize_t row = 0; row < rows; ++row) {
      automaton.arcs(static_cast<uint32_t>(from[row]), !shared_first, &arcs);
      for (const PhraseAutomaton::Arc& arc : arcs) {
        tokens.push_back(arc.token);
        values.push_back(arc.value);
      }
      if (tokens.size() > INT32_MAX) throw std::invalid_argument("too many rows and phrases for one step.");
      offsets[row + 1] = static_cast<int32_t>(tokens.size());
    }
  }
  return py::make_tuple(row_offsets, py::array_t<int32_t>(static_cast<py::ssize_t>(tokens.size()), tokens.data()),
                        py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data()));
}

}  // namespace

void bind_phrase_automaton(py::module_& module) {
  const auto states = py::arg("states");
  py::class_<PhraseAutomaton, std::shared_ptr<PhraseAutomaton>>(module, "PhraseAutomaton")
      .def(py::init(&create), py::kw_only(), py::arg("tokens"), py::arg("credits"), py::arg("offsets"),
           py::arg("phrases"), py::arg("classes"))
      .def("step", &step, py::kw_only(), states, py::arg("shared_first"))
      .def("advance", &advance, py::kw_only(), states, py::arg("tokens"))
      .def("refunds", &refunds, py::kw_only(), states)
      .def("held", &held, py::kw_only(), states)
      .def("closing", &closing, py::kw_only(), states)
      .def("say", &say, py::kw_only(), states, py::arg("tokens"))
      .def("ends_words", &ends_words, py::kw_only(), py::arg("tokens"))
      .def("turns", &turns)
      .def_property_readonly("start_state", &PhraseAutomaton::start_state)
      .def_property_readonly("num_states", &PhraseAutomaton::num_states);
}

}  // namespace shallowfusion
