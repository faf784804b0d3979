// The fused step and the row statistics on the CPU: what a call receives and what it fills.
//
// All memory belongs to the caller. Nothing here allocates more than O(rows * top_k + vocab) floats per thread.
#pragma once

#include <cstdint>
#include <vector>

#include "fused_step_kernels.h"

namespace shallowfusion {

constexpr int kMaxSources = 8;

enum class Policy { neutral, floor, forbid };
enum class Combine { log_linear, mixture };
enum class Normalize { none, local, end_factored };

// One source of logits [rows, vocab]; `map` is null or the id here of each acoustic token, -1 = no counterpart.
struct SourceView {
  const char* logits = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t vocab = 0;
  int64_t row_stride = 0;  // elements
  double temperature = 1.0;
  const int32_t* map = nullptr;
  Policy policy = Policy::neutral;
  double floor = 0.0;
};

// One checked call; the meaning of each field is that of StepRequest in shallowfusion/values.py.
struct StepArguments {
  std::vector<SourceView> sources;
  const float* weights = nullptr;  // [rows, sources]
  const float* totals = nullptr;   // [rows]
  const float* length_bonus = nullptr;
  int64_t rows = 0;
  int64_t beam_size = 1;
  int64_t top_k = 1;
  int64_t end_id = -1;
  const float* token_bias = nullptr;
  const int32_t* allowed = nullptr;  // [rows, allowed_words]
  int64_t allowed_words = 0;
  const int32_t* bonus_offsets = nullptr;
  const int32_t* bonus_tokens = nullptr;
  const float* bonus_values = nullptr;
  Combine combine = Combine::log_linear;
  Normalize normalize = Normalize::none;

  int64_t vocab() const { return sources[0].vocab; }
  bool allows(int64_t row, int64_t token) const {
    if (allowed == nullptr) return true;
    const uint32_t word = static_cast<uint32_t>(allowed[row * allowed_words + token / 32]);
    return (word >> (token % 32)) & 1u;
  }
};

// Arrays [utterances, top_k] (parts: [utterances, top_k, sources]) and flags [rows].
struct StepOutput {
  float* totals = nullptr;
  int64_t* parent_rows = nullptr;
  int64_t* token_ids = nullptr;
  float* parts = nullptr;
  bool* flags = nullptr;
};

// How many rows went which way, so that a test can assert that a branch ran.
struct StepTrace {
  int64_t one_pass_rows = 0;
  int64_t general_rows = 0;
  int64_t split_rows = 0;
};

// Scores every continuation and keeps the best; same bits for any number of threads.
//
// Reads each logit of a row once when the row is log-linear and its sources share token ids (the winners' blocks, a
// fiftieth of the row, are read again from L2). Bound: about 20 vector operations per 16 pairs of logits with
// AVX-512, 30 with end_factored or local; the floor is rows * sum(vocab * itemsize) bytes of memory reads.
StepTrace fused_step(const StepArguments& arguments, const StepOutput& output, const Kernels& kernels, int threads);

// Arrays [rows], in nats; one read of each logit.
struct StatisticsOutput {
  float* log_sum_exp = nullptr;
  float* entropy = nullptr;
  float* max_log_prob = nullptr;
  float* margin = nullptr;
};

void row_statistics(const SourceView& source, int64_t rows, const StatisticsOutput& output, const Kernels& kernels,
                    int threads);

}  // namespace shallowfusion
