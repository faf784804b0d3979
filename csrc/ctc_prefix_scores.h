// CTC prefix scores for label-synchronous search. Described in shallowfusion/ctc/prefix_scores.py.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace shallowfusion {

// What stands in the place of a label.
constexpr int64_t kCtcEnd = -1;      // the text ends here
constexpr int64_t kCtcNothing = -2;  // no candidate, or a token that CTC knows nothing of

// Probabilities of the alignments of one prefix g, relative to psi(g), the probability of all texts that begin with g.
// Place t is after t frames; places first .. first + any.size() - 1 are stored, all others are 0.
struct CtcPrefixRow {
  int64_t last_label = -1;  // -1 = none
  int64_t first = 0;
  double log_psi = 0.0;       // -inf = impossible, or ended
  std::vector<double> any;    // all alignments
  std::vector<double> blank;  // those that end in blank
  double ending = 0.0;        // of a prefix that ends in a delimiter: psi(the prefix without it, end)
};

// The frames of one utterance and its live rows.
class CtcPrefixUtterance {
 public:
  // log_probs [labels, frames]; `delimiter` parts words, -1 = no label does; `cut` is the share of psi that may be
  // dropped at either end of a row, 0 = none.
  CtcPrefixUtterance(std::vector<float> log_probs, int64_t num_labels, int64_t blank, int64_t delimiter, double cut);

  int64_t num_rows() const { return static_cast<int64_t>(rows_.size()); }
  int64_t num_bytes() const;

  // Writes log psi(row + label) - log psi(row) of each candidate; rows are only read where there is one.
  void scores(const int64_t* rows, const int64_t* labels, int64_t count, double* scores);

  // Row k continues rows[k] with labels[k].
  void follow(const int64_t* rows, const int64_t* labels, int64_t count);

 private:
  using Row = std::shared_ptr<const CtcPrefixRow>;

  const std::vector<double>& column(int64_t label);
  const double* silences();
  bool adds_nothing(const CtcPrefixRow& row, int64_t label) const;
  double extension(const CtcPrefixRow& row, int64_t label);
  double ending(const CtcPrefixRow& row);
  Row extended(const CtcPrefixRow& row, int64_t label);

  int64_t num_frames_;
  int64_t blank_;
  int64_t delimiter_;
  double cut_;
  std::vector<float> log_probs_;
  std::vector<std::vector<double>> columns_;  // probabilities by label, made when a label is first asked for
  std::vector<double> silences_;              // blank or delimiter
  std::vector<double> entries_;               // this and the next two: scratch
  std::vector<double> any_;
  std::vector<double> in_blank_;
  std::vector<Row> rows_;
};

}  // namespace shallowfusion
