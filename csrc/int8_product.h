// A few rows of floats times a matrix of int8 weights: rounding, product and scaling in one call (AVX-512 VNNI).
#pragma once

#include <cstdint>

#include "fused_step_kernels.h"

namespace shallowfusion {

constexpr int64_t kOutputsAtOnce = 16;  // outputs that share one vector of sums
constexpr int64_t kInputsAtOnce = 4;    // inputs that one instruction multiplies and sums

// Whether this machine has the instructions.
bool has_int8_product();

// Bytes that `pack_int8` writes: inputs a multiple of kInputsAtOnce, outputs rounded up to kOutputsAtOnce.
int64_t packed_int8_size(int64_t outputs, int64_t inputs);

// weights [outputs, inputs], dense -> [outputs / 16, inputs / 4, 16, 4] of weight + 128, missing outputs as weight 0.
void pack_int8(const int8_t* weights, int64_t outputs, int64_t inputs, uint8_t* packed);

struct Int8Product {
  const char* values;      // [rows, inputs], dense, float32 or bfloat16
  Dtype dtype;             // of values
  const uint8_t* packed;   // by pack_int8
  const float* scales;     // [outputs]
  const float* bias;       // [outputs] or null
  char* output;            // [rows, outputs], dense
  Dtype output_dtype;      // float32 or bfloat16
  int64_t rows;
  int64_t inputs;
  int64_t outputs;
};

// output[r, o] = x_scale[r] * scales[o] * sum_i whole[r, i] * weight[o, i] + bias[o], with whole and x_scale as
// `round_rows` makes them; the sum is exact.
void int8_product(const Int8Product& arguments, int threads);

}  // namespace shallowfusion
