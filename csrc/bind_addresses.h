// Checks of what Python hands over as addresses of dense torch tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "fused_step_kernels.h"

namespace shallowfusion {

inline void check(bool condition, const std::string& message) {
  if (!condition) throw pybind11::value_error(message);
}

template <typename T>
T* pointer(uint64_t address, uint64_t alignment, const char* name) {
  check(address != 0 && address % alignment == 0, std::string(name) + " must be aligned and not null.");
  return reinterpret_cast<T*>(address);
}

constexpr int64_t kMostOfASize = int64_t{1} << 31;

inline void check_rows(int64_t rows) {
  check(rows >= 1 && rows <= kMostOfASize, "rows must be from 1 to 2^31, got " + std::to_string(rows) + ".");
}

inline void check_threads(int threads) {
  check(threads >= 1 && threads <= 256, "threads must be from 1 to 256, got " + std::to_string(threads) + ".");
}

// What rows are rounded from, and written as.
inline Dtype row_dtype(int code) {
  check(code == 0 || code == 2, "dtype code must be 0 (float32) or 2 (bfloat16), got " + std::to_string(code) + ".");
  return static_cast<Dtype>(code);
}

}  // namespace shallowfusion
