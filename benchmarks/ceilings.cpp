// The machine's multiply-add ceilings: independent chains of the widest vector unit's FMA, nothing else.
//
// Compiled on demand by ceilings.py; each level carries its own target attribute, the widest that this CPU has is chosen at run time.
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Twelve chains keep two units of latency 4 or 5 busy and fit into sixteen registers.
constexpr int CHAINS = 12;

// Products of `steps` rounds over all chains; the sum is returned so that nothing can be left out.
#define FMA_LOOP(NAME, BYTES, ATTRIBUTE)                                              \
  ATTRIBUTE float NAME(int64_t steps) {                                               \
    typedef float Vector __attribute__((vector_size(BYTES)));                         \
    const Vector factor = Vector{} + 0.999f, term = Vector{} + 0.001f;                \
    Vector chain[CHAINS];                                                             \
    for (int k = 0; k < CHAINS; ++k) chain[k] = term * static_cast<float>(k);         \
    for (int64_t step = 0; step < steps; ++step) {                                    \
      _Pragma("GCC unroll 12") for (int k = 0; k < CHAINS; ++k) chain[k] = chain[k] * factor + term; \
    }                                                                                 \
    Vector total = chain[0];                                                          \
    for (int k = 1; k < CHAINS; ++k) total += chain[k];                               \
    return total[0];                                                                  \
  }

FMA_LOOP(float32_baseline, 16, )

#if defined(__x86_64__)
FMA_LOOP(float32_avx2, 32, __attribute__((target("avx2,fma"))))
FMA_LOOP(float32_avx512, 64, __attribute__((target("avx512f"))))

__attribute__((target("avx512f,avx512bf16"))) float bfloat16_avx512(int64_t steps) {
  // 0x3c00 is the bfloat16 0.0078125: sums of small products stay finite.
  const __m512bh small = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3c00));
  __m512 chain[CHAINS];
  for (int k = 0; k < CHAINS; ++k) chain[k] = _mm512_set1_ps(static_cast<float>(k));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int k = 0; k < CHAINS; ++k) chain[k] = _mm512_dpbf16_ps(chain[k], small, small);
  }
  __m512 total = chain[0];
  for (int k = 1; k < CHAINS; ++k) total = _mm512_add_ps(total, chain[k]);
  return _mm512_cvtss_f32(total);
}
#endif

struct Level {
  const char* name;
  int flops;  // of one vector instruction
  float (*loop)(int64_t);
};

Level level(bool bfloat16) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (bfloat16) {
    if (__builtin_cpu_supports("avx512bf16")) return {"AVX512-BF16", 64, bfloat16_avx512};
    return {"", 0, nullptr};
  }
  if (__builtin_cpu_supports("avx512f")) return {"AVX-512", 32, float32_avx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"AVX2", 16, float32_avx2};
#endif
  if (bfloat16) return {"", 0, nullptr};
  return {"baseline", 8, float32_baseline};
}

}  // namespace

extern "C" {

// Name of the unit that `run` would use, empty where the CPU has none for this type.
const char* unit(int bfloat16) { return level(bfloat16 != 0).name; }

// Floating-point operations of `run(bfloat16, steps, threads)`.
int64_t operations(int bfloat16, int64_t steps, int threads) {
  return steps * CHAINS * level(bfloat16 != 0).flops * threads;
}

void run(int bfloat16, int64_t steps, int threads) {
  const Level chosen = level(bfloat16 != 0);
  std::vector<float> sums(static_cast<size_t>(threads));
  std::vector<std::thread> others;
  for (int k = 1; k < threads; ++k) others.emplace_back([&, k] { sums[k] = chosen.loop(steps); });
  sums[0] = chosen.loop(steps);
  for (std::thread& other : others) other.join();
}

}  // extern "C"
