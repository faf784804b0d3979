// What one SIMD level computes of an int8 product.
#pragma once

#include "int8_product.h"

namespace shallowfusion {

struct VnniCall {
  const int8_t* whole;    // [rows, inputs]
  const float* scales;    // [rows]
  const int32_t* shifts;  // [rows], subtracted from every sum of the row
  Int8Product product;

  // The same for some of the rows.
  VnniCall from(int64_t first, int64_t rows) const {
    VnniCall some{whole + first * product.inputs, scales + first, shifts + first, product};
    some.product.output += first * product.outputs * item_size(product.output_dtype);
    some.product.rows = rows;
    return some;
  }
};

// All rows of `count` (1 to 4) groups of 16 outputs.
void vnni_blocks(const VnniCall& call, int64_t block, int64_t count);

}  // namespace shallowfusion
