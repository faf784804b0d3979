// AMX: one instruction adds 16 rows of 64 int8 inputs times 64 x 16 weights to 16 x 16 sums. A tile of weights is what
// 16 steps of the walk by VNNI read, in the same order, so both read the same packed weights.
#include "int8_product_amx.h"

#if defined(__x86_64__) && __has_include(<amxint8intrin.h>)

#include <immintrin.h>

#include <algorithm>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8")
#endif

#include "int8_product_write.h"

namespace shallowfusion {
namespace {

constexpr int64_t kAheadBytes = 2048;
constexpr int64_t kTileBytes = kTileRows * 64;

// Tiles are named by literals, which only macros can pass on.
#define BEGIN(sum, is_used) \
  if constexpr (is_used) _tile_zero(sum)
#define MORE(sum, tile, is_used)                                                         \
  if constexpr (is_used) {                                                               \
    _tile_loadd(6, whole + (tile)*kTileRows * inputs + input, static_cast<int>(inputs)); \
    _tile_dpbsud(sum, 6, 7);                                                             \
  }
#define END(sum, tile, group, is_used)                 \
  if constexpr (is_used) {                             \
    _tile_stored(sum, sums, 64);                       \
    write(call, row + (tile)*kTileRows, group, sums); \
  }

void write(const VnniCall& call, int64_t row, int64_t block, const int32_t* sums) {
  for (const int64_t end = std::min(row + kTileRows, call.product.rows); row < end; ++row, sums += 16) {
    write_sums(call, row, block * kOutputsAtOnce, _mm512_load_si512(sums));
  }
}

void ask_for(const uint8_t* weights) {
  for (int64_t line = 0; line < kTileBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(weights + line + kAheadBytes), _MM_HINT_T0);
  }
}

// Up to 16 * tiles rows and one or two groups of 16 outputs.
template <int tiles, bool is_pair>
void walk(const VnniCall& call, int64_t row, int64_t block) {
  const int64_t inputs = call.product.inputs;
  const int64_t block_bytes = kOutputsAtOnce * inputs;
  const uint8_t* weights = call.product.packed + block * block_bytes;
  const int8_t* whole = call.whole + row * inputs;
  BEGIN(0, true);
  BEGIN(1, tiles > 1);
  BEGIN(2, tiles > 2);
  BEGIN(3, is_pair);
  BEGIN(4, is_pair && tiles > 1);
  BEGIN(5, is_pair && tiles > 2);
  for (int64_t input = 0; input < inputs; input += kTileInputsInt8, weights += kTileBytes) {
    ask_for(weights);
    _tile_loadd(7, weights, 64);
    MORE(0, 0, true)
    MORE(1, 1, tiles > 1)
    MORE(2, 2, tiles > 2)
    if constexpr (is_pair) {
      ask_for(weights + block_bytes);
      _tile_loadd(7, weights + block_bytes, 64);
      MORE(3, 0, true)
      MORE(4, 1, tiles > 1)
      MORE(5, 2, tiles > 2)
    }
  }
  alignas(64) int32_t sums[kTileRows * 16];
  END(0, 0, block, true)
  END(1, 1, block, tiles > 1)
  END(2, 2, block, tiles > 2)
  END(3, 0, block + 1, is_pair)
  END(4, 1, block + 1, is_pair && tiles > 1)
  END(5, 2, block + 1, is_pair && tiles > 2)
}

template <int tiles>
void walk_blocks(const VnniCall& call, int64_t row, int64_t block, int64_t count) {
  if (count == 2) {
    walk<tiles, true>(call, row, block);
  } else {
    walk<tiles, false>(call, row, block);
  }
}

}  // namespace

void amx_blocks(const VnniCall& call, int64_t block, int64_t count) {
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  for (const int64_t end = block + count; block < end; block += 2) {  // whose weights stay in the cache for all rows
    const int64_t own = std::min<int64_t>(2, end - block);
    for (int64_t row = 0; row < call.product.rows; row += kTileGroup) {
      const int64_t left = call.product.rows - row;
      if (left <= kTileRows) {
        walk_blocks<1>(call, row, block, own);
      } else if (left <= 2 * kTileRows) {
        walk_blocks<2>(call, row, block, own);
      } else {
        walk_blocks<3>(call, row, block, own);
      }
    }
  }
  _tile_release();
}

}  // namespace shallowfusion

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace shallowfusion {
void amx_blocks(const VnniCall&, int64_t, int64_t) {}
}  // namespace shallowfusion

#endif
