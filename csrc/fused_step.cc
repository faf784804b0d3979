// Rows to threads, rows to utterances, and the parts of the winners.
#include "fused_step.h"

#include <algorithm>
#include <tuple>

#include "float_mode.h"
#include "fused_step_row.h"
#include "thread_pool.h"

namespace shallowfusion {
namespace {

RowSource make_source(const SourceView& view, int index, int64_t row, double weight) {
  RowSource source{};
  source.view = &view;
  source.logits = view.logits + row * view.row_stride * item_size(view.dtype);
  source.index = index;
  source.weight = weight;
  source.inverse = 1.0 / view.temperature;
  source.scale = static_cast<float>(kLog2E / view.temperature);
  return source;
}

bool any_source_broken(const RowWork& work) {
  for (const RowSource& source : work.sources) {
    const auto broken = work.kernels().any_broken[static_cast<int>(source.view->dtype)];
    if (broken(source.logits, source.view->vocab)) return true;
  }
  return false;
}

// The tokens that source has no counterpart for need its largest log-prob under the neutral policy.
bool needs_largest(const SourceView& view, int64_t vocab) {
  return view.policy == Policy::neutral && (view.map != nullptr || view.vocab < vocab);
}

void finish_row(RowWork& work, RowResult& result) {
  result.one_pass = !work.general && close_scan(work, result);
  if (!result.one_pass) score_general_row(work, result);
  for (const RowSource& source : work.sources) result.softmax[source.index] = source.softmax;
  if (!result.flagged) select_row(work, result);
}

void score_rows(const StepContext& context, int threads, std::vector<RowResult>& results) {
  parallel_for(static_cast<int64_t>(results.size()), threads, [&](int64_t row) {
    const FlushDenormals mode;
    thread_local RowWork work;
    if (!plan_row(work, context, row, results[row])) return;
    if (!work.general) scan_blocks(work, 0, work.num_blocks);
    finish_row(work, results[row]);
  });
}

// Fewer rows than threads: each row's blocks are shared out. The sums are kept by block, so no bit depends on it.
int64_t score_split_rows(const StepContext& context, int threads, std::vector<RowResult>& results) {
  struct Part {
    int64_t row;
    int64_t first;
    int64_t last;
  };
  const auto rows = static_cast<int64_t>(results.size());
  std::vector<RowWork> works(rows);
  std::vector<char> live(rows, 0);
  parallel_for(rows, threads, [&](int64_t row) {
    const FlushDenormals mode;
    live[row] = plan_row(works[row], context, row, results[row]);
  });
  std::vector<Part> parts;
  int64_t split = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (!live[row] || works[row].general) continue;
    const int64_t size = std::max<int64_t>(1, works[row].num_blocks * rows / (2 * threads));
    for (int64_t first = 0; first < works[row].num_blocks; first += size) {
      parts.push_back({row, first, std::min(first + size, works[row].num_blocks)});
    }
    ++split;
  }
  parallel_for(static_cast<int64_t>(parts.size()), threads, [&](int64_t part) {
    const FlushDenormals mode;
    scan_blocks(works[parts[part].row], parts[part].first, parts[part].last);
  });
  parallel_for(rows, threads, [&](int64_t row) {
    const FlushDenormals mode;
    if (live[row]) finish_row(works[row], results[row]);
  });
  return split;
}

void write_parts(const StepContext& context, int64_t row, int64_t token, RowResult& result, float* parts) {
  for (size_t index = 0; index < context.arguments.sources.size(); ++index) {
    const SourceView& view = context.arguments.sources[index];
    RowSource source = make_source(view, static_cast<int>(index), row, 0.0);
    RowSoftmax& softmax = result.softmax[index];
    if (!softmax.known) softmax = exact_softmax(view, row, context.kernels);  // a source of weight 0
    source.softmax = softmax;
    parts[index] = static_cast<float>(log_prob_of(source, token));
  }
}

void merge_utterance(const StepContext& context, int64_t utterance, std::vector<RowResult>& results,
                     const StepOutput& output) {
  const StepArguments& arguments = context.arguments;
  const auto num_sources = static_cast<int64_t>(arguments.sources.size());
  using Candidate = std::tuple<float, int64_t, int64_t>;  // minus the total, row, token: ascending is best first
  std::vector<Candidate> candidates;
  for (int64_t row = utterance * arguments.beam_size; row < (utterance + 1) * arguments.beam_size; ++row) {
    if (results[row].flagged) continue;
    for (const Entry& entry : results[row].best) {
      const auto total = static_cast<float>(static_cast<double>(arguments.totals[row]) + entry.score);
      if (total > kImpossible) candidates.emplace_back(-total, row, entry.token);
    }
  }
  const int64_t count = std::min<int64_t>(arguments.top_k, static_cast<int64_t>(candidates.size()));
  std::partial_sort(candidates.begin(), candidates.begin() + count, candidates.end());
  for (int64_t place = 0; place < arguments.top_k; ++place) {
    const int64_t at = utterance * arguments.top_k + place;
    output.totals[at] = kImpossible;
    output.parent_rows[at] = -1;
    output.token_ids[at] = -1;
    std::fill_n(output.parts + at * num_sources, num_sources, 0.0f);
    if (place >= count) continue;
    const auto& [cost, row, token] = candidates[place];
    output.totals[at] = -cost;
    output.parent_rows[at] = row;
    output.token_ids[at] = token;
    write_parts(context, row, token, results[row], output.parts + at * num_sources);
  }
}

}  // namespace

StepContext::StepContext(const StepArguments& step_arguments, const Kernels& step_kernels)
    : arguments(step_arguments), kernels(step_kernels) {
  if (arguments.token_bias == nullptr) return;
  for (int64_t token = 0; token < arguments.vocab(); token += kGroupSpan) {
    const int64_t count = std::min(kGroupSpan, arguments.vocab() - token);
    biased_spans.push_back(kernels.any_nonzero(arguments.token_bias + token, count));
  }
}

const float* bias_of(const RowWork& work, int64_t token, int64_t count, float* scratch) {
  const StepArguments& arguments = work.arguments();
  const float* bias = nullptr;
  if (arguments.token_bias != nullptr) {
    for (int64_t span = token / kGroupSpan; span <= (token + count - 1) / kGroupSpan; ++span) {
      if (work.context->biased_spans[span]) bias = arguments.token_bias + token;
    }
  }
  const int64_t padded = round_up(count, work.kernels().lanes);
  if (arguments.allowed != nullptr) {
    const int32_t* words = arguments.allowed + work.row * arguments.allowed_words;
    work.kernels().mask_block(words, arguments.allowed_words, token, count, bias, scratch);
  } else if (bias == nullptr || padded == count) {
    return bias;
  } else {
    std::copy_n(bias, count, scratch);
  }
  std::fill(scratch + count, scratch + padded, 0.0f);
  return scratch;
}

bool plan_row(RowWork& work, const StepContext& context, int64_t row, RowResult& result) {
  const StepArguments& arguments = context.arguments;
  const auto num_sources = static_cast<int>(arguments.sources.size());
  const float* weights = arguments.weights + row * num_sources;
  const bool fused = std::any_of(weights + 1, weights + num_sources, [](float weight) { return weight != 0.0f; });
  work.context = &context;
  work.row = row;
  work.normalize = arguments.normalize == Normalize::end_factored && !fused ? Normalize::none : arguments.normalize;
  work.general = arguments.combine == Combine::mixture;
  work.sources.clear();
  for (int index = 0; index < num_sources; ++index) {
    const bool kept = index == 0 && work.normalize == Normalize::end_factored;
    if (weights[index] == 0.0f && !kept) continue;
    work.sources.push_back(make_source(arguments.sources[index], index, row, weights[index]));
    work.sources.back().needs_largest = needs_largest(arguments.sources[index], arguments.vocab());
    if (weights[index] == 0.0f || arguments.sources[index].map != nullptr) work.general = true;
  }
  if (work.sources.empty()) work.general = true;
  const float total = arguments.totals[row];
  if (std::isnan(total) || total == kImpossible) {
    result.flagged = std::isnan(total) || any_source_broken(work);
    return false;
  }
  if (!work.general) plan_one_pass(work);
  return true;
}

StepTrace fused_step(const StepArguments& arguments, const StepOutput& output, const Kernels& kernels, int threads) {
  const StepContext context(arguments, kernels);
  std::vector<RowResult> results(arguments.rows);
  StepTrace trace;
  if (threads > arguments.rows) {
    trace.split_rows = score_split_rows(context, threads, results);
  } else {
    score_rows(context, threads, results);
  }
  for (int64_t row = 0; row < arguments.rows; ++row) {
    output.flags[row] = results[row].flagged;
    trace.one_pass_rows += results[row].one_pass;
    trace.general_rows += results[row].general;
  }
  parallel_for(arguments.rows / arguments.beam_size, threads,
               [&](int64_t utterance) {
                 const FlushDenormals mode;
                 merge_utterance(context, utterance, results, output);
               });
  return trace;
}

}  // namespace shallowfusion
