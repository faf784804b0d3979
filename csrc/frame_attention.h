// Cross-attention of a few queries per utterance over its frames: keys and values are read once for all of them.
#pragma once

#include <cstdint>

#include "fused_step_kernels.h"

namespace shallowfusion {

constexpr int64_t kMostDim = 256;

// Keys or values [utterances, frames, key_heads, dim]; strides count elements, that of dim is 1.
struct FrameTensor {
  const char* data;
  int64_t utterance_stride;
  int64_t frame_stride;
  int64_t head_stride;
};

struct FrameAttention {
  // [utterances, queries, heads, dim], strides likewise; heads are a multiple of key_heads. With starts
  // [queries, heads, dim], those of each utterance side by side.
  const float* query;
  int64_t query_utterance_stride;
  int64_t query_position_stride;
  int64_t query_head_stride;
  FrameTensor keys;
  FrameTensor values;
  Dtype dtype;             // of keys and values
  float* output;           // as the query, dense
  const int32_t* lengths;  // [utterances], frames of each that are seen; null = all
  const int64_t* starts;   // [utterances + 1], the first query of each, then `queries`; null = each has `queries`
  int64_t utterances;
  int64_t queries;
  int64_t heads;
  int64_t key_heads;
  int64_t frames;
  int64_t dim;  // a multiple of kMaxLanes, at most kMostDim
  float scale;
};

// softmax(scale * query . key) over the frames, times their values; no frames give zeros.
void frame_attention(const FrameAttention& arguments, const Kernels& kernels, int threads);

}  // namespace shallowfusion
