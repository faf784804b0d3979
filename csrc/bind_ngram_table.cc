#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "ngram_table.h"

namespace py = pybind11;

namespace shallowfusion {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// One order as (words [ngrams, order], log-probs [ngrams], back-offs [ngrams]).
using GivenOrder = std::tuple<Array<int32_t>, Array<float>, Array<float>>;

std::shared_ptr<NgramTable> create(int64_t num_words, const py::list& given, int64_t begin_word, int64_t end_word,
                                   int64_t unknown_word) {
  std::vector<GivenOrder> orders;  // keeps the arrays alive
  std::vector<NgramArrays> arrays;
  for (const py::handle& item : given) {
    orders.push_back(item.cast<GivenOrder>());
    const auto& [words, log_probs, back_offs] = orders.back();
    const auto order = static_cast<py::ssize_t>(orders.size());
    const bool fits = words.ndim() == 2 && words.shape(1) == order && log_probs.ndim() == 1 &&
                      back_offs.ndim() == 1 && log_probs.shape(0) == words.shape(0) &&
                      back_offs.shape(0) == words.shape(0);
    if (!fits) {
      throw std::invalid_argument("n-grams of order " + std::to_string(order) +
                                  " need words [ngrams, order], log-probs [ngrams] and back-offs [ngrams].");
    }
    arrays.push_back({words.data(), log_probs.data(), back_offs.data(), words.shape(0)});
  }
  const py::gil_scoped_release released;
  return std::make_shared<NgramTable>(num_words, arrays, begin_word, end_word, unknown_word);
}

// Checks integers given from outside against the number of states or words.
void check_below(const char* name, const Array<int64_t>& values, int64_t limit) {
  if (values.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one axis.");
  for (py::ssize_t i = 0; i < values.shape(0); ++i) {
    const int64_t value = values.at(i);
    if (value < 0 || value >= limit) {
      throw std::invalid_argument(std::string(name) + " must be from 0 to " + std::to_string(limit - 1) + ", got " +
                                  std::to_string(value) + ".");
    }
  }
}

py::tuple score(const NgramTable& table, const Array<int64_t>& states, const Array<int64_t>& words) {
  check_below("states", states, table.num_states());
  check_below("words", words, table.num_words());
  const py::ssize_t count = states.shape(0);
  if (words.shape(0) != count) throw std::invalid_argument("states and words must have the same length.");
  py::array_t<float> log_probs({count});
  py::array_t<int64_t> next_states({count});
  {
    const int64_t* from = states.data();
    const int64_t* given = words.data();
    float* scores = log_probs.mutable_data();
    int64_t* next = next_states.mutable_data();
    const py::gil_scoped_release released;
    for (py::ssize_t i = 0; i < count; ++i) {
      uint32_t state;
      scores[i] = table.score(static_cast<uint32_t>(from[i]), static_cast<uint32_t>(given[i]), &state);
      next[i] = state;
    }
  }
  return py::make_tuple(log_probs, next_states);
}

py::array_t<float> end(const NgramTable& table, const Array<int64_t>& states) {
  check_below("states", states, table.num_states());
  py::array_t<float> log_probs({states.shape(0)});
  const int64_t* from = states.data();
  float* scores = log_probs.mutable_data();
  const py::ssize_t count = states.shape(0);
  const py::gil_scoped_release released;
  for (py::ssize_t i = 0; i < count; ++i) scores[i] = table.end(static_cast<uint32_t>(from[i]));
  return log_probs;
}

py::array_t<float> dense(const NgramTable& table, const Array<int64_t>& states) {
  check_below("states", states, table.num_states());
  const py::ssize_t count = states.shape(0);
  py::array_t<float> log_probs({count, static_cast<py::ssize_t>(table.num_words())});
  const int64_t* from = states.data();
  float* scores = log_probs.mutable_data();
  const py::gil_scoped_release released;
  for (py::ssize_t i = 0; i < count; ++i) {
    table.dense(static_cast<uint32_t>(from[i]), scores + i * static_cast<int64_t>(table.num_words()));
  }
  return log_probs;
}

template <typename T>
py::array_t<T> copied(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// (words, first children, suffixes, states, log-probs, back-offs), copies.
py::tuple arrays(const NgramTable& table) {
  return py::make_tuple(copied(table.words()), copied(table.first_children()), copied(table.suffixes()),
                        copied(table.states()), copied(table.log_probs()), copied(table.back_offs()));
}

}  // namespace

void bind_ngram_table(py::module_& module) {
  const auto states = py::arg("states");
  // Held by shared_ptr, so that a search in C++ can keep the table alive.
  py::class_<NgramTable, WordTable, std::shared_ptr<NgramTable>>(module, "NgramTable")
      .def(py::init(&create), py::kw_only(), py::arg("num_words"), py::arg("orders"), py::arg("begin_word"),
           py::arg("end_word"), py::arg("unknown_word"))
      .def("score", &score, py::kw_only(), states, py::arg("words"))
      .def("end", &end, py::kw_only(), states)
      .def("dense", &dense, py::kw_only(), states)
      .def("arrays", &arrays)
      .def_property_readonly("start_state", &NgramTable::start_state)
      .def_property_readonly("null_state", &NgramTable::null_state)
      .def_property_readonly("num_words", &NgramTable::num_words)
      .def_property_readonly("num_states", &NgramTable::num_states)
      .def_property_readonly("num_bytes", &NgramTable::num_bytes)
      .def_property_readonly("order", &NgramTable::order);
}

}  // namespace shallowfusion
