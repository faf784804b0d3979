#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "ctc_prefix_scores.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace shallowfusion {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

// [frames, labels] as [labels, frames], tile by tile, so that both sides stay in the cache.
std::vector<float> by_label(const float* frames_first, int64_t frames, int64_t labels) {
  constexpr int64_t kTile = 32;
  std::vector<float> values(frames * labels);
  for (int64_t t0 = 0; t0 < frames; t0 += kTile) {
    for (int64_t label0 = 0; label0 < labels; label0 += kTile) {
      for (int64_t t = t0; t < std::min(t0 + kTile, frames); ++t) {
        for (int64_t label = label0; label < std::min(label0 + kTile, labels); ++label) {
          values[label * frames + t] = frames_first[t * labels + label];
        }
      }
    }
  }
  return values;
}

// The utterances of a batch. Calls run without the GIL, so a lock keeps other threads out meanwhile.
class CtcPrefixScores {
 public:
  CtcPrefixScores(const Array<float>& log_probs, const Array<int64_t>& counts, int64_t blank, int64_t delimiter,
                  double cut, int threads)
      : num_labels_(log_probs.ndim() == 3 ? log_probs.shape(2) : 0), blank_(blank), threads_(threads) {
    require(num_labels_ >= 1, "log_probs must have shape [utterances, frames, labels] with at least one label.");
    require(blank >= 0 && blank < num_labels_, "blank must be one of the labels.");
    require(delimiter >= -1 && delimiter < num_labels_ && delimiter != blank, "delimiter must be another label or -1.");
    require(cut >= 0.0 && cut < 1.0, "cut must be from 0 to below 1.");
    require(counts.ndim() == 1 && counts.shape(0) == log_probs.shape(0), "counts must have one entry per utterance.");
    const int64_t frames = log_probs.shape(1);
    for (py::ssize_t i = 0; i < counts.shape(0); ++i) {
      require(counts.at(i) >= 0 && counts.at(i) <= frames, "counts must be from 0 to the number of frames.");
    }
    const float* given = log_probs.data();
    const int64_t* used = counts.data();
    utterances_.resize(counts.shape(0));
    const py::gil_scoped_release no_gil;
    parallel_for(static_cast<int64_t>(utterances_.size()), threads_, [&](int64_t i) {
      const float* own = given + i * frames * num_labels_;
      std::vector<float> values = by_label(own, used[i], num_labels_);
      // Also false for NaN. A probability may exceed 1 by what float32 rounds away.
      for (const float value : values) require(value < 1e-3F, "log_probs must hold log-probabilities.");
      utterances_[i] = std::make_unique<CtcPrefixUtterance>(std::move(values), num_labels_, blank, delimiter, cut);
    });
  }

  py::array_t<double> scores(const Array<int64_t>& rows, const Array<int64_t>& labels) {
    const std::unique_lock<std::mutex> lock = locked();
    check(rows, labels);
    py::array_t<double> found({rows.shape(0), rows.shape(1)});
    const int64_t count = rows.shape(1);
    double* scores = found.mutable_data();
    const int64_t* own_rows = rows.data();
    const int64_t* own_labels = labels.data();
    const py::gil_scoped_release no_gil;
    parallel_for(rows.shape(0), threads_, [&](int64_t i) {
      utterances_[i]->scores(own_rows + i * count, own_labels + i * count, count, scores + i * count);
    });
    return found;
  }

  void follow(const Array<int64_t>& rows, const Array<int64_t>& labels) {
    const std::unique_lock<std::mutex> lock = locked();
    check(rows, labels);
    for (py::ssize_t i = 0; i < rows.size(); ++i) {
      require(labels.data()[i] != kCtcNothing || rows.data()[i] >= 0, "a row must continue a row.");
    }
    const int64_t count = rows.shape(1);
    const int64_t* own_rows = rows.data();
    const int64_t* own_labels = labels.data();
    const py::gil_scoped_release no_gil;
    parallel_for(rows.shape(0), threads_,
                 [&](int64_t i) { utterances_[i]->follow(own_rows + i * count, own_labels + i * count, count); });
  }

  void keep(const Array<int64_t>& order) {
    const std::unique_lock<std::mutex> lock = locked();
    require(order.ndim() == 1, "order must have one axis.");
    std::vector<bool> is_taken(utterances_.size(), false);
    for (py::ssize_t i = 0; i < order.shape(0); ++i) {
      const int64_t place = order.at(i);
      require(place >= 0 && place < static_cast<int64_t>(utterances_.size()) && !is_taken[place],
              "order must hold places of the batch, each at most once.");
      is_taken[place] = true;
    }
    std::vector<std::unique_ptr<CtcPrefixUtterance>> kept;
    for (py::ssize_t i = 0; i < order.shape(0); ++i) kept.push_back(std::move(utterances_[order.at(i)]));
    utterances_ = std::move(kept);
  }

  int64_t num_utterances() {
    const std::unique_lock<std::mutex> lock = locked();
    return static_cast<int64_t>(utterances_.size());
  }

  int64_t num_bytes() {
    const std::unique_lock<std::mutex> lock = locked();
    int64_t bytes = 0;
    for (const auto& utterance : utterances_) bytes += utterance->num_bytes();
    return bytes;
  }

 private:
  // Whoever holds the lock may be without the GIL and wait for it, so it is given up while waiting for the lock.
  std::unique_lock<std::mutex> locked() {
    const py::gil_scoped_release no_gil;
    return std::unique_lock<std::mutex>(mutex_);
  }

  void check(const Array<int64_t>& rows, const Array<int64_t>& labels) const {
    require(rows.ndim() == 2 && labels.ndim() == 2 && rows.shape(0) == labels.shape(0) &&
                rows.shape(1) == labels.shape(1) && rows.shape(0) == static_cast<py::ssize_t>(utterances_.size()),
            "rows and labels must have shape [utterances, candidates].");
    for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
      for (py::ssize_t k = 0; k < rows.shape(1); ++k) {
        const int64_t label = labels.at(i, k);
        require(label >= kCtcNothing && label < num_labels_ && label != blank_,
                "labels must be labels but the blank, -1 for the end or -2 for nothing.");
        const int64_t row = rows.at(i, k);
        const bool may_be_none = label == kCtcNothing && row == -1;
        require(may_be_none || (row >= 0 && row < utterances_[i]->num_rows()), "rows must be live rows.");
      }
    }
  }

  int64_t num_labels_;
  int64_t blank_;
  int threads_;
  std::vector<std::unique_ptr<CtcPrefixUtterance>> utterances_;
  std::mutex mutex_;
};

}  // namespace

void bind_ctc_prefix_scores(py::module_& module) {
  const auto rows = py::arg("rows");
  const auto labels = py::arg("labels");
  py::class_<CtcPrefixScores>(module, "CtcPrefixScores")
      .def(py::init<const Array<float>&, const Array<int64_t>&, int64_t, int64_t, double, int>(), py::kw_only(),
           py::arg("log_probs"), py::arg("counts"), py::arg("blank"), py::arg("delimiter"), py::arg("cut"),
           py::arg("threads"))
      .def("scores", &CtcPrefixScores::scores, py::kw_only(), rows, labels)
      .def("follow", &CtcPrefixScores::follow, py::kw_only(), rows, labels)
      .def("keep", &CtcPrefixScores::keep, py::kw_only(), py::arg("order"))
      .def_property_readonly("num_utterances", &CtcPrefixScores::num_utterances)
      .def_property_readonly("num_bytes", &CtcPrefixScores::num_bytes);
}

}  // namespace shallowfusion
