// How sums of an int8 product become floats. For files that set their own instruction set before they include it.
#pragma once

#include <immintrin.h>

#include "int8_product_vnni.h"

namespace shallowfusion {
namespace {

inline __m256i to_brain_floats(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
}

inline void write_sums(const VnniCall& call, int64_t row, int64_t first, __m512i sum) {
  const Int8Product& own = call.product;
  const int64_t left = own.outputs - first;
  const auto mask = static_cast<__mmask16>(left >= kOutputsAtOnce ? 0xffffu : (1u << left) - 1u);
  const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(call.shifts[row])));
  // First the outputs' scales, then the row's, as the general path does it.
  __m512 value = _mm512_mul_ps(exact, _mm512_maskz_loadu_ps(mask, own.scales + first));
  value = _mm512_mul_ps(value, _mm512_set1_ps(call.scales[row]));
  if (own.bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, own.bias + first));
  const int64_t at = row * own.outputs + first;
  if (own.output_dtype == Dtype::float32) {
    _mm512_mask_storeu_ps(reinterpret_cast<float*>(own.output) + at, mask, value);
  } else {
    _mm256_mask_storeu_epi16(reinterpret_cast<uint16_t*>(own.output) + at, mask, to_brain_floats(value));
  }
}

}  // namespace
}  // namespace shallowfusion
