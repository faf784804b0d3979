// Memory in pages of megabytes: what is read from end to end in every step then needs few entries of the page tables.
#pragma once

#include <cstdint>

namespace shallowfusion {

// Asks the system for huge pages wherever whole ones lie inside; memory that was never written gets them at once.
// Only a wish: nothing happens where the system has none.
void prefer_huge_pages(void* memory, int64_t bytes);

}  // namespace shallowfusion
