// Python's way into the lexicon search: labels, words and shapes are checked here, then the GIL is released.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "lexicon_search.h"

namespace py = pybind11;

namespace shallowfusion {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Spelling = std::tuple<int32_t, std::vector<int32_t>, double>;  // word, labels, score

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

std::shared_ptr<SpellingTrie> make_trie(const std::vector<Spelling>& spellings, int64_t num_labels, int64_t num_words) {
  auto trie = std::make_shared<SpellingTrie>();
  for (const auto& [word, labels, score] : spellings) {
    check(word >= 0 && word < num_words, "a spelling's word must be from 0 to " + std::to_string(num_words - 1) + ".");
    check(!labels.empty(), "a spelling must hold at least one label.");
    for (const int32_t label : labels) {
      check(label >= 0 && label < num_labels, "a spelling holds the label " + std::to_string(label) +
                                                  ", wanted 0 to " + std::to_string(num_labels - 1) + ".");
    }
    trie->insert(labels.data(), static_cast<int64_t>(labels.size()), word, score);
  }
  trie->smear();
  return trie;
}

// Steps run without the GIL, so a lock keeps other threads out of the search meanwhile.
class SharedLexiconSearch {
 public:
  SharedLexiconSearch(int64_t num_labels, LexiconSearch search) : num_labels_(num_labels), search_(std::move(search)) {}

  template <typename Use>
  auto with(Use use) {
    const py::gil_scoped_release no_gil;
    const std::lock_guard<std::mutex> lock(mutex_);
    return use(search_);
  }

  int64_t num_labels() const { return num_labels_; }

 private:
  int64_t num_labels_;
  LexiconSearch search_;
  std::mutex mutex_;
};

std::vector<float> checked_transitions(const Floats& transitions, int64_t num_labels) {
  check(transitions.ndim() == 2 && transitions.shape(0) == num_labels && transitions.shape(1) == num_labels,
        "transitions must be [labels, labels].");
  return {transitions.data(), transitions.data() + transitions.size()};
}

std::unique_ptr<SharedLexiconSearch> make_search(int64_t num_labels, int64_t blank, int64_t silence, int64_t beam_size,
                                                 int64_t top_labels, double beam_margin, double lm_weight,
                                                 double lm_scale, double word_score, double unknown_score,
                                                 double silence_score, bool log_add, std::shared_ptr<SpellingTrie> trie,
                                                 int64_t unknown_word, std::shared_ptr<NgramTable> table,
                                                 const std::vector<int64_t>& ids,
                                                 const std::optional<Floats>& transitions) {
  check(num_labels >= 1 && num_labels <= INT32_MAX, "there must be at least one label.");
  check(silence >= 0 && silence < num_labels, "silence must be a label.");
  check(transitions ? blank == -1 : blank >= 0 && blank < num_labels, "blank must be a label, or -1 with transitions.");
  check(beam_size >= 1 && top_labels >= 1, "beam_size and top_labels must be at least 1.");
  const auto num_words = static_cast<int64_t>(ids.size());
  check(unknown_word >= 0 && unknown_word < num_words, "the unknown word must be a word.");
  check(trie == nullptr || trie->num_words() <= num_words, "the lexicon names a word that the search does not have.");
  check(trie != nullptr || num_words >= num_labels, "without a lexicon every label must be a word.");
  std::vector<uint32_t> words;
  for (const int64_t id : ids) {
    check(id >= 0 && (table == nullptr || id < table->num_words()), "word ids must be words of the table.");
    words.push_back(static_cast<uint32_t>(id));
  }
  LexiconRules rules;
  rules.num_labels = num_labels;
  rules.blank = blank;
  rules.silence = silence;
  rules.beam_size = beam_size;
  rules.top_labels = top_labels;
  rules.beam_margin = beam_margin;
  rules.lm_weight = lm_weight;
  rules.lm_scale = lm_scale;
  rules.word_score = word_score;
  rules.unknown_score = unknown_score;
  rules.silence_score = silence_score;
  rules.log_add = log_add;
  if (transitions) rules.transitions = checked_transitions(*transitions, num_labels);
  LexiconSearch search(rules, std::move(trie), static_cast<int32_t>(unknown_word), std::move(table), std::move(words));
  return std::make_unique<SharedLexiconSearch>(num_labels, std::move(search));
}

void step(SharedLexiconSearch& shared, const Floats& emissions) {
  check(emissions.ndim() == 2 && emissions.shape(1) == shared.num_labels(), "emissions must be [frames, labels].");
  const float* data = emissions.data();
  const int64_t frames = emissions.shape(0);
  shared.with([&](LexiconSearch& search) { search.step(data, frames); });
}

py::list results(SharedLexiconSearch& shared) {
  py::list found;
  for (const LexiconResult& result : shared.with([](const LexiconSearch& search) { return search.results(); })) {
    found.append(py::make_tuple(result.score, result.labels, result.words));
  }
  return found;
}

}  // namespace

void bind_lexicon_search(py::module_& module) {
  py::class_<SpellingTrie, std::shared_ptr<SpellingTrie>>(module, "SpellingTrie")
      .def(py::init(&make_trie), py::kw_only(), py::arg("spellings"), py::arg("num_labels"), py::arg("num_words"));
  py::class_<SharedLexiconSearch>(module, "LexiconSearch")
      .def(py::init(&make_search), py::kw_only(), py::arg("num_labels"), py::arg("blank"), py::arg("silence"),
           py::arg("beam_size"), py::arg("top_labels"), py::arg("beam_margin"), py::arg("lm_weight"),
           py::arg("lm_scale"), py::arg("word_score"), py::arg("unknown_score"), py::arg("silence_score"), py::arg("log_add"),
           py::arg("trie"), py::arg("unknown_word"), py::arg("table"), py::arg("ids"),
           py::arg("transitions") = py::none())
      .def("step", &step, py::kw_only(), py::arg("emissions"))
      .def("end", [](SharedLexiconSearch& shared) { shared.with([](LexiconSearch& search) { search.end(); }); })
      .def("results", &results)
      .def_property_readonly("num_frames", [](SharedLexiconSearch& shared) {
        return shared.with([](const LexiconSearch& search) { return search.num_frames(); });
      });
}

}  // namespace shallowfusion
