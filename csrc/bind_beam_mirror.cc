#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "beam_bindings.h"
#include "beam_mirror.h"
#include "bindings.h"

namespace py = pybind11;

namespace shallowfusion {
namespace {

using Entry = py::array_t<int32_t, py::array::c_style>;

// `replay` runs without the GIL, so a lock keeps other threads out of the mirror meanwhile.
class SharedBeamMirror {
 public:
  SharedBeamMirror(BeamRules rules, int64_t num_utterances, int64_t num_candidates, int64_t num_parts)
      : mirror_(std::move(rules), num_utterances, num_candidates, num_parts) {}

  template <typename Use>
  auto with(Use use) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return use(mirror_);
  }

 private:
  BeamMirror mirror_;
  std::mutex mutex_;
};

void replay(SharedBeamMirror& shared, const Entry& entry) {
  if (entry.ndim() != 2) throw std::invalid_argument("a ring entry must have the axes utterances and words.");
  const int32_t* words = entry.data();
  const int64_t num_records = entry.shape(0);
  const int64_t num_words = entry.shape(1);
  const py::gil_scoped_release no_gil;
  shared.with([&](BeamMirror& mirror) { mirror.replay(words, num_records, num_words); });
}

py::list results(SharedBeamMirror& shared, int64_t utterance, int64_t n_best) {
  // Python objects are made outside the lock: making them may hand the GIL to a thread that waits for it.
  const auto [hypotheses, num_parts] = shared.with([&](const BeamMirror& mirror) {
    return std::pair(mirror.beams().results(utterance, n_best), mirror.beams().num_parts());
  });
  py::list records;
  for (const FinishedHypothesis& hypothesis : hypotheses) records.append(to_dict(hypothesis, num_parts));
  return records;
}

}  // namespace

void bind_beam_mirror(py::module_& module) {
  const auto create = [](int64_t beam_size, std::vector<int64_t> end_ids, int64_t max_new_tokens,
                         const std::string& stop_rule, std::optional<double> length_penalty,
                         const std::string& early_stopping, double patience, int64_t num_utterances,
                         int64_t num_candidates, int64_t num_parts) {
    BeamRules rules = beam_rules(beam_size, std::move(end_ids), max_new_tokens, stop_rule, length_penalty,
                                 early_stopping, patience, "none");
    return std::make_unique<SharedBeamMirror>(std::move(rules), num_utterances, num_candidates, num_parts);
  };
  const auto utterance = py::arg("utterance");
  const auto look_up = [](auto look) {
    return [look](SharedBeamMirror& shared, int64_t utterance) {
      return shared.with([&](const BeamMirror& mirror) { return look(mirror, utterance); });
    };
  };
  py::class_<SharedBeamMirror>(module, "BeamMirror")
      .def(py::init(create), py::kw_only(), py::arg("beam_size"), py::arg("end_ids"), py::arg("max_new_tokens"),
           py::arg("stop_rule"), py::arg("length_penalty"), py::arg("early_stopping"), py::arg("patience"),
           py::arg("num_utterances"), py::arg("num_candidates"), py::arg("num_parts"))
      .def("replay", &replay, py::kw_only(), py::arg("entry").noconvert())
      .def("results", &results, py::kw_only(), utterance, py::arg("n_best"))
      .def(
          "force_finish",
          [](SharedBeamMirror& shared, int64_t utterance) {
            shared.with([&](BeamMirror& mirror) { mirror.force_finish(utterance); });
          },
          py::kw_only(), utterance)
      .def("is_done", look_up([](const BeamMirror& mirror, int64_t u) { return mirror.beams().is_done(u); }),
           py::kw_only(), utterance)
      .def("saw_nan", look_up([](const BeamMirror& mirror, int64_t u) { return mirror.saw_nan(u); }), py::kw_only(),
           utterance)
      .def("hash", look_up([](const BeamMirror& mirror, int64_t u) { return mirror.hash(u); }), py::kw_only(),
           utterance)
      .def_property_readonly("num_steps", [](SharedBeamMirror& shared) {
        return shared.with([](const BeamMirror& mirror) { return mirror.num_steps(); });
      });
}

}  // namespace shallowfusion
