// Rows of float32 times a float32 matrix on matrix units that multiply bfloat16 (AMX), to float32's own accuracy.
#pragma once

#include <cstdint>

namespace shallowfusion {

constexpr int64_t kTileInputs = 32;   // inputs that one instruction multiplies and sums
constexpr int64_t kPairOutputs = 32;  // outputs that are walked together: two tiles

// Whether this machine has the instructions and the system lets this process use them.
bool has_tile_product();

// Floats that `pack_tiles` writes: inputs rounded up to kTileInputs, outputs to kPairOutputs.
int64_t packed_tiles_size(int64_t outputs, int64_t inputs);

// weights [outputs, inputs], dense -> [outputs / 32, inputs / 32, 2, 16, 16, 2]: two tiles of 16 outputs by 16 pairs of
// inputs; a pair's two weights of one output lie side by side. What is missing is 0.
void pack_tiles(const float* weights, int64_t outputs, int64_t inputs, float* packed);

struct TileProduct {
  const float* values;  // [rows, inputs], dense
  const float* packed;  // by pack_tiles
  const float* bias;    // [outputs] or null
  float* output;        // [rows, outputs], dense
  int64_t rows;
  int64_t inputs;
  int64_t outputs;
};

// output[r, o] = sum_i values[r, i] * weight[o, i] + bias[o].
//
// A float32 is cut into three bfloat16: its upper half, that of what is left, and the rest; their sum is the float32.
// Six of the nine products are summed in float32, the others are below its last place. A row's result does not depend
// on the rows beside it. Parts below 2^-126 count as 0; an infinite value makes its row NaN.
void tile_product(const TileProduct& arguments, int threads);

}  // namespace shallowfusion
