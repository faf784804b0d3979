// Rows of floats as int8 with one scale each, and products of such rows as floats again: what an int8 layer does around
// its matrix product.
#pragma once

#include <cstdint>

#include "fused_step_kernels.h"

namespace shallowfusion {

// whole[r, c] = round-half-even(values[r, c] / scales[r]), scales[r] = max(max_c |values[r, c]| / 127, 1e-30).
//
// values [rows, columns], dense, float32 or bfloat16. A row that holds NaN has a NaN scale, and any whole numbers.
void round_rows(const char* values, Dtype dtype, int64_t rows, int64_t columns, int8_t* whole, float* scales,
                int threads);

// output[r, c] = product[r, c] * scales[r] + bias[c]; all dense, bias may be null, output float32 or bfloat16
// (round half to even). The output may be the product itself.
void scale_rows(const float* product, const float* scales, const float* bias, int64_t rows, int64_t columns,
                char* output, Dtype dtype, int threads);

}  // namespace shallowfusion
