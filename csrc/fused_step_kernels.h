// The inner loops of the fused step and of attention over frames, one table of functions per SIMD level.
//
// Everything of the fused step is in log2 units relative to a reference: y = scale * x + offset, probability ~ 2^y.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace shallowfusion {

enum class Dtype { float32 = 0, float16 = 1, bfloat16 = 2 };

constexpr float kImpossible = -std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;
constexpr int64_t kBlock = 1024;   // tokens summed in float32 before the sum goes to double
constexpr int64_t kGroupSpan = 256;  // tokens that share one vector of group maxima
constexpr int kMaxLanes = 16;

// What one pass over a block of one source does, as bits of an index into Kernels::source_block.
enum SourceWork : unsigned {
  kFirst = 1,     // combined is written, not added to
  kNegative = 2,  // weight < 0: an impossible token must stay impossible
  kLargest = 4,   // report the largest logit
  kSum = 8,       // report sum of 2^y
  kCombine = 16,  // combined += weight * y
  kUnit = 32,     // with kFirst: weight is 1, so nothing is multiplied
  kSourceVariants = 64,
};

struct SourceArguments {
  const void* logits;
  int64_t count;  // multiple of Kernels::lanes
  float scale;
  float offset;
  float weight;
  float* combined;
};

struct SourceResult {
  float sum;
  float largest;
};

enum class SumOf { nothing, before_bias, after_bias };

struct FinishArguments {
  const float* combined;
  const float* bias;  // nats, null = none; count entries
  int64_t count;      // multiple of Kernels::lanes
  float* group_maxima;  // [ceil(count / kGroupSpan), lanes]
};

// Two sources of one dtype, the first of weight 1, the second of positive weight.
struct PairArguments {
  const void* first;
  const void* second;
  int64_t count;  // multiple of Kernels::lanes
  float first_scale;
  float first_offset;
  float second_scale;
  float second_offset;
  float weight;
  const float* bias;    // as in FinishArguments
  float* group_maxima;  // as in FinishArguments
};

struct PairResult {
  float first_sum;
  float second_sum;
  float combined_sum;
  float largest;  // of the second
};

struct StatisticsArguments {
  const void* logits;
  int64_t count;  // multiple of Kernels::lanes
  float scale;
  float offset;
};

struct StatisticsResult {
  float sum;       // of 2^y
  float weighted;  // of 2^y * y
  float largest;
  float second;  // largest but one, equal values counted twice
};

struct Kernels {
  const char* name;
  int lanes;
  float offset_limit;  // |offset| up to which y = scale * x + offset loses nothing that matters
  SourceResult (*source_block[3][kSourceVariants])(const SourceArguments&);
  float (*finish_block[3])(const FinishArguments&);  // by SumOf; returns the sum of 2^combined
  PairResult (*pair_block[3][2][3])(const PairArguments&);  // by dtype, largest wanted, SumOf
  StatisticsResult (*statistics_block[3])(const StatisticsArguments&);
  // Copies x - subtract as float32 and pads with -inf to a multiple of lanes.
  void (*convert_block[3])(const void* logits, int64_t count, float subtract, float* out);
  // out = 2^((x - subtract) * scale), whole lanes of which past count are 0; returns their sum. An impossible x gives
  // at most 2^-126.
  float (*exp2_block[3])(const void* logits, int64_t count, float subtract, float scale, float* out);
  // out = bias (null = 0) where bit first_bit + i is set, else -inf.
  void (*mask_block)(const int32_t* words, int64_t num_words, int64_t first_bit, int64_t count, const float* bias,
                     float* out);
  // Offsets, ascending, of combined + bias >= threshold.
  int64_t (*collect_above)(const FinishArguments& block, float threshold, int32_t* offsets);
  // out = log2 of the sum of 2^values[s]; up to 8 sources.
  void (*mix_block)(const float* const* values, int num_sources, int64_t count, float* out);
  // True when a NaN or +inf is among the logits.
  bool (*any_broken[3])(const void* logits, int64_t count);
  bool (*any_nonzero)(const float* values, int64_t count);
  // scores[row * score_stride + frame] = query[row] . keys[frame], [rows, dim] float32 by [frames, dim]; whole groups of
  // kMaxLanes frames are written. `ahead`: a block of as many frames that is read soon, or null.
  void (*frame_scores[3])(const float* query, int64_t rows, int64_t dim, const void* keys, int64_t frame_stride,
                          int64_t frames, const void* ahead, float* scores, int64_t score_stride);
  // x -> 2^(x - largest), 0 from count to the next multiple of kMaxLanes; returns the sum.
  float (*frame_shares)(float* scores, int64_t count);
  // output[row] += sum over frames of shares[row * share_stride + frame] * values[frame], [rows, dim] float32.
  void (*frame_mix[3])(const float* shares, int64_t share_stride, int64_t rows, int64_t dim, const void* values,
                       int64_t frame_stride, int64_t frames, const void* ahead, float* output);
};

inline int64_t item_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();    // null where the compiler does not target x86-64
const Kernels* avx512_kernels();  // null where the compiler does not target x86-64

// Levels this machine runs, slowest first.
std::vector<const Kernels*> available_kernels();

// The level of that name, or the fastest; std::invalid_argument if this machine runs no such level.
const Kernels& kernels_named(const std::optional<std::string>& name);

}  // namespace shallowfusion
