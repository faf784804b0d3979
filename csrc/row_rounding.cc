// Plain loops that the compiler turns into SIMD, once per level; the loader picks the level of the machine.
#include "row_rounding.h"

#include <algorithm>
#include <cstring>

#include "thread_pool.h"

// The thread sanitizer is not there yet when the loader asks which level to take.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define EVERY_LEVEL __attribute__((target_clones("default", "avx2", "arch=skylake-avx512")))
#else
#define EVERY_LEVEL
#endif

namespace shallowfusion {
namespace {

constexpr float kLargest = 127.0f;  // int8 without -128, so that zero is in the middle
constexpr float kSmallestScale = 1e-30f;
constexpr int64_t kWorthAThread = 1 << 16;  // numbers

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Half to even, for values up to 127 and a bit: what is added leaves no room for fractions, and the low bits are the whole
// number. A cast would be undefined for NaN and infinity.
int8_t whole_of(float value) { return static_cast<int8_t>(bits_of(value + 0x1.8p23f)); }

float scale_of(uint32_t magnitude) {
  const float largest = float_of(magnitude) / kLargest;
  return largest < kSmallestScale ? kSmallestScale : largest;  // NaN stays
}

// Bits of magnitudes are ordered as the magnitudes are, NaN above all, so the largest shows a NaN anywhere.
EVERY_LEVEL void round_floats(const float* values, int64_t columns, int8_t* whole, float* scale) {
  uint32_t magnitude = 0;
  for (int64_t i = 0; i < columns; ++i) magnitude = std::max(magnitude, bits_of(values[i]) & 0x7fffffffu);
  const float own = *scale = scale_of(magnitude);
  for (int64_t i = 0; i < columns; ++i) whole[i] = whole_of(values[i] / own);
}

EVERY_LEVEL void round_brain_floats(const uint16_t* values, int64_t columns, int8_t* whole, float* scale) {
  uint32_t magnitude = 0;
  for (int64_t i = 0; i < columns; ++i) magnitude = std::max(magnitude, static_cast<uint32_t>(values[i]) & 0x7fffu);
  const float own = *scale = scale_of(magnitude << 16);
  for (int64_t i = 0; i < columns; ++i) {
    const float value = float_of(static_cast<uint32_t>(values[i]) << 16);
    whole[i] = whole_of(value / own);
  }
}

EVERY_LEVEL void scale_to_floats(const float* product, float scale, const float* bias, int64_t columns, float* output) {
  if (bias == nullptr) {
    for (int64_t i = 0; i < columns; ++i) output[i] = product[i] * scale;
    return;
  }
  for (int64_t i = 0; i < columns; ++i) output[i] = product[i] * scale + bias[i];
}

EVERY_LEVEL void scale_to_brain_floats(const float* product, float scale, const float* bias, int64_t columns,
                                       uint16_t* output) {
  for (int64_t i = 0; i < columns; ++i) {
    const float value = product[i] * scale + (bias == nullptr ? 0.0f : bias[i]);
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    output[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

template <typename Task>
void over_rows(int64_t rows, int64_t columns, int threads, const Task& task) {
  const int64_t per = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, columns));
  parallel_for((rows + per - 1) / per, threads, [&](int64_t block) {
    for (int64_t row = block * per; row < std::min(rows, (block + 1) * per); ++row) task(row);
  });
}

}  // namespace

void round_rows(const char* values, Dtype dtype, int64_t rows, int64_t columns, int8_t* whole, float* scales,
                int threads) {
  over_rows(rows, columns, threads, [&](int64_t row) {
    const char* own = values + row * columns * item_size(dtype);
    if (dtype == Dtype::float32) {
      round_floats(reinterpret_cast<const float*>(own), columns, whole + row * columns, scales + row);
    } else {
      round_brain_floats(reinterpret_cast<const uint16_t*>(own), columns, whole + row * columns, scales + row);
    }
  });
}

void scale_rows(const float* product, const float* scales, const float* bias, int64_t rows, int64_t columns,
                char* output, Dtype dtype, int threads) {
  over_rows(rows, columns, threads, [&](int64_t row) {
    const float* own = product + row * columns;
    char* to = output + row * columns * item_size(dtype);
    if (dtype == Dtype::float32) {
      scale_to_floats(own, scales[row], bias, columns, reinterpret_cast<float*>(to));
    } else {
      scale_to_brain_floats(own, scales[row], bias, columns, reinterpret_cast<uint16_t*>(to));
    }
  });
}

}  // namespace shallowfusion
