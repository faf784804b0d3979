// AVX-512 VNNI: one instruction multiplies four inputs of one row with four weights of 16 outputs and adds the sums.
#include "int8_product_vnni.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#include "int8_product_write.h"

namespace shallowfusion {
namespace {

constexpr int kRows = 6;  // rows whose sums for four groups of outputs fit the registers
constexpr int64_t kAheadBytes = 2048;

template <int rows, int blocks>
void walk(const VnniCall& call, int64_t row, int64_t block) {
  const int64_t inputs = call.product.inputs;
  const int64_t block_bytes = kOutputsAtOnce * inputs;
  const uint8_t* weights = call.product.packed + block * block_bytes;
  const int8_t* whole = call.whole + row * inputs;
  __m512i sums[rows][blocks];
  for (auto& own : sums) {
    for (auto& sum : own) sum = _mm512_setzero_si512();
  }
  for (int64_t input = 0; input < inputs; input += kInputsAtOnce) {
    const uint8_t* from = weights + input * kOutputsAtOnce;
    __m512i part[blocks];
    for (int b = 0; b < blocks; ++b) {
      part[b] = _mm512_loadu_si512(from + b * block_bytes);
      _mm_prefetch(reinterpret_cast<const char*>(from + b * block_bytes + kAheadBytes), _MM_HINT_T0);
    }
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      std::memcpy(&four, whole + r * inputs + input, sizeof(four));
      const __m512i value = _mm512_set1_epi32(four);
      for (int b = 0; b < blocks; ++b) sums[r][b] = _mm512_dpbusd_epi32(sums[r][b], part[b], value);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int b = 0; b < blocks; ++b) write_sums(call, row + r, (block + b) * kOutputsAtOnce, sums[r][b]);
  }
}

template <int rows>
void walk_blocks(const VnniCall& call, int64_t row, int64_t block, int64_t count) {
  if (count == 4) {
    walk<rows, 4>(call, row, block);
    return;
  }
  for (int64_t own = 0; own < count; ++own) walk<rows, 1>(call, row, block + own);
}

}  // namespace

void vnni_blocks(const VnniCall& call, int64_t block, int64_t count) {
  int64_t row = 0;
  for (; row + kRows <= call.product.rows; row += kRows) walk_blocks<kRows>(call, row, block, count);
  switch (call.product.rows - row) {
    case 5:
      return walk_blocks<5>(call, row, block, count);
    case 4:
      return walk_blocks<4>(call, row, block, count);
    case 3:
      return walk_blocks<3>(call, row, block, count);
    case 2:
      return walk_blocks<2>(call, row, block, count);
    case 1:
      return walk_blocks<1>(call, row, block, count);
    default:
      return;
  }
}

}  // namespace shallowfusion

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace shallowfusion {
void vnni_blocks(const VnniCall&, int64_t, int64_t) {}
}  // namespace shallowfusion

#endif
