#include "tile_product.h"

#include <algorithm>
#include <memory>
#include <new>

#include "fused_step_kernels.h"
#include "thread_pool.h"
#include "tile_product_amx.h"

namespace shallowfusion {
namespace {

constexpr int64_t kWorthATask = 1 << 18;   // weights
constexpr int64_t kMostPartRows = 4 * kGroupRows;  // whose parts stay in a core's cache while the weights pass by

struct FreeParts {
  void operator()(uint16_t* parts) const { ::operator delete[](parts, std::align_val_t{64}); }
};

}  // namespace

bool has_tile_product() { return has_brain_float_tiles(); }

int64_t packed_tiles_size(int64_t outputs, int64_t inputs) {
  return round_up(outputs, kPairOutputs) * round_up(inputs, kTileInputs);
}

void pack_tiles(const float* weights, int64_t outputs, int64_t inputs, float* packed) {
  for (int64_t pair = 0; pair < outputs; pair += kPairOutputs) {
    for (int64_t step = 0; step < inputs; step += kTileInputs) {
      for (int64_t tile = pair; tile < pair + kPairOutputs; tile += kTileRows) {
        for (int64_t input = step; input < step + kTileInputs; input += 2) {
          for (int64_t output = tile; output < tile + kTileRows; ++output) {
            for (int64_t own = input; own < input + 2; ++own) {
              *packed++ = output < outputs && own < inputs ? weights[output * inputs + own] : 0.0f;
            }
          }
        }
      }
    }
  }
}

void tile_product(const TileProduct& arguments, int threads) {
  const int64_t width = round_up(arguments.inputs, kTileInputs);
  const int64_t most = std::min(round_up(arguments.rows, kTileRows), kMostPartRows);
  const std::unique_ptr<uint16_t[], FreeParts> parts(
      static_cast<uint16_t*>(::operator new[](static_cast<size_t>(most * width * kParts) * 2, std::align_val_t{64})));
  const int64_t pairs = (arguments.outputs + kPairOutputs - 1) / kPairOutputs;
  const int64_t wanted = std::max<int64_t>(1, kWorthATask / (width * kPairOutputs));
  const int64_t per = std::min(wanted, (pairs + threads - 1) / threads);
  for (int64_t first = 0; first < arguments.rows; first += kMostPartRows) {
    TileProduct own = arguments;
    own.values += first * arguments.inputs;
    own.output += first * arguments.outputs;
    own.rows = std::min(kMostPartRows, arguments.rows - first);
    const int64_t tiles = (own.rows + kTileRows - 1) / kTileRows;
    parallel_for(tiles, own.rows > kGroupRows ? threads : 1, [&](int64_t tile) {
      cut_rows(own, tile * kTileRows, parts.get() + tile * kTileRows * width * kParts);
    });
    parallel_for((pairs + per - 1) / per, threads, [&](int64_t task) {
      tile_pairs(own, parts.get(), task * per, std::min(per, pairs - task * per));
    });
  }
}

}  // namespace shallowfusion
