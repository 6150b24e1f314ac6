// Instruction-set levels of the CPU kernels, and the choice of one at run time.
//
// A kernel is written once, in NAME.inc, in GCC vector extensions (see vec.h), and compiled once per level:
//
//   #include "isa.h"                          // outside of any namespace, after the standard and torch
//   headers #define AUFAST_KERNELS "roi_crop.inc"     // std-free: a std template instantiated in there would
//   be compiled for #include "foreach_isa.h"                  // one CPU only, and the linker could hand it
//   to every other one
//
//   AUFAST_PICK(crop_rows)(pointers, sizes);  // crop_rows of the level that this process runs
//
// AUFAST_CPU_ISA=baseline|avx2|avx512|avx512_bf16|amx forces a level (tests run them all); a level that is
// unknown or that this CPU lacks is an error at every call. The call that hands work to
// torch::stable::parallel_for stays outside NAME.inc: its lambda slices the range and calls the picked
// function. amx runs the functions of avx512_bf16, and lets them use matrix tiles.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace aufast {

enum class Isa : int { baseline, avx2, avx512, avx512_bf16, amx };

// Whether this process may use the bfloat16 matrix tiles of AMX: the CPU has them, and Linux grants their
// register state.
inline bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d = 0;
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(7), "2"(0));
  const bool has_tiles = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  return has_tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return tiles_granted() ? Isa::amx : Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline Isa choose_isa() {
  const Isa best = best_isa();
  const char* forced = std::getenv("AUFAST_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best;
  const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  for (int level = 0; level < 5; ++level) {
    if (std::strcmp(forced, names[level]) != 0) continue;
    STD_TORCH_CHECK(level <= static_cast<int>(best), "AUFAST_CPU_ISA=", forced,
                    " asks for more than this CPU has; its best level is ", names[static_cast<int>(best)]);
    return static_cast<Isa>(level);
  }
  STD_TORCH_CHECK(false, "AUFAST_CPU_ISA must be baseline, avx2, avx512, avx512_bf16 or amx, got ", forced);
}

// Resolved once per process; a wrong AUFAST_CPU_ISA throws again at every call.
inline Isa isa() {
  static const Isa level = choose_isa();
  return level;
}

}  // namespace aufast

#if defined(__x86_64__)
#define AUFAST_PICK(...)                                                         \
  (::aufast::isa() >= ::aufast::Isa::avx512_bf16                                 \
       ? &isa_avx512_bf16::__VA_ARGS__                                           \
       : (::aufast::isa() == ::aufast::Isa::avx512                               \
              ? &isa_avx512::__VA_ARGS__                                         \
              : (::aufast::isa() == ::aufast::Isa::avx2 ? &isa_avx2::__VA_ARGS__ \
                                                        : &isa_baseline::__VA_ARGS__)))
#else
#define AUFAST_PICK(...) (&isa_baseline::__VA_ARGS__)
#endif
