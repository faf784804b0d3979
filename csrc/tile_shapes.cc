#include "tile_shapes.h"

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxint8intrin.h>)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace shallowfusion {
namespace {

constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
constexpr unsigned kBrainFloat = 1u << 22;   // bits of cpuid(7).edx
constexpr unsigned kTiles = 1u << 24;
constexpr unsigned kInt8 = 1u << 25;

// Which of the bits this machine has; 0 where the system refuses tiles.
unsigned allowed_units() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kTiles) == 0) return 0;
  __builtin_cpu_init();
  const bool has_vectors = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_vectors && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? edx : 0;
}

unsigned units() {
  static const unsigned known = allowed_units();
  return known;
}

}  // namespace

bool has_brain_float_tiles() { return (units() & kBrainFloat) != 0; }
bool has_int8_tiles() { return (units() & kInt8) != 0; }

}  // namespace shallowfusion

#else

namespace shallowfusion {
bool has_brain_float_tiles() { return false; }
bool has_int8_tiles() { return false; }
}  // namespace shallowfusion

#endif
