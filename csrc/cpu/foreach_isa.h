// Compiles AUFAST_KERNELS once per instruction-set level, each in a namespace of its own (see isa.h for the
// use).
//
// Inside, AUFAST_VECTOR_BYTES is the register width, AUFAST_AVX512 and AUFAST_BF16 say what else the level
// has. The namespaces are anonymous at the top, so that two .cpp files never share a function.

#define AUFAST_INLINE inline __attribute__((always_inline))

namespace {

#define AUFAST_VECTOR_BYTES 16
#define AUFAST_AVX2 0
#define AUFAST_AVX512 0
#define AUFAST_BF16 0
namespace isa_baseline {
#include "vec.h"
#include AUFAST_KERNELS
}  // namespace isa_baseline

#if defined(__x86_64__)

#undef AUFAST_VECTOR_BYTES
#undef AUFAST_AVX2
#define AUFAST_VECTOR_BYTES 32
#define AUFAST_AVX2 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
namespace isa_avx2 {
#include "vec.h"
#include AUFAST_KERNELS
}  // namespace isa_avx2
#pragma GCC pop_options

#undef AUFAST_VECTOR_BYTES
#undef AUFAST_AVX512
#define AUFAST_VECTOR_BYTES 64
#define AUFAST_AVX512 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
namespace isa_avx512 {
#include "vec.h"
#include AUFAST_KERNELS
}  // namespace isa_avx512
#pragma GCC pop_options

#undef AUFAST_BF16
#define AUFAST_BF16 1
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
namespace isa_avx512_bf16 {
#include "vec.h"
#include AUFAST_KERNELS
}  // namespace isa_avx512_bf16
#pragma GCC pop_options

#endif  // __x86_64__

#undef AUFAST_VECTOR_BYTES
#undef AUFAST_AVX2
#undef AUFAST_AVX512
#undef AUFAST_BF16

}  // namespace
