#include "ctc_prefix_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "float_mode.h"

namespace shallowfusion {
namespace {

constexpr double kImpossible = -std::numeric_limits<double>::infinity();
constexpr double kSmallest = 1e-260;  // e^-600: what is less likely after a prefix counts as impossible

// Four sums hide the latency of the additions; the order is fixed, so results are the same on every machine.
double dot(const double* left, const double* right, int64_t count) {
  double sums[4] = {0.0, 0.0, 0.0, 0.0};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t k = 0; k < 4; ++k) sums[k] += left[i + k] * right[i + k];
  }
  for (; i < count; ++i) sums[0] += left[i] * right[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

std::shared_ptr<const CtcPrefixRow> dead_row() {
  auto row = std::make_shared<CtcPrefixRow>();
  row->log_psi = kImpossible;
  return row;
}

}  // namespace

CtcPrefixUtterance::CtcPrefixUtterance(std::vector<float> log_probs, int64_t num_labels, int64_t blank,
                                       int64_t delimiter, double cut)
    : num_frames_(static_cast<int64_t>(log_probs.size()) / num_labels),
      blank_(blank),
      delimiter_(delimiter),
      cut_(cut),
      log_probs_(std::move(log_probs)),
      columns_(num_labels) {
  const FlushDenormals flush;
  auto row = std::make_shared<CtcPrefixRow>();
  const double* blanks = silences();
  double silent = 1.0;
  row->blank.push_back(silent);
  for (int64_t t = 0; t < num_frames_ && silent > 0.0; ++t) {
    silent *= blanks[t];
    if (silent <= cut_) break;  // nearly all alignments have said something by now
    row->blank.push_back(silent);
  }
  row->any = row->blank;
  rows_.push_back(std::move(row));
}

int64_t CtcPrefixUtterance::num_bytes() const {
  size_t values = 0;
  for (const auto& column : columns_) values += column.capacity();
  for (const Row& row : rows_) values += row->any.capacity() + row->blank.capacity();
  return static_cast<int64_t>(values * sizeof(double) + log_probs_.capacity() * sizeof(float));
}

const std::vector<double>& CtcPrefixUtterance::column(int64_t label) {
  std::vector<double>& own = columns_[label];
  if (own.empty() && num_frames_ > 0) {
    own.resize(num_frames_);
    for (int64_t t = 0; t < num_frames_; ++t) {
      own[t] = std::exp(static_cast<double>(log_probs_[label * num_frames_ + t]));
    }
  }
  return own;
}

// What may be said before the first word and after the last without adding to the text.
const double* CtcPrefixUtterance::silences() {
  if (delimiter_ < 0) return column(blank_).data();
  if (silences_.empty() && num_frames_ > 0) {
    const std::vector<double>& blanks = column(blank_);
    const std::vector<double>& delimiters = column(delimiter_);
    silences_.resize(num_frames_);
    for (int64_t t = 0; t < num_frames_; ++t) silences_[t] = blanks[t] + delimiters[t];
  }
  return silences_.data();
}

// A delimiter before the first word or after a delimiter.
bool CtcPrefixUtterance::adds_nothing(const CtcPrefixRow& row, int64_t label) const {
  return label == delimiter_ && delimiter_ >= 0 && (row.last_label < 0 || row.last_label == delimiter_);
}

// psi(row, end) / psi(row): the delimiters after the last word do not count, whether the row has said one or not.
double CtcPrefixUtterance::ending(const CtcPrefixRow& row) {
  if (delimiter_ >= 0 && row.last_label == delimiter_) return row.ending;
  if (row.any.empty()) return 0.0;
  const auto stored = static_cast<int64_t>(row.any.size());
  const double whole = row.first + stored == num_frames_ + 1 ? row.any.back() : 0.0;
  if (delimiter_ < 0 || row.last_label < 0) return whole;
  const double* silent = silences();
  const double* parting = column(delimiter_).data();
  double after = 0.0;
  for (int64_t t = row.first; t < num_frames_; ++t) {
    const double before = t - row.first < stored ? row.any[t - row.first] : 0.0;
    after = after * silent[t] + before * parting[t];
  }
  return whole + after;
}

// psi(row + label) / psi(row): each alignment is counted at the frame where it first says the label.
double CtcPrefixUtterance::extension(const CtcPrefixRow& row, int64_t label) {
  const std::vector<double>& before = label == row.last_label ? row.blank : row.any;
  const auto stored = static_cast<int64_t>(before.size());
  const int64_t count = std::min(stored, num_frames_ - row.first);
  if (count <= 0) return 0.0;
  return dot(before.data(), column(label).data() + row.first, count);
}

void CtcPrefixUtterance::scores(const int64_t* rows, const int64_t* labels, int64_t count, double* scores) {
  const FlushDenormals flush;
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = 0.0;
    if (labels[i] == kCtcNothing) continue;
    const CtcPrefixRow& row = *rows_[rows[i]];
    double ratio = 0.0;
    if (row.log_psi != kImpossible) {
      if (adds_nothing(row, labels[i])) continue;
      ratio = labels[i] == kCtcEnd ? ending(row) : extension(row, labels[i]);
    }
    scores[i] = ratio < kSmallest ? kImpossible : std::log(ratio);
  }
}

void CtcPrefixUtterance::follow(const int64_t* rows, const int64_t* labels, int64_t count) {
  const FlushDenormals flush;
  std::vector<Row> next;
  next.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const Row& row = rows_[rows[i]];
    if (labels[i] == kCtcNothing) {
      next.push_back(row);
    } else if (labels[i] == kCtcEnd || row->log_psi == kImpossible) {
      next.push_back(dead_row());
    } else if (adds_nothing(*row, labels[i])) {
      next.push_back(row);
    } else {
      next.push_back(extended(*row, labels[i]));
    }
  }
  rows_ = std::move(next);
}

CtcPrefixUtterance::Row CtcPrefixUtterance::extended(const CtcPrefixRow& row, int64_t label) {
  const double ratio = extension(row, label);
  if (ratio < kSmallest) return dead_row();
  const std::vector<double>& before = label == row.last_label ? row.blank : row.any;
  const double* spoken = column(label).data();
  const double ended = label == delimiter_ ? ending(row) : 0.0;
  const double* blanks = column(blank_).data();
  // entries[t]: share of psi(row + label) that says the label at frame t for the first time; then its sums to the end.
  const int64_t last = std::min(row.first + static_cast<int64_t>(before.size()), num_frames_);
  const double scale = 1.0 / ratio;
  entries_.assign(num_frames_ + 1, 0.0);
  double entered = 0.0;
  int64_t start = row.first;
  for (int64_t t = row.first; t < last; ++t) {
    entries_[t] = before[t - row.first] * scale * spoken[t];
    entered += entries_[t];
    if (entered <= cut_) start = t + 1;
  }
  auto next = std::make_shared<CtcPrefixRow>();
  next->last_label = label;
  next->log_psi = row.log_psi + std::log(ratio);
  next->first = start + 1;
  next->ending = ended * scale;
  any_.clear();
  in_blank_.clear();
  for (int64_t t = num_frames_ - 1; t >= start; --t) entries_[t] += entries_[t + 1];
  double in_label = 0.0;
  double in_blank = 0.0;
  for (int64_t t = start; t < num_frames_; ++t) {
    const double entering = t < last ? before[t - row.first] * scale * spoken[t] : 0.0;
    const double was_in_label = in_label;
    in_label = in_label * spoken[t] + entering;
    in_blank = (in_blank + was_in_label) * blanks[t];
    if (in_label + in_blank + entries_[t + 1] <= cut_) break;
    any_.push_back(in_label + in_blank);
    in_blank_.push_back(in_blank);
  }
  next->any.assign(any_.begin(), any_.end());
  next->blank.assign(in_blank_.begin(), in_blank_.end());
  return next;
}

}  // namespace shallowfusion
