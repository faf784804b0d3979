// What matrix units compute of an int8 product.
#pragma once

#include "int8_product_vnni.h"
#include "tile_shapes.h"

namespace shallowfusion {

constexpr int64_t kTileInputsInt8 = 64;  // inputs are a multiple of it
constexpr int64_t kTileGroup = 3 * kTileRows;  // rows whose sums, for two groups of outputs, fit the tiles there are
constexpr int64_t kFewRows = 6;          // up to so many vector units are as fast

// All rows of `count` groups of 16 outputs; `whole` has rows up to a multiple of 16.
void amx_blocks(const VnniCall& call, int64_t block, int64_t count);

}  // namespace shallowfusion
