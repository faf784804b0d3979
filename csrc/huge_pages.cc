#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace shallowfusion {

void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (start + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

}  // namespace shallowfusion
