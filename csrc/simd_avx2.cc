// AVX2 level, with fma and f16c.
#include "fused_step_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <initializer_list>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "fused_step_simd.h"

namespace shallowfusion {
namespace {

struct Simd {
  using Vector = __m256;
  static constexpr int lanes = 8;

  static Vector load(const float* from) { return _mm256_loadu_ps(from); }
  static Vector load_half(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Vector load_bfloat(const uint16_t* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
  static void prefetch(const void* near) { _mm_prefetch(static_cast<const char*>(near) + 1024, _MM_HINT_T0); }
  static Vector broadcast(float value) { return _mm256_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static Vector divide(Vector a, Vector b) { return _mm256_div_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  // Both return the second argument when either is NaN.
  static Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  static Vector smaller(Vector a, Vector b) { return _mm256_min_ps(a, b); }
  static float sum(Vector value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static float largest(Vector value) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  // Lane i: the sum over the lanes of values[i].
  static Vector sum_each(const Vector* values) {
    const Vector low = _mm256_hadd_ps(_mm256_hadd_ps(values[0], values[1]), _mm256_hadd_ps(values[2], values[3]));
    const Vector high = _mm256_hadd_ps(_mm256_hadd_ps(values[4], values[5]), _mm256_hadd_ps(values[6], values[7]));
    return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }

  // sum + 2^y for y within [-126, 126], clamped (NaN passes): 1.5 * 2^23 + 127 rounds y to an integer and leaves
  // the biased exponent in the low bits; the fraction by a polynomial of degree 5 (error 7.5e-8).
  static Vector add_exp2(Vector y, Vector sum) {
    const Vector magic = broadcast(12583039.0f);
    y = larger(broadcast(-126.0f), smaller(broadcast(126.0f), y));
    const Vector rounded = _mm256_add_ps(y, magic);
    const Vector f = _mm256_sub_ps(y, _mm256_sub_ps(rounded, magic));
    Vector p = broadcast(0x1.5c08e4p-10f);
    p = _mm256_fmadd_ps(p, f, broadcast(0x1.3d0c52p-7f));
    p = _mm256_fmadd_ps(p, f, broadcast(0x1.c6b6e4p-5f));
    p = _mm256_fmadd_ps(p, f, broadcast(0x1.ebf918p-3f));
    p = _mm256_fmadd_ps(p, f, broadcast(0x1.62e428p-1f));
    p = _mm256_fmadd_ps(p, f, broadcast(0x1.000002p+0f));
    const Vector power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(rounded), 23));
    return _mm256_fmadd_ps(p, power, sum);
  }

  static Vector impossible_where_impossible(Vector c, Vector x) {
    const Vector impossible = broadcast(kImpossible);
    return _mm256_blendv_ps(c, impossible, _mm256_cmp_ps(x, impossible, _CMP_EQ_OQ));
  }
  static Vector impossible_unless(uint32_t bits, Vector value) {
    const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bits);
    const Vector keep = _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, lane_bits));
    return _mm256_blendv_ps(broadcast(kImpossible), value, keep);
  }
  static uint32_t at_least(Vector c, Vector bar) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(c, bar, _CMP_GE_OQ)));
  }
  static uint32_t not_below_infinity(Vector x) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, broadcast(-kImpossible), _CMP_NLT_UQ)));
  }
  struct Split {
    Vector exponent;
    Vector mantissa;
  };
  static Split split_near_one(Vector z) {
    const Vector scaled = multiply(z, broadcast(0x1.6a09e6p+0f));  // so that the mantissa lands around one
    const __m256i bits = _mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(scaled), 23), _mm256_set1_epi32(127));
    const __m256i power = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(127), bits), 23);
    return {_mm256_cvtepi32_ps(bits), multiply(z, _mm256_castsi256_ps(power))};
  }
};

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = make_kernels<Simd>("avx2", 4096.0f);
  return &kernels;
}

}  // namespace shallowfusion

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace shallowfusion {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace shallowfusion

#endif
