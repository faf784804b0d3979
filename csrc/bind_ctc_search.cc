#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "ctc_search.h"
#include "ngram_table.h"

namespace py = pybind11;

namespace shallowfusion {
namespace {

using Int64Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// (text, begins a word, ends a word, its word in a label-level table)
using GivenLabel = std::tuple<std::string, bool, bool, uint32_t>;
using GivenWord = std::tuple<std::string, uint32_t, uint32_t>;  // as LexiconWord

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

std::shared_ptr<CtcLexicon> make_lexicon(const std::vector<GivenWord>& given) {
  std::vector<LexiconWord> words;
  words.reserve(given.size());
  for (const auto& [spelling, language_word, known] : given) {
    require(!spelling.empty(), "a lexicon must not hold the empty word.");
    words.push_back({spelling, language_word, known});
  }
  const py::gil_scoped_release no_gil;
  return std::make_shared<CtcLexicon>(std::move(words));
}

std::shared_ptr<CtcModel> make_model(const std::vector<GivenLabel>& given, const CtcRules& rules,
                                     const CtcLanguage& language) {
  const auto count = static_cast<int32_t>(given.size());
  require(count >= 1, "labels must not be empty.");
  require(rules.blank >= 0 && rules.blank < count, "blank must be one of the labels.");
  require(rules.delimiter >= -1 && rules.delimiter < count && rules.delimiter != rules.blank,
          "delimiter must be -1 or a label that is not the blank.");
  std::vector<CtcLabel> labels;
  for (const auto& [text, begins, ends, word] : given) labels.push_back({text, begins, ends, word});
  if (language.table != nullptr && language.label_level) {
    for (const CtcLabel& label : labels) {
      require(label.language_word < language.table->num_words(), "a label's word is not in the table.");
    }
  }
  if (rules.delimiter >= 0) {
    const CtcLabel& delimiter = labels[rules.delimiter];
    require(delimiter.text.empty() && delimiter.begins_word, "the delimiter must have no text and begin a word.");
  }
  return std::make_shared<CtcModel>(rules, std::move(labels), language);
}

void set_table(CtcLanguage& language, std::shared_ptr<WordTable> table, std::shared_ptr<CtcLexicon> lexicon) {
  if (lexicon != nullptr) {
    for (const LexiconWord& word : lexicon->words()) {
      require(word.language_word < table->num_words(), "the lexicon names a word that the table does not have.");
    }
  }
  language.label_level = lexicon == nullptr;
  language.table = std::move(table);
  language.lexicon = std::move(lexicon);
}

// Steps run without the GIL, so a lock keeps other threads out of the state meanwhile.
class SharedCtcState {
 public:
  SharedCtcState(std::shared_ptr<const CtcModel> model, const std::vector<uint32_t>& start_states)
      : num_labels_(static_cast<int64_t>(model->labels.size())), state_(std::move(model), start_states) {}

  template <typename Use>
  auto with(Use use) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return use(state_);
  }

  int64_t num_labels() const { return num_labels_; }

 private:
  int64_t num_labels_;
  CtcState state_;
  std::mutex mutex_;
};

void step(SharedCtcState& shared, const py::array& log_probs, const Int64Array& counts, int threads) {
  const bool half = log_probs.dtype().equal(py::dtype("float16"));
  require(half || log_probs.dtype().equal(py::dtype("float32")), "log_probs must be float32 or float16.");
  require(log_probs.ndim() == 3 && log_probs.shape(2) == shared.num_labels(),
          "log_probs must have shape [utterances, frames, labels] with the labels of the search.");
  require(counts.ndim() == 1 && counts.shape(0) == log_probs.shape(0), "counts must have one entry per utterance.");
  for (py::ssize_t i = 0; i < counts.shape(0); ++i) {
    require(counts.at(i) >= 0 && counts.at(i) <= log_probs.shape(1), "counts must be from 0 to the number of frames.");
  }
  const CtcFrames frames{static_cast<const char*>(log_probs.data()),
                         half,
                         {log_probs.strides(0), log_probs.strides(1), log_probs.strides(2)},
                         log_probs.shape(0),
                         counts.data()};
  const py::gil_scoped_release no_gil;
  shared.with([&](CtcState& state) { state.step(frames, threads); });
}

py::array_t<int32_t> to_array(const std::vector<int32_t>& values, py::ssize_t columns) {
  const auto count = static_cast<py::ssize_t>(values.size());
  if (columns == 1) return py::array_t<int32_t>({count}, values.data());
  return py::array_t<int32_t>({count / columns, columns}, values.data());
}

py::tuple to_tuple(const CtcHypothesis& hypothesis) {
  return py::make_tuple(py::str(hypothesis.text), to_array(hypothesis.labels, 1),
                        to_array(hypothesis.label_frames, 2), to_array(hypothesis.word_frames, 2), hypothesis.total,
                        hypothesis.asr, hypothesis.lm, hypothesis.lm_state, hypothesis.extra);
}

py::list results(SharedCtcState& shared, int64_t n_best, bool ended, int threads) {
  std::vector<std::vector<CtcHypothesis>> found;
  std::vector<std::string> errors;
  {
    const py::gil_scoped_release no_gil;
    shared.with([&](const CtcState& state) {
      found = state.results(n_best, ended, threads);
      for (int64_t i = 0; i < state.num_utterances(); ++i) errors.push_back(state.utterance(i).error());
    });
  }
  py::list answers;
  for (size_t i = 0; i < found.size(); ++i) {
    py::list hypotheses;
    for (const CtcHypothesis& hypothesis : found[i]) hypotheses.append(to_tuple(hypothesis));
    answers.append(py::make_tuple(errors[i], hypotheses));
  }
  return answers;
}

py::list live(SharedCtcState& shared) {
  std::vector<std::vector<CtcLive>> found;
  {
    const py::gil_scoped_release no_gil;
    shared.with([&](const CtcState& state) {
      for (int64_t i = 0; i < state.num_utterances(); ++i) found.push_back(state.utterance(i).live());
    });
  }
  py::list answers;
  for (const auto& utterance : found) {
    py::list own;
    for (const CtcLive& prefix : utterance) own.append(py::make_tuple(prefix.text, prefix.is_open, prefix.extra));
    answers.append(own);
  }
  return answers;
}

void set_extras(SharedCtcState& shared, const std::vector<std::vector<double>>& extras) {
  const py::gil_scoped_release no_gil;
  shared.with([&](CtcState& state) { state.set_extras(extras); });
}

std::vector<int64_t> each(SharedCtcState& shared, int64_t (CtcUtterance::*method)() const) {
  const py::gil_scoped_release no_gil;
  return shared.with([&](const CtcState& state) {
    std::vector<int64_t> numbers;
    for (int64_t i = 0; i < state.num_utterances(); ++i) numbers.push_back((state.utterance(i).*method)());
    return numbers;
  });
}

}  // namespace

void bind_ctc_search(py::module_& module) {
  py::class_<CtcLexicon, std::shared_ptr<CtcLexicon>>(module, "CtcLexicon")
      .def(py::init(&make_lexicon), py::kw_only(), py::arg("words"));
  py::class_<CtcLanguage>(module, "CtcLanguage")
      .def(py::init<>())
      .def_readwrite("weight", &CtcLanguage::weight)
      .def_readwrite("word_bonus", &CtcLanguage::word_bonus)
      .def_readwrite("label_bonus", &CtcLanguage::label_bonus)
      .def_readwrite("unknown_word", &CtcLanguage::unknown_word)
      .def_property(
          "unknown_prefixes", [](const CtcLanguage& language) { return language.unknown_prefixes; },
          [](CtcLanguage& language, const std::vector<double>& given) {
            require(given.size() <= 32, "unknown_prefixes must be at most 32.");
            language.unknown_prefixes = given;
          })
      .def_readwrite("score_end", &CtcLanguage::score_end)
      .def_readwrite("score_empty_word", &CtcLanguage::score_empty_word)
      .def_readwrite("hotword_weight", &CtcLanguage::hotword_weight)
      .def("set_table", &set_table, py::kw_only(), py::arg("table").none(false), py::arg("lexicon").none(true))
      .def("set_hotwords", [](CtcLanguage& language, std::shared_ptr<CtcLexicon> words) { language.hotwords = words; },
           py::kw_only(), py::arg("words"))
      .def("set_phrases",
           [](CtcLanguage& language, std::shared_ptr<PhraseAutomaton> phrases) { language.phrases = phrases; },
           py::kw_only(), py::arg("phrases").none(false));
  py::class_<CtcRules>(module, "CtcRules")
      .def(py::init([](int32_t blank, int32_t delimiter, int64_t beam_size) {
             require(beam_size >= 1, "beam_size must be at least 1.");
             return CtcRules{blank, delimiter, beam_size, false, 0.0, 0, 0.0, 0.0, false, 0, false, false};
           }),
           py::kw_only(), py::arg("blank"), py::arg("delimiter"), py::arg("beam_size"))
      .def_readwrite("use_max", &CtcRules::use_max)
      .def_readwrite("token_min_log_prob", &CtcRules::token_min_log_prob)
      .def_readwrite("top_labels", &CtcRules::top_labels)
      .def_readwrite("beam_margin", &CtcRules::beam_margin)
      .def_readwrite("blank_skip_log_prob", &CtcRules::blank_skip_log_prob)
      .def_readwrite("rank_paths", &CtcRules::rank_paths)
      .def_readwrite("history_words", &CtcRules::history_words)
      .def_readwrite("merge_texts", &CtcRules::merge_texts)
      .def_readwrite("last_times", &CtcRules::last_times);
  py::class_<CtcModel, std::shared_ptr<CtcModel>>(module, "CtcSearch")
      .def(py::init(&make_model), py::kw_only(), py::arg("labels"), py::arg("rules"), py::arg("language"))
      .def(
          "begin",
          [](std::shared_ptr<CtcModel> model, const std::vector<uint32_t>& start_states) {
            for (const uint32_t state : start_states) {
              require(state == 0 || (model->language.table != nullptr && state < model->language.table->num_states()),
                      "start_states must be states of the table, got " + std::to_string(state) + ".");
            }
            return std::make_unique<SharedCtcState>(std::move(model), start_states);
          },
          py::kw_only(), py::arg("start_states"));
  py::class_<SharedCtcState>(module, "CtcState")
      .def("step", &step, py::kw_only(), py::arg("log_probs"), py::arg("counts"), py::arg("threads"))
      .def("live", &live)
      .def("set_extras", &set_extras, py::kw_only(), py::arg("extras"))
      .def("results", &results, py::kw_only(), py::arg("n_best"), py::arg("ended"), py::arg("threads"))
      .def_property_readonly("num_frames", [](SharedCtcState& state) { return each(state, &CtcUtterance::num_frames); })
      .def_property_readonly("num_prefixes",
                             [](SharedCtcState& state) { return each(state, &CtcUtterance::num_prefixes); });
}

}  // namespace shallowfusion
