// Vectors of one register's width, for code that foreach_isa.h compiles per level. No include guard: read
// once per level.
//
//   vec<float>, vec<double>             GCC vector types: + - * / < ?: work lane by lane, a*b+c becomes one
//   FMA where there is one lanes<T>                            elements in a vec<T> load<T>(p), store(p, v)
//   unaligned; load_n / store_n take the first n lanes only (zeros beyond) set1<T>(s), sum(v), vmin, vmax
//   broadcast, fixed-order horizontal sum, lane-wise extremes (a NaN in the first argument stays)
//   load_bf16(p), store_bf16(p, v)      vec<float> from and to lanes<float> bfloat16 values, round to nearest
//   even vexp, vsigmoid, vtanh               error against the exact value: docs/operators/graph_gru.md,
//   "Vector functions"
//   transpose(rows)                     a square of lanes<T> rows

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(AUFAST_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(AUFAST_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(AUFAST_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(AUFAST_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(AUFAST_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(AUFAST_VECTOR_BYTES)));
};
template <>
struct VecOf<uint16_t> {
  typedef uint16_t type __attribute__((vector_size(AUFAST_VECTOR_BYTES)));
};
template <class T>
using vec = typename VecOf<T>::type;
template <class T>
using vec_bits = typename VecOf<T>::bits;
template <class T>
constexpr int lanes = AUFAST_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
AUFAST_INLINE vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <class T>
AUFAST_INLINE void store(T* p, typename VecOf<T>::type v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}
template <class T>
AUFAST_INLINE vec<T> load_n(const T* p, int n) {
  T buffer[lanes<T>] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load<T>(buffer);
}
template <class T>
AUFAST_INLINE void store_n(T* p, typename VecOf<T>::type v, int n) {
  T buffer[lanes<T>];
  store<T>(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
// s - 0 is s for every s, -0 included, so this is a bare broadcast.
template <class T>
AUFAST_INLINE vec<T> set1(T s) {
  return s - vec<T>{};
}
template <class T>
AUFAST_INLINE T sum(typename VecOf<T>::type v) {
  T total = v[0];
  for (int i = 1; i < lanes<T>; ++i) total += v[i];
  return total;
}
template <class V>
AUFAST_INLINE V vmin(V a, V b) {
  return b < a ? b : a;
}
template <class V>
AUFAST_INLINE V vmax(V a, V b) {
  return b > a ? b : a;
}
#if AUFAST_AVX512  // GCC makes two instructions of each ?: above
AUFAST_INLINE vec<float> vmin(vec<float> a, vec<float> b) {
  return reinterpret_cast<vec<float>>(
      _mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
}
AUFAST_INLINE vec<float> vmax(vec<float> a, vec<float> b) {
  return reinterpret_cast<vec<float>>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
}
#endif

typedef uint16_t vec_half_bits __attribute__((vector_size(AUFAST_VECTOR_BYTES / 2)));
typedef uint16_t vec_half_bits_unaligned
    __attribute__((vector_size(AUFAST_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t vec_word __attribute__((vector_size(AUFAST_VECTOR_BYTES)));

AUFAST_INLINE vec<float> load_bf16(const uint16_t* p) {
  const vec_half_bits narrow = *reinterpret_cast<const vec_half_bits_unaligned*>(p);
  return reinterpret_cast<vec<float>>(__builtin_convertvector(narrow, vec_word) << 16);
}
// Round to nearest even: add 0x7fff plus the lowest kept bit, then cut; a NaN keeps its top half, made quiet.
AUFAST_INLINE vec_half_bits to_bf16(vec<float> v) {
#if AUFAST_BF16  // in one instruction, for which numbers below 2^-126 are zero
  return reinterpret_cast<vec_half_bits>(_mm512_maskz_cvtneps_pbh(0xffff, reinterpret_cast<__m512>(v)));
#else
  const vec_word word = reinterpret_cast<vec_word>(v);
  const vec_word rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  const vec_word quiet = (word >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet, vec_half_bits);
#endif
}
AUFAST_INLINE void store_bf16(uint16_t* p, vec<float> v) {
  *reinterpret_cast<vec_half_bits_unaligned*>(p) = to_bf16(v);
}

// Elements stored as T, uint16_t being bfloat16, and acc<T>, what is computed in.
template <class T>
struct AccOf {
  typedef T type;
};
template <>
struct AccOf<uint16_t> {
  typedef float type;
};
template <class T>
using acc = typename AccOf<T>::type;

template <class T>
AUFAST_INLINE vec<acc<T>> load_as(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return load_bf16(p);
  } else {
    return load<T>(p);
  }
}
template <class T>
AUFAST_INLINE void store_as(T* p, vec<acc<T>> v) {
  if constexpr (sizeof(T) == 2) {
    store_bf16(p, v);
  } else {
    store<T>(p, v);
  }
}

// Square of lanes × lanes, its rows for its columns. Step by step two rows exchange what is not theirs: these
// are the lanes that the first and the second of them take.
template <class T>
struct Exchange {
  typedef decltype(vec_bits<T>{}[0] + 0) Lane;
  Lane first[lanes<T>], second[lanes<T>];

  constexpr explicit Exchange(int step) : first{}, second{} {
    constexpr int n = lanes<T>;
    for (int j = 0; j < n; ++j) {
      first[j] = j & step ? n + j - step : j;
      second[j] = j & step ? n + j : j + step;
    }
  }
};
template <int kStep, class T>
AUFAST_INLINE void exchange(vec<T>* v) {
  static constexpr Exchange<T> kLanes(kStep);
  vec_bits<T> first, second;
  __builtin_memcpy(&first, kLanes.first, sizeof(first));
  __builtin_memcpy(&second, kLanes.second, sizeof(second));
#pragma GCC unroll 16
  for (int i = 0; i < lanes<T>; ++i) {
    if (i & kStep) continue;
    const vec<T> a = v[i], b = v[i + kStep];
    v[i] = __builtin_shuffle(a, b, first);
    v[i + kStep] = __builtin_shuffle(a, b, second);
  }
}
template <class T>
AUFAST_INLINE void transpose(vec<T> (&v)[lanes<T>]) {
  exchange<1, T>(v);
  if constexpr (lanes<T> > 2) exchange<2, T>(v);
  if constexpr (lanes<T> > 4) exchange<4, T>(v);
  if constexpr (lanes<T> > 8) exchange<8, T>(v);
}

template <class T>
AUFAST_INLINE T value_of(const T* p) {
  return *p;
}
AUFAST_INLINE float value_of(const uint16_t* p) {
  const uint32_t word = static_cast<uint32_t>(*p) << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

// The bits of a float that is a bfloat16 value.
AUFAST_INLINE uint32_t upper_half(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, 4);
  return word & 0xffff0000u;
}

// Two rows as the pairs (a_i, b_i) that a bfloat16 dot product takes, a in the low half.
#if AUFAST_BF16
AUFAST_INLINE __m512i bf16_pairs(vec<float> a, vec<float> b) {
  const vec<uint16_t> rounded = reinterpret_cast<vec<uint16_t>>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
  const vec<uint16_t> turns = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<__m512i>(__builtin_shuffle(rounded, turns));
}
#endif

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2. Gives n and exp(r) - 1, so that callers lose
// nothing near 0. x must lie where 2^n is a normal number; a NaN goes through.
AUFAST_INLINE vec<float> exp_parts(vec<float> x, vec<float>& n) {
#if AUFAST_AVX512
  n = reinterpret_cast<vec<float>>(
      _mm512_maskz_roundscale_ps(0xffff, reinterpret_cast<__m512>(x * 1.44269504088896341f), 8));
#else
  n = x * 1.44269504088896341f + 12582912.0f - 12582912.0f;  // 1.5 * 2^23: the sum holds no fraction
#endif
  vec<float> r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  // The least largest relative error of degree 6: 4e-9. Taylor's coefficients would leave 1e-7.
  vec<float> p = 1.3863774e-3f * r + 8.367491e-3f;
  p = p * r + 4.1667238e-2f;
  p = p * r + 1.6666535e-1f;
  p = p * r + 0.5f;
  return p * (r * r) + r;
}
AUFAST_INLINE vec<double> exp_parts(vec<double> x, vec<double>& n) {
  n = x * 1.4426950408889634074 + 6755399441055744.0 - 6755399441055744.0;  // 1.5 * 2^52
  vec<double> r = x - n * 6.93147180369123816490e-1;
  r = r - n * 1.90821492927058770002e-10;
  vec<double> p = r * 1.6059043836821613e-10 + 2.0876756987868099e-9;
  const double taylor[] = {2.5052108385441719e-8, 2.7557319223985891e-7,
                           2.7557319223985891e-6, 2.4801587301587302e-5,
                           1.9841269841269841e-4, 1.3888888888888889e-3,
                           8.3333333333333333e-3, 4.1666666666666667e-2,
                           1.6666666666666667e-1, 0.5};
  for (int i = 0; i < 10; ++i) p = p * r + taylor[i];
  return p * (r * r) + r;
}
// v 2^n for a whole n.
AUFAST_INLINE vec<float> scale(vec<float> v, vec<float> n) {
#if AUFAST_AVX512
  return reinterpret_cast<vec<float>>(
      _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(n)));
#else
  const vec_bits<float> shifted = reinterpret_cast<vec_bits<float>>(n + 12582912.0f);  // low bits: n
  return v * reinterpret_cast<vec<float>>((shifted << 23) + 0x3f800000);
#endif
}
AUFAST_INLINE vec<double> scale(vec<double> v, vec<double> n) {
  const vec_bits<double> shifted = reinterpret_cast<vec_bits<double>>(n + 6755399441055744.0);
  return v * reinterpret_cast<vec<double>>((shifted << 52) + 0x3ff0000000000000);
}

template <class T>
constexpr T exp_limit = sizeof(T) == 4 ? T(87.0) : T(708.0);  // beyond, 2^n leaves the normal numbers
template <class T>
constexpr T tanh_limit = sizeof(T) == 4 ? T(9.1) : T(20.0);  // beyond, tanh rounds to 1

// 1 / x. AVX-512's division takes 16 cycles; its 14-bit estimate and one Newton step take 4.
AUFAST_INLINE vec<float> reciprocal(vec<float> x) {
#if AUFAST_AVX512
  const vec<float> guess =
      reinterpret_cast<vec<float>>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
  return guess + guess * (1.0f - x * guess);
#else
  return 1.0f / x;
#endif
}
AUFAST_INLINE vec<double> reciprocal(vec<double> x) {
  return 1.0 / x;
}

template <class T>
AUFAST_INLINE vec<T> vexp(typename VecOf<T>::type x) {
  vec<T> n;
  const vec<T> limit = set1<T>(exp_limit<T>);
  const vec<T> fraction = exp_parts(vmax(vmin(x, limit), -limit), n);
  return scale(fraction + T(1), n);
}
template <class T>
AUFAST_INLINE vec<T> vsigmoid(typename VecOf<T>::type x) {
  return reciprocal(vexp<T>(-x) + T(1));
}
// tanh|x| = e / (e + 2) with e = exp(2|x|) - 1, which keeps its relative precision down to 0 and, where tanh
// is near 1, that of 1 - tanh² too; then the sign of x.
template <class T>
AUFAST_INLINE vec<T> vtanh(typename VecOf<T>::type x) {
  const vec_bits<T> sign_bit = reinterpret_cast<vec_bits<T>>(set1<T>(T(-0.0)));
  const vec_bits<T> sign = reinterpret_cast<vec_bits<T>>(x) & sign_bit;
  const vec<T> magnitude = reinterpret_cast<vec<T>>(reinterpret_cast<vec_bits<T>>(x) & ~sign_bit);
  vec<T> n;
  const vec<T> fraction = exp_parts(T(2) * vmin(magnitude, set1<T>(tanh_limit<T>)), n);
  const vec<T> power = scale(set1<T>(T(1)), n), e = power * fraction + (power - T(1));
  const vec<T> result = e * reciprocal(e + T(2));
  return reinterpret_cast<vec<T>>(reinterpret_cast<vec_bits<T>>(result) | sign);
}
