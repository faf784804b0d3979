// What matrix units compute of a tile product.
#pragma once

#include "tile_product.h"
#include "tile_shapes.h"

namespace shallowfusion {

constexpr int64_t kTile = kTileRows * kTileInputs;  // numbers of one tile
constexpr int64_t kParts = 3;                       // bfloat16 that a float32 is cut into
constexpr int64_t kGroupRows = 3 * kTileRows;       // rows whose sums, for two tiles of outputs, fit the tiles there are

// values [rows, inputs], rows from `first` up to a tile's -> [inputs / 32, kParts, 16, 32] bfloat16, missing ones 0.
void cut_rows(const TileProduct& product, int64_t first, uint16_t* parts);

// All rows of `count` pairs of output tiles from `pair` on; `parts` of all rows, tile after tile.
void tile_pairs(const TileProduct& product, const uint16_t* parts, int64_t pair, int64_t count);

}  // namespace shallowfusion
