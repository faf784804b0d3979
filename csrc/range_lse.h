// Log of the summed probability of ranges of an order of the vocabulary, on the CPU.
//
// All memory belongs to the caller; each thread keeps two rows of float32.
#pragma once

#include <cstdint>

#include "fused_step_kernels.h"

namespace shallowfusion {

// One checked call; the meaning of each field is that of range_log_probs in shallowfusion/scorers/token_ranges.py.
struct RangeArguments {
  const char* logits = nullptr;  // [rows, vocab]
  Dtype dtype = Dtype::float32;
  int64_t rows = 0;
  int64_t vocab = 0;
  int64_t row_stride = 0;  // elements
  double temperature = 1.0;
  const int32_t* order = nullptr;  // null = the ids themselves
  const int32_t* row_offsets = nullptr;
  const int32_t* first = nullptr;
  const int32_t* last = nullptr;
  const float* given_sums = nullptr;  // null = to be computed
};

// Fills log_probs [ranges] and log_sums [rows]; same bits for any number of threads.
//
// A row's logits are read once or, where its log-sum is given and its ranges hold few tokens, only those of its ranges.
// Sums are of positive numbers only, so an improbable range is as exact as a probable one.
void range_log_probs(const RangeArguments& arguments, float* log_probs, float* log_sums, const Kernels& kernels,
                     int threads);

}  // namespace shallowfusion
