#include "int8_product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "int8_product_amx.h"
#include "int8_product_vnni.h"
#include "row_rounding.h"
#include "thread_pool.h"
#include "tile_shapes.h"

namespace shallowfusion {
namespace {

constexpr int64_t kBlocksAtOnce = 4;        // groups of outputs of one walk over the inputs
constexpr int64_t kWorthATask = 1 << 18;    // weights
constexpr int64_t kCachedInputs = 1 << 20;

}  // namespace

bool has_int8_product() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

int64_t packed_int8_size(int64_t outputs, int64_t inputs) { return round_up(outputs, kOutputsAtOnce) * inputs; }

void pack_int8(const int8_t* weights, int64_t outputs, int64_t inputs, uint8_t* packed) {
  for (int64_t block = 0; block < round_up(outputs, kOutputsAtOnce); block += kOutputsAtOnce) {
    for (int64_t input = 0; input < inputs; input += kInputsAtOnce) {
      for (int64_t output = block; output < block + kOutputsAtOnce; ++output) {
        for (int64_t own = input; own < input + kInputsAtOnce; ++own) {
          const int weight = output < outputs ? weights[output * inputs + own] : 0;
          *packed++ = static_cast<uint8_t>(weight + 128);
        }
      }
    }
  }
}

void int8_product(const Int8Product& arguments, int threads) {
  const int64_t rows = arguments.rows;
  const int64_t inputs = arguments.inputs;
  const bool on_tiles = has_int8_tiles() && rows > kFewRows && inputs % kTileInputsInt8 == 0;
  std::vector<int8_t> whole(static_cast<size_t>((on_tiles ? round_up(rows, kTileRows) : rows) * inputs));
  std::vector<float> scales(static_cast<size_t>(rows));
  std::vector<int32_t> shifts(static_cast<size_t>(rows));
  round_rows(arguments.values, arguments.dtype, rows, inputs, whole.data(), scales.data(), threads);
  for (int64_t row = 0; row < rows; ++row) {  // what the 128 added to each weight has added to a sum
    int32_t sum = 0;
    for (int64_t input = 0; input < inputs; ++input) sum += whole[static_cast<size_t>(row * inputs + input)];
    shifts[static_cast<size_t>(row)] = 128 * sum;
  }
  const int64_t blocks = (arguments.outputs + kOutputsAtOnce - 1) / kOutputsAtOnce;
  const int64_t wanted = std::max<int64_t>(1, kWorthATask / (inputs * kOutputsAtOnce));
  const int64_t per = round_up(fair_share(blocks, wanted, threads), kBlocksAtOnce);
  const int64_t most = on_tiles ? std::max(kTileGroup, kCachedInputs / inputs / kTileGroup * kTileGroup) : rows;
  for (int64_t first = 0; first < rows; first += most) {  // rows that stay in a core's cache while the weights pass by
    const VnniCall call = VnniCall{whole.data(), scales.data(), shifts.data(), arguments}.from(
        first, std::min(most, rows - first));
    parallel_for((blocks + per - 1) / per, threads, [&](int64_t task) {
      const int64_t end = std::min(blocks, (task + 1) * per);
      if (on_tiles) {
        amx_blocks(call, task * per, end - task * per);
        return;
      }
      for (int64_t block = task * per; block < end; block += kBlocksAtOnce) {
        vnni_blocks(call, block, std::min(kBlocksAtOnce, end - block));
      }
    });
  }
}

}  // namespace shallowfusion
