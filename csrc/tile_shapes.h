// The shapes of matrix units: eight tiles of 16 rows of 64 bytes.
#pragma once

#include <cstdint>

namespace shallowfusion {

constexpr int64_t kTileRows = 16;

// What one instruction reads before tiles are used.
struct TileShapes {
  uint8_t palette = 1;
  uint8_t start = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Matrix units that this machine has, and that the system lets this process use.
bool has_brain_float_tiles();
bool has_int8_tiles();

}  // namespace shallowfusion
