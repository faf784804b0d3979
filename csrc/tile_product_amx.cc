// AMX: one instruction adds 16 rows of 32 bfloat16 inputs times 32 x 16 bfloat16 weights to 16 x 16 float32 sums.
//
// Weights lie in memory as float32 and are cut as they pass. Cutting (vector units) and multiplying (matrix units) would
// wait for each other if one followed the other; so the next step's weights are cut between the products of this one.
#include "tile_product_amx.h"

#if defined(__x86_64__) && __has_include(<amxbf16intrin.h>)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "tile_shapes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")
#endif

namespace shallowfusion {
namespace {

constexpr int64_t kAheadBytes = 2048;
constexpr int kTileBytes = 64;                 // of one of its 16 rows
constexpr int64_t kPairTile = kParts * kTile;  // bfloat16 of one tile of weights, cut
constexpr int kPairRows = 2 * 16;              // rows of 32 weights in two tiles

// Upper halves of 32 floats, in order.
__m512i upper_halves(__m512i low, __m512i high) {
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(low, _mm512_load_si512(kOdd), high);
}

__m512 without_upper_half(__m512 value) {
  const __m512i upper = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return _mm512_sub_ps(value, _mm512_castsi512_ps(upper));
}

// 32 floats -> 32 bfloat16 in each of three tiles.
inline __attribute__((always_inline)) void cut(__m512 low, __m512 high, uint16_t* parts) {
  _mm512_store_si512(parts, upper_halves(_mm512_castps_si512(low), _mm512_castps_si512(high)));
  low = without_upper_half(low);
  high = without_upper_half(high);
  _mm512_store_si512(parts + kTile, upper_halves(_mm512_castps_si512(low), _mm512_castps_si512(high)));
  low = without_upper_half(low);
  high = without_upper_half(high);
  _mm512_store_si512(parts + 2 * kTile, upper_halves(_mm512_castps_si512(low), _mm512_castps_si512(high)));
}

// The two tiles of weights of one step, cut a few rows at a time.
struct Cutting {
  const float* from;
  uint16_t* to;
  int row;

  inline __attribute__((always_inline)) void go(int count) {
    for (const int end = row + count; row < end; ++row) {
      const float* own = from + row * kTileInputs;
      _mm_prefetch(reinterpret_cast<const char*>(own) + kAheadBytes, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(own + 16) + kAheadBytes, _MM_HINT_T0);
      cut(_mm512_loadu_ps(own), _mm512_loadu_ps(own + 16), to + (row >> 4) * kPairTile + (row & 15) * kTileInputs);
    }
  }
};

struct Walk {
  const TileProduct& product;
  const uint16_t* parts;     // of the rows of this walk
  int64_t first;             // row
  int64_t pair;
  const float* weights;      // of the pair
  const float* afterwards;   // weights of the first step of the walk that follows
};

void write(const Walk& walk, int64_t row, int64_t tile, const float* sums) {
  const TileProduct& own = walk.product;
  const int64_t output = walk.pair * kPairOutputs + tile * kTileRows;
  const int64_t left = own.outputs - output;
  if (left <= 0) return;
  const auto mask = static_cast<__mmask16>(left >= kTileRows ? 0xffffu : (1u << left) - 1u);
  const __m512 bias = own.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, own.bias + output);
  const int64_t start = walk.first + row;
  for (int64_t r = 0; r < std::min(kTileRows, own.rows - start); ++r) {
    const __m512 value = _mm512_add_ps(_mm512_load_ps(sums + r * kTileRows), bias);
    _mm512_mask_storeu_ps(own.output + (start + r) * own.outputs + output, mask, value);
  }
}

// Tiles are named by literals, which only macros can pass on.
#define MULTIPLY(sum, input, weight, rows_cut) \
  _tile_dpbf16ps(sum, input, weight);          \
  next.go(rows_cut)

// Both tiles of outputs, for one part of the inputs (in tile 6) and one of the weights.
#define BOTH(first_sum, second_sum, part, rows_cut)                 \
  _tile_loadd(7, weights + (part)*kTile, kTileBytes);               \
  MULTIPLY(first_sum, 6, 7, rows_cut);                              \
  _tile_loadd(7, weights + kPairTile + (part)*kTile, kTileBytes);   \
  MULTIPLY(second_sum, 6, 7, rows_cut)

// 16 rows. The order of the products is that of ONE_TILE, so that sums are the same.
// Cuts 8 * little + 2 * much rows.
#define ROWS(first_sum, second_sum, tile, much, little)             \
  _tile_loadd(6, inputs + (tile)*row_tile + 2 * kTile, kTileBytes); \
  BOTH(first_sum, second_sum, 0, much);                             \
  _tile_loadd(6, inputs + (tile)*row_tile + kTile, kTileBytes);     \
  BOTH(first_sum, second_sum, 1, little);                           \
  BOTH(first_sum, second_sum, 0, little);                           \
  _tile_loadd(6, inputs + (tile)*row_tile, kTileBytes);             \
  BOTH(first_sum, second_sum, 2, little);                           \
  BOTH(first_sum, second_sum, 1, little);                           \
  BOTH(first_sum, second_sum, 0, 0)

#define ONE_TILE(sum, tile)                                           \
  _tile_loadd(5, weights + (tile)*kPairTile + 2 * kTile, kTileBytes); \
  _tile_loadd(6, weights + (tile)*kPairTile + kTile, kTileBytes);     \
  _tile_loadd(7, weights + (tile)*kPairTile, kTileBytes);             \
  next.go(4);                                                         \
  MULTIPLY(sum, 4, 7, 2);                                             \
  MULTIPLY(sum, 3, 6, 2);                                             \
  MULTIPLY(sum, 3, 7, 2);                                             \
  MULTIPLY(sum, 2, 5, 2);                                             \
  MULTIPLY(sum, 2, 6, 2);                                             \
  MULTIPLY(sum, 2, 7, 2)

#define WRITE(sum, tile, output_tile)      \
  _tile_stored(sum, sums, kTileBytes);     \
  write(walk, (tile)*kTileRows, output_tile, sums)

// Up to 16 * tiles rows and 32 outputs. The ring holds the cut weights of this step and of the next.
template <int tiles>
void run(const Walk& walk, uint16_t (*ring)[2 * kPairTile], int64_t& turn) {
  const int64_t steps = (walk.product.inputs + kTileInputs - 1) / kTileInputs;
  const int64_t row_tile = steps * kPairTile;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (tiles > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  if constexpr (tiles > 2) {
    _tile_zero(4);
    _tile_zero(5);
  }
  for (int64_t step = 0; step < steps; ++step, ++turn) {
    const uint16_t* weights = ring[turn & 1];
    const uint16_t* inputs = walk.parts + step * kPairTile;
    Cutting next{step + 1 < steps ? walk.weights + (step + 1) * 2 * kTile : walk.afterwards, ring[(turn + 1) & 1], 0};
    if constexpr (tiles == 1) {
      _tile_loadd(2, inputs, kTileBytes);
      _tile_loadd(3, inputs + kTile, kTileBytes);
      _tile_loadd(4, inputs + 2 * kTile, kTileBytes);
      ONE_TILE(0, 0);
      ONE_TILE(1, 1);
    } else if constexpr (tiles == 2) {
      ROWS(0, 1, 0, 0, 2);
      ROWS(2, 3, 1, 0, 2);
    } else {
      ROWS(0, 1, 0, 2, 1);
      ROWS(2, 3, 1, 2, 1);
      ROWS(4, 5, 2, 0, 1);
    }
  }
  alignas(64) float sums[kTileRows * kTileRows];
  WRITE(0, 0, 0);
  WRITE(1, 0, 1);
  if constexpr (tiles > 1) {
    WRITE(2, 1, 0);
    WRITE(3, 1, 1);
  }
  if constexpr (tiles > 2) {
    WRITE(4, 2, 0);
    WRITE(5, 2, 1);
  }
}

}  // namespace

void cut_rows(const TileProduct& product, int64_t first, uint16_t* parts) {
  const int64_t rows = std::min(kTileRows, product.rows - first);
  for (int64_t input = 0; input < product.inputs; input += kTileInputs, parts += kPairTile) {
    const int64_t left = product.inputs - input;
    const auto low = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1u);
    const auto high = static_cast<__mmask16>(left >= 32 ? 0xffffu : left <= 16 ? 0u : (1u << (left - 16)) - 1u);
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = product.values + (first + row) * product.inputs + input;
      cut(_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from + 16), parts + row * kTileInputs);
    }
    for (int64_t part = 0; part < kParts; ++part) {
      std::memset(parts + part * kTile + rows * kTileInputs, 0, static_cast<size_t>((kTileRows - rows) * kTileBytes));
    }
  }
}

void tile_pairs(const TileProduct& product, const uint16_t* parts, int64_t pair, int64_t count) {
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  alignas(64) uint16_t ring[2][2 * kPairTile];
  const int64_t width = (product.inputs + kTileInputs - 1) / kTileInputs * kTileInputs;
  const float* from = product.packed + pair * kPairOutputs * width;
  Cutting{from, ring[0], 0}.go(kPairRows);
  int64_t turn = 0;
  for (int64_t own = 0; own < count; ++own, from += kPairOutputs * width) {
    for (int64_t first = 0; first < product.rows; first += kGroupRows) {
      const bool is_last = first + kGroupRows >= product.rows;
      const float* afterwards = is_last && own + 1 < count ? from + kPairOutputs * width : from;
      const Walk walk{product, parts + first * width * kParts, first, pair + own, from, afterwards};
      const int64_t rows = product.rows - first;
      if (rows <= kTileRows) {
        run<1>(walk, ring, turn);
      } else if (rows <= 2 * kTileRows) {
        run<2>(walk, ring, turn);
      } else {
        run<3>(walk, ring, turn);
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
void cut_rows(const TileProduct&, int64_t, uint16_t*) {}
void tile_pairs(const TileProduct&, const uint16_t*, int64_t, int64_t) {}
}  // namespace shallowfusion

#endif
