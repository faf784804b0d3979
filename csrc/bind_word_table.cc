#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "bindings.h"
#include "word_table.h"

namespace py = pybind11;

namespace shallowfusion {
namespace {

// A language model that lives in Python: every look-up is one call there, which takes the GIL; the last million are
// remembered. The caller must not hold the GIL while it waits for one that looks up.
class AskedTable final : public WordTable {
 public:
  // score(state, word) -> (log-prob, state after it); end(state) -> log-prob.
  AskedTable(py::function score, py::function end, uint32_t num_words, uint32_t unknown_word)
      : score_(std::move(score)), end_(std::move(end)), num_words_(num_words), unknown_word_(unknown_word) {
    if (unknown_word >= num_words) throw std::invalid_argument("unknown_word must be one of the words.");
  }

  ~AskedTable() override {
    const py::gil_scoped_acquire held;
    score_ = py::function();
    end_ = py::function();
  }

  float score(uint32_t state, uint32_t word, uint32_t* next_state) const override {
    const uint64_t key = (static_cast<uint64_t>(state) << 32) | word;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = known_.find(key);
      if (found != known_.end()) {
        *next_state = found->second.second;
        return found->second.first;
      }
    }
    std::pair<float, uint32_t> answer;
    {
      const py::gil_scoped_acquire held;
      answer = score_(state, word).cast<std::pair<float, uint32_t>>();
    }
    check(answer.first);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (known_.size() >= kMostKnown) known_.clear();
    known_.emplace(key, answer);
    *next_state = answer.second;
    return answer.first;
  }

  float end(uint32_t state) const override {
    const py::gil_scoped_acquire held;
    const auto answer = end_(state).cast<float>();
    check(answer);
    return answer;
  }

  uint32_t unknown_word() const override { return unknown_word_; }
  uint32_t num_words() const override { return num_words_; }
  uint32_t num_states() const override { return std::numeric_limits<uint32_t>::max(); }  // the model checks its own

 private:
  static constexpr size_t kMostKnown = 1000000;

  static void check(float log_prob) {
    if (std::isnan(log_prob) || log_prob == std::numeric_limits<float>::infinity()) {
      throw std::invalid_argument("the language model says " + std::to_string(log_prob) + ", wanted a log-prob.");
    }
  }

  py::function score_;
  py::function end_;
  uint32_t num_words_;
  uint32_t unknown_word_;
  mutable std::mutex mutex_;
  mutable std::unordered_map<uint64_t, std::pair<float, uint32_t>> known_;
};

}  // namespace

void bind_word_table(py::module_& module) {
  py::class_<WordTable, std::shared_ptr<WordTable>>(module, "WordTable");
  py::class_<AskedTable, WordTable, std::shared_ptr<AskedTable>>(module, "AskedTable")
      .def(py::init<py::function, py::function, uint32_t, uint32_t>(), py::kw_only(), py::arg("score"), py::arg("end"),
           py::arg("num_words"), py::arg("unknown_word"));
}

}  // namespace shallowfusion
