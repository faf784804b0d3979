// Denormal results cost a microcode assist each on x86, and no sum here can feel them.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace shallowfusion {

// Flushes denormal results to zero on this thread while it lives; results are the same on every thread.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
#endif
 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace shallowfusion
