#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "beam_bindings.h"
#include "beam_state.h"
#include "bindings.h"

namespace py = pybind11;

namespace shallowfusion {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

void check_shape(const char* name, const py::array& array, std::initializer_list<int64_t> wanted) {
  bool fits = array.ndim() == static_cast<py::ssize_t>(wanted.size());
  for (size_t axis = 0; fits && axis < wanted.size(); ++axis) {
    fits = array.shape(static_cast<py::ssize_t>(axis)) == wanted.begin()[axis];
  }
  if (!fits) throw std::invalid_argument(std::string(name) + " has a shape that does not fit the other arrays.");
}

// `advance` runs without the GIL, so a lock keeps other threads out of the state meanwhile.
class SharedBeamState {
 public:
  SharedBeamState(BeamRules rules, int64_t num_utterances, int64_t num_parts)
      : state_(std::move(rules), num_utterances, num_parts) {}

  template <typename Use>
  auto with(Use use) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return use(state_);
  }

 private:
  BeamState state_;
  std::mutex mutex_;
};

py::tuple advance(SharedBeamState& shared, const Array<int64_t>& utterances, const Array<float>& totals,
                  const Array<int64_t>& parents, const Array<int64_t>& tokens, const Array<float>& parts) {
  const auto [beam_size, num_parts] =
      shared.with([](const BeamState& state) { return std::pair(state.beam_size(), state.num_parts()); });
  if (utterances.ndim() != 1 || totals.ndim() != 2) {
    throw std::invalid_argument("utterances must have one axis and totals two.");
  }
  const int64_t active = utterances.shape(0);
  const int64_t candidates = totals.shape(1);
  check_shape("totals", totals, {active, candidates});
  check_shape("parents", parents, {active, candidates});
  check_shape("tokens", tokens, {active, candidates});
  check_shape("parts", parts, {active, candidates, num_parts});
  py::array_t<int64_t> new_tokens({active, beam_size});
  py::array_t<int64_t> new_parents({active, beam_size});
  py::array_t<float> new_totals({active, beam_size});
  py::array_t<bool> done({active});
  const BeamInput input{active,          candidates,     utterances.data(), totals.data(),
                        parents.data(), tokens.data(), parts.data()};
  const BeamOutput output{new_tokens.mutable_data(), new_parents.mutable_data(), new_totals.mutable_data(),
                          done.mutable_data()};
  {
    const py::gil_scoped_release no_gil;
    shared.with([&](BeamState& state) { state.advance(input, output); });
  }
  return py::make_tuple(new_tokens, new_parents, new_totals, done);
}

py::list results(SharedBeamState& shared, int64_t utterance, int64_t n_best) {
  // Python objects are made outside the lock: making them may hand the GIL to a thread that waits for it.
  const auto [hypotheses, num_parts] = shared.with([&](const BeamState& state) {
    return std::pair(state.results(utterance, n_best), state.num_parts());
  });
  py::list records;
  for (const FinishedHypothesis& hypothesis : hypotheses) records.append(to_dict(hypothesis, num_parts));
  return records;
}

}  // namespace

void bind_beam_state(py::module_& module) {
  const auto create = [](int64_t beam_size, std::vector<int64_t> end_ids, int64_t max_new_tokens,
                         const std::string& stop_rule, std::optional<double> length_penalty,
                         const std::string& early_stopping, double patience, const std::string& recombination,
                         int64_t num_utterances, int64_t num_parts) {
    BeamRules rules = beam_rules(beam_size, std::move(end_ids), max_new_tokens, stop_rule, length_penalty,
                                 early_stopping, patience, recombination);
    return std::make_unique<SharedBeamState>(std::move(rules), num_utterances, num_parts);
  };
  const auto utterance = py::arg("utterance");
  const auto change = [](void (BeamState::*method)(int64_t)) {
    return [method](SharedBeamState& shared, int64_t utterance) {
      shared.with([&](BeamState& state) { (state.*method)(utterance); });
    };
  };
  const auto look_up = [](auto method) {
    return [method](SharedBeamState& shared, int64_t utterance) {
      return shared.with([&](const BeamState& state) { return (state.*method)(utterance); });
    };
  };
  py::class_<SharedBeamState>(module, "BeamState")
      .def(py::init(create), py::kw_only(), py::arg("beam_size"), py::arg("end_ids"), py::arg("max_new_tokens"),
           py::arg("stop_rule"), py::arg("length_penalty"), py::arg("early_stopping"), py::arg("patience"),
           py::arg("recombination"), py::arg("num_utterances"), py::arg("num_parts"))
      .def("advance", &advance, py::kw_only(), py::arg("utterances"), py::arg("totals"), py::arg("parents"),
           py::arg("tokens"), py::arg("parts"))
      .def("results", &results, py::kw_only(), utterance, py::arg("n_best"))
      .def("force_finish", change(&BeamState::force_finish), py::kw_only(), utterance)
      .def("release", change(&BeamState::release), py::kw_only(), utterance)
      .def("is_done", look_up(&BeamState::is_done), py::kw_only(), utterance)
      .def("num_live", look_up(&BeamState::num_live), py::kw_only(), utterance)
      .def("num_finished", look_up(&BeamState::num_finished), py::kw_only(), utterance)
      .def_property_readonly("num_nodes", [](SharedBeamState& shared) {
        return shared.with([](const BeamState& state) { return state.num_nodes(); });
      });
}

}  // namespace shallowfusion
