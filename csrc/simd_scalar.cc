// The level every machine has: plain C++ on four floats, which the compiler maps to its baseline instructions.
#include <cstring>
#include <initializer_list>
#include <stdexcept>

#include "fused_step_kernels.h"
#include "fused_step_simd.h"
#include "half.h"

namespace shallowfusion {
namespace {

struct Simd {
  typedef float Vector __attribute__((vector_size(16)));
  typedef int32_t Integers __attribute__((vector_size(16)));
  static constexpr int lanes = 4;

  static Vector load(const float* from) {
    Vector value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  static Vector load_half(const uint16_t* from) {
    return Vector{half_to_float(from[0]), half_to_float(from[1]), half_to_float(from[2]), half_to_float(from[3])};
  }
  static Vector load_bfloat(const uint16_t* from) {
    return Vector{bfloat_to_float(from[0]), bfloat_to_float(from[1]), bfloat_to_float(from[2]),
                  bfloat_to_float(from[3])};
  }
  static void store(float* to, Vector value) { std::memcpy(to, &value, sizeof(value)); }
  static void prefetch(const void* near) { __builtin_prefetch(static_cast<const char*>(near) + 1024); }
  static Vector broadcast(float value) { return Vector{value, value, value, value}; }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector multiply(Vector a, Vector b) { return a * b; }
  static Vector divide(Vector a, Vector b) { return a / b; }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
  // Both return the second argument when either is NaN.
  static Vector larger(Vector a, Vector b) { return a > b ? a : b; }
  static Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
  static float sum(Vector value) { return (value[0] + value[2]) + (value[1] + value[3]); }
  static float largest(Vector value) {
    float result = value[0];
    for (int lane = 1; lane < lanes; ++lane) result = value[lane] > result ? value[lane] : result;
    return result;
  }
  // Lane i: the sum over the lanes of values[i].
  static Vector sum_each(const Vector* values) {
    return Vector{sum(values[0]), sum(values[1]), sum(values[2]), sum(values[3])};
  }

  // sum + 2^y for y within [-126, 126], clamped (NaN passes); see the AVX2 level.
  static Vector add_exp2(Vector y, Vector sum) {
    const Vector magic = broadcast(12583039.0f);
    y = larger(broadcast(-126.0f), smaller(broadcast(126.0f), y));
    const Vector rounded = y + magic;
    const Vector f = y - (rounded - magic);
    Vector p = broadcast(0x1.5c08e4p-10f);
    for (const float coefficient : {0x1.3d0c52p-7f, 0x1.c6b6e4p-5f, 0x1.ebf918p-3f, 0x1.62e428p-1f, 0x1.000002p+0f}) {
      p = p * f + broadcast(coefficient);
    }
    return sum + p * as_floats(as_integers(rounded) << 23);
  }

  static Vector impossible_where_impossible(Vector c, Vector x) {
    const Vector impossible = broadcast(kImpossible);
    return x == impossible ? impossible : c;
  }
  static Vector impossible_unless(uint32_t bits, Vector value) {
    for (int lane = 0; lane < lanes; ++lane) {
      if (((bits >> lane) & 1u) == 0) value[lane] = kImpossible;
    }
    return value;
  }
  static uint32_t at_least(Vector c, Vector bar) {
    uint32_t bits = 0;
    for (int lane = 0; lane < lanes; ++lane) bits |= static_cast<uint32_t>(c[lane] >= bar[lane]) << lane;
    return bits;
  }
  static uint32_t not_below_infinity(Vector x) {
    uint32_t bits = 0;
    for (int lane = 0; lane < lanes; ++lane) bits |= static_cast<uint32_t>(!(x[lane] < -kImpossible)) << lane;
    return bits;
  }
  struct Split {
    Vector exponent;
    Vector mantissa;
  };
  static Split split_near_one(Vector z) {
    const Vector scaled = z * broadcast(0x1.6a09e6p+0f);  // so that the mantissa lands around one
    const Integers bias = {127, 127, 127, 127};
    const Integers exponent = (as_integers(scaled) >> 23) - bias;
    const Vector exponents = {static_cast<float>(exponent[0]), static_cast<float>(exponent[1]),
                              static_cast<float>(exponent[2]), static_cast<float>(exponent[3])};
    return {exponents, z * as_floats((bias - exponent) << 23)};
  }

 private:
  static Integers as_integers(Vector value) {
    Integers bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
  static Vector as_floats(Integers bits) {
    Vector value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

}  // namespace

const Kernels* scalar_kernels() {
  static const Kernels kernels = make_kernels<Simd>("scalar", 64.0f);
  return &kernels;
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found = {scalar_kernels()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool half = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (half) found.push_back(avx2_kernels());
  if (half && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(avx512_kernels());
  }
#endif
  return found;
}

const Kernels& kernels_named(const std::optional<std::string>& name) {
  const std::vector<const Kernels*> found = available_kernels();
  if (!name.has_value()) return *found.back();
  std::string names;
  for (const Kernels* kernels : found) {
    if (*name == kernels->name) return *kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("level must be one this machine runs (" + names + "), got '" + *name + "'.");
}

}  // namespace shallowfusion
