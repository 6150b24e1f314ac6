// Rows of bfloat16 in pairs, and sums of them by dot products. No include guard: read once per level, after
// gemm.h.

#if AUFAST_BF16
// Which words of two rows of 32 are paired: by their place, the left and the right half of the rows, or the
// even and the odd ones, which are the low and the high halves of a row of 16 pairs. `packed` undoes, for one
// row, what unpacking did to its order.
struct WordTurns {
  uint16_t left[32], right[32], even[32], odd[32], packed[32];
};
constexpr WordTurns word_turns() {
  WordTurns turns{};
  for (int k = 0; k < 16; ++k)
    for (int row = 0; row < 2; ++row) {
      const int to = 2 * k + row, from = 32 * row;
      turns.left[to] = static_cast<uint16_t>(from + k);
      turns.right[to] = static_cast<uint16_t>(from + 16 + k);
      turns.even[to] = static_cast<uint16_t>(from + 2 * k);
      turns.odd[to] = static_cast<uint16_t>(from + 2 * k + 1);
    }
  for (int k = 0; k < 32;
       ++k)  // word k is in lane k / 8; unpacking takes the first four of each, then the others
    turns.packed[k] = static_cast<uint16_t>(k % 8 / 4 * 16 + k / 8 * 4 + k % 4);
  return turns;
}
constexpr WordTurns kWordTurns = word_turns();

// Calls use<N>(i) for i … i + N - 1, up to six together, until all `count` are through.
template <class Use>
AUFAST_INLINE void few_at_once(int64_t count, const Use& use) {
  for (int64_t i = 0; i < count;) {
    const int64_t left = count - i;
    switch (left == 7 || left == 8 ? 4 : left) {
      case 1:
        use.template operator()<1>(i), i += 1;
        break;
      case 2:
        use.template operator()<2>(i), i += 2;
        break;
      case 3:
        use.template operator()<3>(i), i += 3;
        break;
      case 4:
        use.template operator()<4>(i), i += 4;
        break;
      case 5:
        use.template operator()<5>(i), i += 5;
        break;
      default:
        use.template operator()<6>(i), i += 6;
        break;
    }
  }
}

// to_r = Σ_s Σ_i A_s(r, i) from_s,i of whole bfloat16 rows, rounded once: A holds pairs of i, (segments,
// pairs, rows).
struct LowSums {
  int64_t rows, columns, terms, segments;
  const uint32_t* A;
  const uint16_t* from;
  int64_t from_segment, from_row;
  uint16_t* to;
  int64_t to_row;
};

// 32 columns of ROWS rows. Unpacking two rows leaves their columns in another order, which ends when the sums
// are rounded.
template <int ROWS>
void low_sums_tile(const LowSums& p, int64_t row, int64_t column) {
  __m512 sums[ROWS][2] = {};
  const bool whole = column + 32 <= p.columns;
  const uint32_t* A = p.A + row;
  for (int64_t s = 0; s < p.segments; ++s) {
    const uint16_t* from = p.from + s * p.from_segment + column;
    for (int64_t i = 0; i < p.terms; i += 2, from += 2 * p.from_row, A += p.rows) {
      const __m512i one = load_words(from, whole),
                    two = i + 1 < p.terms ? load_words(from + p.from_row, whole) : _mm512_setzero_si512();
      const __m512bh low = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(one, two)),
                     high = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(one, two));
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const __m512bh factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(A[r])));
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], low, factor);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], high, factor);
      }
    }
  }
  const __m512i turns = _mm512_loadu_si512(kWordTurns.packed);
  uint16_t* to = p.to + row * p.to_row + column;
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r, to += p.to_row) {
    const __m512i rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(sums[r][1], sums[r][0])),
                  ordered = _mm512_permutexvar_epi16(turns, rounded);
    if (whole)
      _mm512_storeu_si512(to, ordered);
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(ordered));
  }
}
inline void low_sums(const LowSums& p) {
  for (int64_t column = 0; column < p.columns; column += 32)
    few_at_once(p.rows, [&]<int ROWS>(int64_t row) { low_sums_tile<ROWS>(p, row, column); });
}

// Pairs for it: A(r, i) at r * a_row + i * a_step, rounded, to (pairs of terms, rows). Gives their end.
inline uint32_t* pair_factors(const float* A, int64_t a_row, int64_t a_step, int64_t rows, int64_t terms,
                              uint32_t* to) {
  const auto word = [](float value) {  // nearest, even
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return value == value ? (bits + 0x7fffu + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40u;
  };
  for (int64_t i = 0; i < terms; i += 2)
    for (int64_t r = 0; r < rows; ++r) {
      const float* at = A + r * a_row + i * a_step;
      *to++ = word(at[0]) | (i + 1 < terms ? word(at[a_step]) << 16 : 0);
    }
  return to;
}
#endif
