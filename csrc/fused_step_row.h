// What one row of the fused step needs while it is worked on.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "fused_step.h"
#include "half.h"

namespace shallowfusion {

constexpr double kCoarse = 64.0;  // log2 scores summed from larger numbers are too coarse in float32 to be summed
constexpr double kNever = -std::numeric_limits<double>::infinity();

inline float read_logit(Dtype dtype, const char* row, int64_t index) {
  if (dtype == Dtype::float32) return reinterpret_cast<const float*>(row)[index];
  const uint16_t value = reinterpret_cast<const uint16_t*>(row)[index];
  return dtype == Dtype::float16 ? half_to_float(value) : bfloat_to_float(value);
}

// The softmax of one row of one source, summed up; NaN throughout when the row holds NaN or +inf.
struct RowSoftmax {
  double log_sum_exp = 0.0;
  double best_log_prob = 0.0;  // set under the neutral policy, and by exact_softmax
  double largest = 0.0;        // logit; set by exact_softmax
  bool known = false;
  bool exact = false;  // set by exact_softmax

  // Largest logit and its log-prob, or 0 and the log-prob of a logit of 0: what differences are taken against.
  double origin() const { return exact ? largest : 0.0; }
  double origin_log_prob() const { return exact ? best_log_prob : -log_sum_exp; }
};

// A continuation of one row; `score` is its increment, rewards counted, in nats.
struct Entry {
  double score;
  int64_t token;
};

inline bool better(const Entry& a, const Entry& b) {
  return a.score != b.score ? a.score > b.score : a.token < b.token;
}

struct RowResult {
  std::vector<Entry> best;  // unordered
  RowSoftmax softmax[kMaxSources];
  bool flagged = false;
  bool one_pass = false;  // which path scored the row
  bool general = false;
};

// A source that this row uses.
struct RowSource {
  const SourceView* view;
  const char* logits;
  int index;
  double weight;
  double inverse;  // 1 / temperature
  float scale;     // log2(e) / temperature
  float offset;    // y = scale * x + offset
  bool needs_largest;
  RowSoftmax softmax;

  // Index into the logits of an acoustic token, -1 = no counterpart.
  int64_t id_of(int64_t token) const {
    if (view->map != nullptr) return view->map[token];
    return token < view->vocab ? token : -1;
  }
  double unmapped_log_prob() const {
    if (view->policy == Policy::neutral) return softmax.best_log_prob;
    return view->policy == Policy::floor ? view->floor : kNever;
  }
};

// Tokens [first, last) with the same sources present; without `tokens` they exist only in one source.
struct Segment {
  int64_t first;
  int64_t last;
  uint32_t present;  // bit i: sources[i]
  bool tokens;
  int64_t first_block;
  double constant;  // log2: a token's increment is combined + constant

  int64_t num_blocks() const { return (last - first + kBlock - 1) / kBlock; }
};

// Settings of the call that every row shares.
struct StepContext {
  const StepArguments& arguments;
  const Kernels& kernels;
  std::vector<bool> biased_spans;  // per kGroupSpan tokens: token_bias is not all zero

  StepContext(const StepArguments& arguments, const Kernels& kernels);
};

struct RowWork {
  const StepContext* context = nullptr;
  int64_t row = 0;
  Normalize normalize = Normalize::none;  // none for a row of end_factored that is not fused
  bool general = false;
  std::vector<RowSource> sources;  // weight != 0; general rows of end_factored keep the acoustic one at any weight
  std::vector<Segment> segments;
  int64_t num_blocks = 0;
  std::vector<double> sums;     // [blocks, sources + 1]: sum of 2^y per source, then of 2^combined
  std::vector<float> largest;   // [blocks, sources]
  std::vector<float> maxima;    // [blocks, groups per block, lanes]
  std::vector<float> combined;  // general rows: [vocab], log2 of the fused score
  std::vector<float> scratch;
  std::vector<float> survivors;
  std::vector<int32_t> places;
  double shift = 0.0;  // nats, added to every increment but, under end_factored, that of the end token

  const StepArguments& arguments() const { return context->arguments; }
  const Kernels& kernels() const { return context->kernels; }
  int64_t groups_per_block() const { return kBlock / kGroupSpan; }
  float* block_maxima(int64_t block) { return maxima.data() + block * groups_per_block() * kernels().lanes; }
};

// Chooses the sources and the path of a row. False: the row is dead or its total is NaN (then flagged).
bool plan_row(RowWork& work, const StepContext& context, int64_t row, RowResult& result);

// One pass: references, segments and room for the sums; sets general where the references are out of range.
void plan_one_pass(RowWork& work);
// One pass: reads blocks [first, last) of the plan and fills sums, largest and maxima.
void scan_blocks(RowWork& work, int64_t first, int64_t last);
// One pass: the softmaxes, constants and shift out of the sums. False: float32 range did not suffice, go general.
bool close_scan(RowWork& work, RowResult& result);
// Writes log2 of the fused score of tokens [token, token + count) of a segment, padded with -inf.
void combine_tokens(const RowWork& work, const Segment& segment, int64_t token, int64_t count, float* combined);

// Any rule, in several passes: fills combined, maxima, one segment and shift.
void score_general_row(RowWork& work, RowResult& result);
RowSoftmax exact_softmax(const SourceView& view, int64_t row, const Kernels& kernels);

// token_bias and the allowed mask of tokens [token, token + count) or null when they change nothing.
const float* bias_of(const RowWork& work, int64_t token, int64_t count, float* scratch);

// token_bias and the allowed mask of one token, nats.
double static_bias_of(const RowWork& work, int64_t token);
// The increment of one token in float64 before rewards, -inf = impossible.
double increment_of(const RowWork& work, int64_t token);
// What `local` sums for the end token, which no block holds: increment and static bias.
double end_log_score(const RowWork& work);
// The log-prob a source gives an acoustic token, its unmapped policy applied.
double log_prob_of(const RowSource& source, int64_t token);

// Keeps the top_k best tokens of a row whose maxima are filled.
void select_row(RowWork& work, RowResult& result);

}  // namespace shallowfusion
