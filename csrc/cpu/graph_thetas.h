// Node matrices, their products and gradients. No include guard: read once per level, after graph_kernels.h.

struct PoolBlock {
  int pool;
  int64_t begin, rows;
};
template <class T>
PoolBlock pool_block(const Thetas<T>& t, int64_t item) {
  for (int k = 0;; ++k) {
    const int64_t blocks = (t.pool[k].rows + kPoolRows - 1) / kPoolRows;
    if (item < blocks) {
      const int64_t left = t.pool[k].rows - item * kPoolRows;
      return {k, item * kPoolRows, left < kPoolRows ? left : kPoolRows};
    }
    item -= blocks;
  }
}

// Hands the weights of a pool, as they are stored, to `use`.
template <class T, class AnyPool, class Use>
AUFAST_INLINE void with_weights(const AnyPool& pool, const Use& use) {
  if constexpr (sizeof(T) == 4)
    if (pool.low != nullptr) return use(pool.low);
  use(pool.weights);
}

// One block's Θ_i for a group, to `to` with `node` elements between nodes.
template <class T>
AUFAST_INLINE void theta_block(const Thetas<T>& t, Group group, const PoolBlock& b, T* to, int64_t node,
                               const T* zeros) {
  const Pool<T>& pool = t.pool[b.pool];
  with_weights<T>(pool, [&]<class W>(const W* weights) {
    multiply<T, W>({group.size, b.rows * t.columns, t.embeddings, 1, t.Q + group.begin * t.embeddings, 0,
                    t.embeddings, 1, weights + b.begin * t.columns, pool.rows * t.columns, 0, zeros, 0, to,
                    node});
  });
}

#if AUFAST_BF16
// Where the words of two rows of 32 sums, each in the order that unpacking leaves, go to become pairs of
// rows.
struct PairTurns {
  uint16_t first[32], second[32];
};
constexpr PairTurns pair_turns() {
  PairTurns turns{};
  for (int column = 0; column < 16; ++column)
    for (int row = 0; row < 2; ++row) {
      const int lane = column / 8, place = column % 8 % 4, high = column % 8 / 4;
      turns.first[2 * column + row] = static_cast<uint16_t>(32 * high + 16 * row + 4 * lane + place);
      turns.second[2 * column + row] = static_cast<uint16_t>(32 * high + 16 * row + 4 * lane + 8 + place);
    }
  return turns;
}

// One block's Θ_i of NODES nodes from bfloat16 weights, straight to pairs. Two embeddings make a pair: Q
// holds theirs, (nodes, q_row).
template <int NODES>
void theta_pairs(const Thetas<float>& t, int64_t node, const PoolBlock& b, const uint32_t* Q, int64_t q_row) {
  static constexpr PairTurns kTurns = pair_turns();
  const __m512i first = _mm512_loadu_si512(kTurns.first), second = _mm512_loadu_si512(kTurns.second);
  const Pool<float>& pool = t.pool[b.pool];
  const int64_t columns = t.columns, matrix = pool.rows * columns, begin = b.begin * columns;
  uint32_t* to = t.pairs + (node * t.block + pool.theta + begin) / 2;
  for (int64_t r = 0; r < b.rows; r += 2, to += columns)
    for (int64_t n = 0; n < columns; n += 32) {
      const bool whole = n + 32 <= columns;
      __m512 sums[NODES][2][2] = {};
      const uint16_t* weights = pool.low + begin + r * columns + n;
      for (int64_t e = 0; e < t.embeddings; e += 2, weights += 2 * matrix)
#pragma GCC unroll 2
        for (int row = 0; row < 2; ++row) {
          const uint16_t* one = weights + row * columns;
          const __m512i even = load_words(one, whole),
                        odd = e + 1 < t.embeddings ? load_words(one + matrix, whole) : _mm512_setzero_si512();
          const __m512bh low = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(even, odd)),
                         high = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(even, odd));
#pragma GCC unroll 6
          for (int i = 0; i < NODES; ++i) {
            const __m512bh q =
                reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(Q[i * q_row + e / 2])));
            sums[i][row][0] = _mm512_dpbf16_ps(sums[i][row][0], low, q);
            sums[i][row][1] = _mm512_dpbf16_ps(sums[i][row][1], high, q);
          }
        }
#pragma GCC unroll 6
      for (int i = 0; i < NODES; ++i) {
        const __m512i low = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(sums[i][1][0], sums[i][0][0])),
                      high = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(sums[i][1][1], sums[i][0][1]));
        uint32_t* pairs = to + i * t.block / 2 + n;
        _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(low, first, high));
        if (whole) _mm512_storeu_si512(pairs + 16, _mm512_permutex2var_epi16(low, second, high));
      }
    }
}

// Q of a group in pairs of embeddings, to (nodes, pairs_of_Q).
inline int64_t pairs_of_Q(const Thetas<float>& t) {
  return (t.embeddings + 1) / 2;
}
inline void pair_Q(const Thetas<float>& t, Group group, uint32_t* to) {
  const int64_t ce = t.embeddings;
  for (int64_t i = 0; i < group.size; ++i)
    for (int64_t e = 0; e < ce; e += 2) {
      const float* q = t.Q + (group.begin + i) * ce + e;
      *to++ = upper_half(q[0]) >> 16 | (e + 1 < ce ? upper_half(q[1]) : 0);
    }
}

// The same for a group of nodes; room for Q's pairs in scratch.
inline void theta_pairs(const Thetas<float>& t, Group group, const PoolBlock& b, float* scratch) {
  uint32_t* Q = reinterpret_cast<uint32_t*>(scratch);
  const int64_t q_row = pairs_of_Q(t);
  pair_Q(t, group, Q);
  few_at_once(group.size,
              [&]<int NODES>(int64_t i) { theta_pairs<NODES>(t, group.begin + i, b, Q + i * q_row, q_row); });
}
#endif  // AUFAST_BF16

// Θ_i = Σ_e Q_ie W_e, node groups outermost so that a node's matrices are made by the thread that will use
// them.
template <class T, class Team>
void make_thetas(const Thetas<T>& t, Team& team, int64_t members, T* scratch, const T* zeros) {
  const Groups groups(t.distinct, members, kMostNodes);
  const int64_t blocks = t.blocks(), columns = t.columns;
  team.phase(groups.count * blocks, [&](int64_t item) {
    const Group group = groups[item / blocks];
    const PoolBlock b = pool_block(t, item % blocks);
    const int64_t offset = t.pool[b.pool].theta + b.begin * columns;
    if (t.pairs == nullptr || t.pool[b.pool].rows == 1)
      return theta_block<T>(t, group, b, t.theta + group.begin * t.block + offset, t.block, zeros);
#if AUFAST_BF16
    if constexpr (sizeof(T) == 4) {
      if (t.pool[b.pool].low != nullptr) return theta_pairs(t, group, b, scratch);
      theta_block<T>(t, group, b, scratch, b.rows * columns, zeros);
      for (int64_t i = 0; i < group.size; ++i)
        for (int64_t r = 0; r < b.rows; r += 2) {
          const T* rows = scratch + (i * b.rows + r) * columns;
          uint32_t* to = t.pairs + ((group.begin + i) * t.block + offset + r * columns) / 2;
          for (int64_t n = 0; n < columns; n += 16)
            _mm512_storeu_si512(to + n, bf16_pairs(load<T>(rows + n), load<T>(rows + columns + n)));
        }
    }
#else
    (void)scratch;
#endif
  });
}

// A product whose B lies among node matrices. Where those are pairs, A is bfloat16: so it is stored, or
// round_rows has rounded rows of T in place.
template <class T, class InA = T, class InC = T>
struct ThetaProduct {
  int64_t rows, columns, depth, segments;
  const InA* A;
  int64_t a_segment, a_row;
  int64_t b_row, b_segment;
  const T* start;
  int64_t start_row;
  InC* C;
  int64_t c_row;
  T* scratch = nullptr;  // (rows, columns), for matrix tiles where C is bfloat16
};
// B begins at `column` of a row, `offset` elements into the node matrices at `theta`.
template <class T, class InA = T, class InC = T>
AUFAST_INLINE void multiply_theta(const Thetas<T>& t, const T* theta, int64_t offset, int64_t column,
                                  const ThetaProduct<T, InA, InC>& p) {
#if AUFAST_BF16
  if constexpr (sizeof(T) == 4)
    if (t.pairs != nullptr) {
      constexpr int64_t per_pair = 4 / sizeof(InA);
      return multiply_pairs<InC>({p.rows, p.columns, p.depth / 2, p.segments,
                                  reinterpret_cast<const uint32_t*>(p.A), p.a_segment / per_pair,
                                  p.a_row / per_pair, 1, t.pairs + offset / 2 + column, p.b_row,
                                  p.b_segment / 2, p.start, p.start_row, p.C, p.c_row, t.tiles, p.scratch});
    }
#endif
  if constexpr (sizeof(InA) == sizeof(T))
    multiply<T, T, InC>({p.rows, p.columns, p.depth, p.segments, p.A, p.a_segment, p.a_row, 1,
                         theta + offset + column, p.b_row, p.b_segment, p.start, p.start_row, p.C, p.c_row});
}

// Rows times a node's matrices: C = start + Σ_s mixed_s Θ_s, over `depth` rows of Θ from row `begin` of each
// segment on.
template <class T, class InA = T, class InC = T>
struct NodeProduct {
  int64_t node, pool, begin, depth, segment_rows;
  int64_t rows;
  const InA* mixed;
  int64_t mixed_segment, mixed_row;
  const T* start;
  int64_t start_row;
  InC* C;
  int64_t c_row;
  T* scratch = nullptr;
};
template <class T, class InA = T, class InC = T>
AUFAST_INLINE void multiply_node(const Thetas<T>& t, int64_t segments, const NodeProduct<T, InA, InC>& p) {
  multiply_theta<T, InA, InC>(
      t, t.theta, p.node * t.stride() + t.pool[p.pool].theta + p.begin * t.columns, 0,
      {p.rows, t.columns, p.depth, segments, p.mixed, p.mixed_segment, p.mixed_row, t.columns,
       p.segment_rows * t.columns, p.start, p.start_row, p.C, p.c_row, p.scratch});
}

// Rounds rows to bfloat16 in place where products take pairs: row r keeps its address and takes half its
// length.
template <class T>
AUFAST_INLINE void round_rows(const Thetas<T>& t, T* rows, int64_t count, int64_t width) {
#if AUFAST_BF16
  if constexpr (sizeof(T) == 4)
    for (int64_t r = 0; r < count && t.pairs != nullptr; ++r) {
      T* row = rows + r * width;
      uint16_t* to = reinterpret_cast<uint16_t*>(row);
      for (int64_t k = 0; k < width; k += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(row + k))));
    }
#else
  (void)t, (void)rows, (void)count, (void)width;
#endif
}

// Two neighbouring rows as pairs, in place of the first of them, for products that sum over rows. A last row
// alone is paired with zeros.
template <class T>
AUFAST_INLINE void pair_rows(const Thetas<T>& t, T* rows, int64_t count, int64_t width) {
#if AUFAST_BF16
  if constexpr (sizeof(T) == 4)
    for (int64_t r = 0; r < count && t.pairs != nullptr; r += 2) {
      T* row = rows + r * width;
      for (int64_t k = 0; k < width; k += 16)
        _mm512_storeu_si512(
            row + k, bf16_pairs(load<T>(row + k), r + 1 < count ? load<T>(row + width + k) : vec<T>{}));
    }
#else
  (void)t, (void)rows, (void)count, (void)width;
#endif
}
#if AUFAST_BF16
// 16 words of two rows from column k on as pairs; zeros where there is no second row.
AUFAST_INLINE __m512i word_pairs(const uint16_t* first, const uint16_t* second, int64_t k) {
  const auto widened = [k](const uint16_t* row) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + k)));
  };
  const __m512i high = second == nullptr ? _mm512_setzero_si512() : _mm512_slli_epi32(widened(second), 16);
  return _mm512_or_si512(widened(first), high);
}
#endif

// The same for rows that round_rows has rounded; backwards, since the pairs grow over what they come from.
template <class T>
AUFAST_INLINE void pair_rounded_rows(const Thetas<T>& t, T* rows, int64_t count, int64_t row_size,
                                     int64_t width) {
#if AUFAST_BF16
  for (int64_t r = 0; r < count && t.pairs != nullptr; r += 2) {
    T* row = rows + r * row_size;
    const uint16_t *first = reinterpret_cast<const uint16_t*>(row),
                   *second = r + 1 < count ? reinterpret_cast<const uint16_t*>(row + row_size) : nullptr;
    for (int64_t k = width - 16; k >= 0; k -= 16) _mm512_storeu_si512(row + k, word_pairs(first, second, k));
  }
#else
  (void)t, (void)rows, (void)count, (void)row_size, (void)width;
#endif
}

// The same from rows of bfloat16, `from_row` apart.
template <class T>
AUFAST_INLINE void pair_low_rows(T* to, const uint16_t* from, int64_t from_row, int64_t count,
                                 int64_t width) {
#if AUFAST_BF16
  const __m512i left = _mm512_loadu_si512(kWordTurns.left), right = _mm512_loadu_si512(kWordTurns.right);
  for (int64_t r = 0; r < count; r += 2, to += 2 * width, from += 2 * from_row) {
    const uint16_t* second = r + 1 < count ? from + from_row : nullptr;
    int64_t k = 0;
    for (; k + 32 <= width && second != nullptr; k += 32) {
      const __m512i one = _mm512_loadu_si512(from + k), two = _mm512_loadu_si512(second + k);
      _mm512_storeu_si512(to + k, _mm512_permutex2var_epi16(one, left, two));
      _mm512_storeu_si512(to + k + 16, _mm512_permutex2var_epi16(one, right, two));
    }
    for (; k < width; k += 16) _mm512_storeu_si512(to + k, word_pairs(from, second, k));
  }
#else
  (void)to, (void)from, (void)from_row, (void)count, (void)width;
#endif
}

// C(k, :) += Σ_r A(r, k) B(r, :) over `rows` rows, or = where `fresh`; both in pairs of rows where products
// take pairs. With a_width = 0, A is 1 everywhere.
template <class T>
struct SumOverRows {
  int64_t count, columns, rows;
  const T* A;
  int64_t a_width;
  const T* B;
  int64_t b_row;
  bool fresh;
  T* C;
};
template <class T>
AUFAST_INLINE void sum_over_rows(const Thetas<T>& t, const SumOverRows<T>& p, const T* zeros) {
  const T* start = p.fresh ? zeros : p.C;
  const int64_t start_row = p.fresh ? 0 : p.columns, a_row = p.a_width == 0 ? 0 : 1;
#if AUFAST_BF16
  if constexpr (sizeof(T) == 4)
    if (t.pairs != nullptr) {
      constexpr uint32_t kOnes = 0x3f803f80u;
      const uint32_t* A = p.a_width == 0 ? &kOnes : reinterpret_cast<const uint32_t*>(p.A);
      return multiply_pairs({p.count, p.columns, (p.rows + 1) / 2, 1, A, 0, a_row, 2 * p.a_width,
                             reinterpret_cast<const uint32_t*>(p.B), 2 * p.b_row, 0, start, start_row, p.C,
                             p.columns, false, nullptr});
    }
#endif
  const T one = 1;
  multiply<T>({p.count, p.columns, p.rows, 1, a_row == 0 ? &one : p.A, 0, a_row, p.a_width, p.B, p.b_row, 0,
               start, start_row, p.C, p.columns});
}

// From some rows of grad Θ, `node` elements between nodes: of the same rows of a pool grad W_e = Σ_i Q_ie
// grad Θ_i, or added to what is there, and their part of grad Q_ie = ⟨grad Θ_i, W_e⟩, to partial sum number
// `part`.
template <class T>
void pool_backward(const Thetas<T>& t, const PoolBlock& b, const T* grad_theta, int64_t node, int64_t part,
                   bool add, const T* zeros) {
  const Pool<T>& pool = t.pool[b.pool];
  const int64_t length = b.rows * t.columns, pool_size = pool.rows * t.columns, offset = b.begin * t.columns,
                m = t.nodes, ce = t.embeddings;
  const auto sum_nodes = [&]<class To>(To* grad, const T* start, int64_t start_row) {
    multiply<T, T, To>(
        {ce, length, m, 1, t.Q, 0, 1, ce, grad_theta, node, 0, start, start_row, grad, pool_size});
  };
  if (pool.grad != nullptr)
    sum_nodes(pool.grad + offset, add ? pool.grad + offset : zeros, add ? pool_size : 0);
  if constexpr (sizeof(T) == 4)
    if (pool.low_grad != nullptr) sum_nodes(pool.low_grad + offset, zeros, 0);
  if (t.grad_Q == nullptr) return;
  T* partial = t.partial_Q + part * m * ce;
  for (int64_t i = 0; i < m * ce; ++i) partial[i] = 0;
  with_weights<T>(pool, [&]<class W>(const W* weights) {
    dot_products<T, T, W>(
        {m, ce, 1, length, grad_theta, node, 0, weights + offset, pool_size, 0, partial, ce});
  });
}

#if AUFAST_BF16
// pool_backward where grad Θ, Q, W and its gradient are bfloat16; `Q` holds pairs of nodes.
inline void pool_backward_low(const Thetas<float>& t, const PoolBlock& b, const uint16_t* grad_theta,
                              int64_t node, const uint32_t* Q, int64_t part) {
  const Pool<float>& pool = t.pool[b.pool];
  const int64_t length = b.rows * t.columns, pool_size = pool.rows * t.columns, offset = b.begin * t.columns,
                m = t.nodes, ce = t.embeddings;
  if (pool.low_grad != nullptr)
    low_sums({ce, length, m, 1, Q, grad_theta, 0, node, pool.low_grad + offset, pool_size});
  if (t.grad_Q == nullptr) return;
  float* partial = t.partial_Q + part * m * ce;
  for (int64_t i = 0; i < m * ce; ++i) partial[i] = 0;
  dot_products<float, uint16_t, uint16_t>(
      {m, ce, 1, length, grad_theta, node, 0, pool.low + offset, pool_size, 0, partial, ce});
}
#endif

// grad Q of a node from its partial sums.
template <class T>
void sum_parts_of_Q(const Thetas<T>& t, int64_t node, int64_t parts, bool add) {
  const int64_t ce = t.embeddings;
  for (int64_t e = 0; e < ce; ++e) {
    T total = add ? t.grad_Q[node * ce + e] : T(0);
    for (int64_t part = 0; part < parts; ++part) total += t.partial_Q[(part * t.nodes + node) * ce + e];
    t.grad_Q[node * ce + e] = total;
  }
}

// The gradients of all pools and of Q, in one pass over grad Θ; or added to what is there.
template <class T, class Team>
void thetas_backward(const Thetas<T>& t, Team& team, const T* zeros, bool add_weights = false,
                     bool add_Q = false) {
  const int64_t blocks = t.blocks();
  team.phase(blocks, [&](int64_t item) {
    const PoolBlock b = pool_block(t, item);
    const int64_t at = t.pool[b.pool].theta + b.begin * t.columns;
    pool_backward(t, b, t.grad_theta + at, t.block, item, add_weights, zeros);
  });
  if (t.grad_Q == nullptr) return;
  team.phase(t.nodes, [&](int64_t i) { sum_parts_of_Q(t, i, blocks, add_Q); });
}

// `width` columns of `count` rows, `from_row` apart, to rows that are `to_row` apart and padded with zeros.
template <class T, class W>
void transpose_rows(const W* from, int64_t from_row, int64_t count, int64_t width, T* to, int64_t to_row) {
  for (int64_t r = 0; r < padded<T>(count); r += lanes<T>)
    for (int64_t n = 0; n < width; n += lanes<T>) {
      vec<T> square[lanes<T>];
#pragma GCC unroll 16
      for (int k = 0; k < lanes<T>; ++k)
        square[k] = r + k < count ? load_as(from + (r + k) * from_row + n) : vec<T>{};
      transpose<T>(square);
#pragma GCC unroll 16
      for (int k = 0; k < lanes<T>; ++k)
        if (n + k < width) store<T>(to + (n + k) * to_row + r, square[k]);
    }
}

#if AUFAST_BF16
// 16 bfloat16 columns of `count` rows, two columns together: pair j of all rows to row j of `to`, which are
// padded with zeros.
inline void transpose_pairs(const uint16_t* from, int64_t from_row, int64_t count, uint32_t* to,
                            int64_t to_row) {
  const auto row = [&](int64_t r) {
    return r < count ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + r * from_row))
                     : _mm256_setzero_si256();
  };
  for (int64_t r = 0; r < padded<float>(count); r += 32) {
    vec<float> square[16];
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k)
      square[k] = reinterpret_cast<vec<float>>(
          _mm512_inserti64x4(_mm512_castsi256_si512(row(r + k)), row(r + 16 + k), 1));
    transpose<float>(square);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      float* at = reinterpret_cast<float*>(to + j * to_row + r);
      store<float>(at, square[j]);
      if (r + 16 < padded<float>(count)) store<float>(at + 16, square[8 + j]);
    }
  }
}

// Pairs of Θᵀ_i of NODES nodes from the pairs of all W_e that transpose_pairs has left, `count` of each. Two
// embeddings make a pair: Q holds theirs, (nodes, q_row).
template <int NODES>
void transposed_pairs(const uint32_t* turned, int64_t count, int64_t embeddings, const uint32_t* Q,
                      int64_t q_row, uint32_t* to, int64_t node) {
  const __m512i even = _mm512_loadu_si512(kWordTurns.even), odd = _mm512_loadu_si512(kWordTurns.odd);
  for (int64_t n = 0; n < count; n += 16) {
    __m512 sums[NODES][2] = {};
    for (int64_t e = 0; e < embeddings; e += 2) {
      const __m512i one = _mm512_loadu_si512(turned + e * count + n),
                    two = e + 1 < embeddings ? _mm512_loadu_si512(turned + (e + 1) * count + n)
                                             : _mm512_setzero_si512();
      const __m512bh low = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(one, even, two)),
                     high = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(one, odd, two));
#pragma GCC unroll 6
      for (int i = 0; i < NODES; ++i) {
        const __m512bh q =
            reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(Q[i * q_row + e / 2])));
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], low, q);
        sums[i][1] = _mm512_dpbf16_ps(sums[i][1], high, q);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < NODES; ++i)
      _mm512_storeu_si512(to + i * node + n, bf16_pairs(reinterpret_cast<vec<float>>(sums[i][0]),
                                                        reinterpret_cast<vec<float>>(sums[i][1])));
  }
}

// One block of columns of the Θᵀ of a group as pairs, from bfloat16 weights; `offset` as in transpose_block.
inline void transpose_low_block(const TransposedPool<float>& pool, const Thetas<float>& t, Group group,
                                int64_t segment, int64_t begin, int64_t offset, float* scratch) {
  const int64_t row = pool.row(), rows = pool.first + pool.second + pool.others,
                count = kTransposed / 2 * row, q_row = pairs_of_Q(t);
  uint32_t *turned = reinterpret_cast<uint32_t*>(scratch), *Q = turned + t.embeddings * count;
  for (int64_t e = 0; e < t.embeddings; ++e) {
    const uint16_t* from = pool.low + (e * pool.segments + segment) * rows * pool.columns + begin;
    uint32_t* to = turned + e * count;
    transpose_pairs(from, pool.columns, pool.first, to, row);
    transpose_pairs(from + pool.first * pool.columns, pool.columns, pool.second,
                    to + padded<float>(pool.first), row);
  }
  pair_Q(t, group, Q);
  few_at_once(group.size, [&]<int NODES>(int64_t i) {
    transposed_pairs<NODES>(turned, count, t.embeddings, Q + i * q_row, q_row,
                            t.pairs + (offset + i * pool.block) / 2, pool.block / 2);
  });
}
#endif

// The Θᵀ of a group, for one block of columns, to `theta` or as pairs.
template <class T>
void transpose_block(const TransposedPool<T>& pool, const Thetas<T>& t, Group group, int64_t item, T* scratch,
                     const T* zeros) {
  const int64_t column_blocks = pool.blocks() / pool.segments, segment = item / column_blocks;
  const int64_t begin = item % column_blocks * kTransposed, row = pool.row(),
                rows = pool.first + pool.second + pool.others;
  const int64_t left = pool.live - begin, width = left < kTransposed ? left : kTransposed;
  const int64_t offset = group.begin * pool.block + pool.theta + (segment * pool.live + begin) * row;
#if AUFAST_BF16
  if constexpr (sizeof(T) == 4)
    if (t.pairs != nullptr && pool.low != nullptr)
      return transpose_low_block(pool, t, group, segment, begin, offset, scratch);
#endif
  for (int64_t e = 0; e < t.embeddings; ++e)
    with_weights<T>(pool, [&]<class W>(const W* weights) {
      const W* from = weights + (e * pool.segments + segment) * rows * pool.columns + begin;
      T* to = scratch + e * kTransposed * row;
      transpose_rows<T>(from, pool.columns, pool.first, width, to, row);
      transpose_rows<T>(from + pool.first * pool.columns, pool.columns, pool.second, width,
                        to + padded<T>(pool.first), row);
    });
  T* to = t.pairs == nullptr ? t.theta + offset : scratch + t.embeddings * kTransposed * row;
  const int64_t node = t.pairs == nullptr ? pool.block : width * row;
  multiply<T>({group.size, width * row, t.embeddings, 1, t.Q + group.begin * t.embeddings, 0, t.embeddings, 1,
               scratch, kTransposed * row, 0, zeros, 0, to, node});
#if AUFAST_BF16
  for (int64_t i = 0; i < group.size && t.pairs != nullptr; ++i)
    for (int64_t n = 0; n < width; n += 2, to += 2 * row) {
      uint32_t* pairs = t.pairs + (offset + i * pool.block + n * row) / 2;
      for (int64_t k = 0; k < row; k += 16)
        if constexpr (sizeof(T) == 4)
          _mm512_storeu_si512(pairs + k, bf16_pairs(load<T>(to + k), load<T>(to + row + k)));
    }
#endif
}
