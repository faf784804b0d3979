#include "tile_product.h"

#include <algorithm>
#include <memory>
#include <new>

#include "fused_step_kernels.h"
#include "thread_pool.h"
#include "tile_product_amx.h"

namespace shallowfusion {
namespace {

constexpr int64_t kWorthATask = 1 << 19;  // weights
constexpr int64_t kMostTasks = 4;         // of a thread
constexpr int64_t kPartBytes = 1 << 20;  // of a call's rows, which stay in a core's cache while the weights pass by

struct FreeParts {
  void operator()(uint16_t* parts) const { ::operator delete[](parts, std::align_val_t{64}); }
};

// Memory of this thread for so many numbers, not initialised.
uint16_t* room_for(int64_t count) {
  thread_local std::unique_ptr<uint16_t[], FreeParts> memory;
  thread_local int64_t size = 0;
  if (count > size) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<uint16_t*>(::operator new[](static_cast<size_t>(count) * 2, std::align_val_t{64})));
    size = count;
  }
  return memory.get();
}

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
  const int64_t pairs = (arguments.outputs + kPairOutputs - 1) / kPairOutputs;
  const int64_t wanted = std::max(kWorthATask / (width * kPairOutputs), pairs / (kMostTasks * threads));
  const int64_t per = fair_share(pairs, std::max<int64_t>(1, wanted), threads);
  const int64_t groups = kPartBytes / (kGroupRows * width * kParts * static_cast<int64_t>(sizeof(uint16_t)));
  const int64_t most = kGroupRows * std::max<int64_t>(1, groups);
  for (int64_t first = 0; first < arguments.rows; first += most) {
    TileProduct own = arguments;
    own.values += first * arguments.inputs;
    own.output += first * arguments.outputs;
    own.rows = std::min(most, arguments.rows - first);
    parallel_for((pairs + per - 1) / per, threads, [&](int64_t task) {
      // Cut by every task anew: to fetch the parts from another core takes longer.
      uint16_t* parts = room_for(round_up(own.rows, kTileRows) * width * kParts);
      for (int64_t row = 0; row < own.rows; row += kTileRows) cut_rows(own, row, parts + row * width * kParts);
      tile_pairs(own, parts, task * per, std::min(per, pairs - task * per));
    });
  }
}

}  // namespace shallowfusion
