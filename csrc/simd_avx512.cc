// AVX-512 level: f, bw, dq and vl; half floats by vcvtph2ps.
#include "fused_step_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <initializer_list>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
// The intrinsics of GCC 12 pass a deliberately undefined register as the unused source of a masked operation.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "fused_step_simd.h"

namespace shallowfusion {
namespace {

struct Simd {
  using Vector = __m512;
  static constexpr int lanes = 16;

  static Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static Vector load_half(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Vector load_bfloat(const uint16_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
  static void prefetch(const void* near) { _mm_prefetch(static_cast<const char*>(near) + 1024, _MM_HINT_T0); }
  static Vector broadcast(float value) { return _mm512_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  // Both return the second argument when either is NaN.
  static Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }
  static float sum(Vector value) { return _mm512_reduce_add_ps(value); }
  static float largest(Vector value) { return _mm512_reduce_max_ps(value); }
  // Lane i: the sum over the lanes of values[i].
  static Vector sum_each(const Vector* values) {
    Vector quarters[4];  // lane 4 * j + i: what values[4 * q + i] has in quarter j of its lanes
    for (int q = 0; q < 4; ++q) {
      const Vector* own = values + 4 * q;
      const __m512d low = _mm512_castps_pd(pair_sums(own[0], own[1]));
      const __m512d high = _mm512_castps_pd(pair_sums(own[2], own[3]));
      quarters[q] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    const Vector first = halves(quarters[0], quarters[1]);
    const Vector second = halves(quarters[2], quarters[3]);
    return add(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
  }
  static Vector pair_sums(Vector a, Vector b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
  static Vector halves(Vector a, Vector b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }

  // sum + 2^y: the fraction by a polynomial of degree 5 (error 7.5e-8), the rest by vscalefps, whose rules for -inf,
  // +inf and NaN are those of 2^y.
  static Vector add_exp2(Vector y, Vector sum) {
    const Vector f = _mm512_reduce_ps(y, 0x09);  // y - floor(y)
    Vector p = broadcast(0x1.ec320ap-10f);
    p = _mm512_fmadd_ps(p, f, broadcast(0x1.26900ep-7f));
    p = _mm512_fmadd_ps(p, f, broadcast(0x1.c95446p-5f));
    p = _mm512_fmadd_ps(p, f, broadcast(0x1.ebd5a8p-3f));
    p = _mm512_fmadd_ps(p, f, broadcast(0x1.62e4f6p-1f));
    p = _mm512_fmadd_ps(p, f, broadcast(0x1.fffffep-1f));
    return _mm512_add_ps(sum, _mm512_scalef_ps(p, y));
  }

  static Vector impossible_where_impossible(Vector c, Vector x) {
    const __mmask16 where = _mm512_cmp_ps_mask(x, broadcast(kImpossible), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(c, where, broadcast(kImpossible));
  }
  static Vector impossible_unless(uint32_t bits, Vector value) {
    return _mm512_mask_mov_ps(broadcast(kImpossible), static_cast<__mmask16>(bits), value);
  }
  static uint32_t at_least(Vector c, Vector bar) { return _mm512_cmp_ps_mask(c, bar, _CMP_GE_OQ); }
  static uint32_t not_below_infinity(Vector x) {
    return _mm512_cmp_ps_mask(x, broadcast(-kImpossible), _CMP_NLT_UQ);
  }
  struct Split {
    Vector exponent;
    Vector mantissa;
  };
  static Split split_near_one(Vector z) {
    const Vector scaled = multiply(z, broadcast(0x1.6a09e6p+0f));  // so that the mantissa lands around one
    const Vector exponent = _mm512_getexp_ps(scaled);
    return {exponent, _mm512_scalef_ps(z, multiply(exponent, broadcast(-1.0f)))};
  }
};

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = make_kernels<Simd>("avx512", 4096.0f);
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
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace shallowfusion

#endif
