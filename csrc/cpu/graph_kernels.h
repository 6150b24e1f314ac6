// Supports, node matrices and their gradients. No include guard: read once per level, after vec.h, gemm.h and
// crew.h.

template <class T>
AUFAST_INLINE void copy_row(T* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes<T>) store<T>(to + i, load<T>(from + i));
}
template <class T, class From, class To>
AUFAST_INLINE void convert_row(To* to, const From* from, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes<T>) store_as(to + i, load_as(from + i));
}
template <class T>
AUFAST_INLINE void zero_row(T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes<acc<T>>) store_as(to + i, vec<acc<T>>{});
}

// Whether products may take bfloat16 pairs: the level has them, and that is how tensors are stored.
template <class Stored>
constexpr bool kTakesPairs = AUFAST_BF16 && sizeof(Stored) == 2;

// A run of nodes that one item of a phase works on.
struct Group {
  int64_t begin, size;
};
struct Groups {
  int64_t nodes, count;
  Groups(int64_t nodes, int64_t members, int64_t most) : nodes(nodes) {
    const int64_t share = (nodes + members - 1) / members;
    const int64_t pieces = (share + most - 1) / most;
    count = pieces * members < nodes ? pieces * members : nodes;
  }
  Group operator[](int64_t item) const {
    const int64_t begin = item * nodes / count;
    return {begin, (item + 1) * nodes / count - begin};
  }
};

// to_g[r] = Σ_j S(g, j) from[j] for the nodes of a group and one frame `from` (m, channels). Transposed takes
// S(j, g).
template <class T>
AUFAST_INLINE void mix(const T* S, int64_t s_row, bool transposed, Group group, int64_t nodes, const T* from,
                       int64_t channels, const T* start, int64_t start_row, T* to, int64_t to_row) {
  multiply<T>({group.size, channels, nodes, 1, S + group.begin * (transposed ? 1 : s_row), 0,
               transposed ? 1 : s_row, transposed ? s_row : 1, from, channels, 0, start, start_row, to,
               to_row});
}

// to[g] = Σ_j S_s(g, j) from[j] for a group and `frames` frames (m, channels). With softmax S_0 is the
// identity: a copy.
template <class T, class From, class To>
AUFAST_INLINE void mix_support(const Graph<T>& g, int64_t s, Group group, const From* from, int64_t frames,
                               int64_t from_frame, int64_t channels, To* to, int64_t to_row, int64_t to_frame,
                               const T* zeros) {
  if (!g.softmax || s > 0)
    return multiply<T, From, To>({group.size, channels, g.nodes, 1,
                                  g.supports + s * g.matrix() + group.begin * g.row, 0, g.row, 1, from,
                                  channels, 0, zeros, 0, to, to_row, frames, from_frame, 0, to_frame});
  for (int64_t f = 0; f < frames; ++f)
    for (int64_t i = 0; i < group.size; ++i)
      convert_row<T>(to + f * to_frame + i * to_row, from + f * from_frame + (group.begin + i) * channels,
                     channels);
}

// The transposed mix of a group over all supports and frames: to[g] = start[g] + Σ_s Σ_i S_s(i, g) from_s[i].
// `start` is `to` itself or zero.
template <class T, class From>
AUFAST_INLINE void mix_back(const Graph<T>& g, Group group, const From* from, int64_t from_segment,
                            int64_t frames, int64_t from_frame, int64_t channels, bool accumulate, T* to,
                            int64_t to_frame, const T* zeros) {
  const int64_t dense = g.softmax ? 1 : 0;  // the identity S_0 adds its rows as they are
  for (int64_t f = 0; f < frames && g.softmax; ++f)
    for (int64_t i = 0; i < group.size * channels; i += lanes<T>) {
      const vec<T> same = load_as(from + f * from_frame + group.begin * channels + i);
      store<T>(to + f * to_frame + i, accumulate ? load<T>(to + f * to_frame + i) + same : same);
    }
  const bool add = accumulate || g.softmax;
  multiply<T, From>({group.size, channels, g.nodes, g.order - dense,
                     g.supports + dense * g.matrix() + group.begin, g.matrix(), 1, g.row,
                     from + dense * from_segment, channels, from_segment, add ? to : zeros,
                     add ? channels : 0, to, channels, frames, from_frame, add ? to_frame : 0, to_frame});
}

// The same without `accumulate`, to bfloat16: sums are rounded once, so the identity is a support like
// others.
template <class T, class From>
AUFAST_INLINE void mix_back(const Graph<T>& g, Group group, const From* from, int64_t from_segment,
                            int64_t frames, int64_t from_frame, int64_t channels, uint16_t* to,
                            int64_t to_frame, const T* zeros) {
  multiply<T, From, uint16_t>({group.size, channels, g.nodes, g.order, g.supports + group.begin, g.matrix(),
                               1, g.row, from, channels, from_segment, zeros, 0, to, channels, frames,
                               from_frame, 0, to_frame});
}

// S_0 … S_{K-1} from U. Every phase's items are groups of rows.
template <class T, class Team>
void make_supports(const Graph<T>& g, Team& team, const Groups& groups, const T* zeros) {
  const int64_t m = g.nodes, row = g.row;
  team.phase(g.embeddings, [&](int64_t e) {
    for (int64_t j = 0; j < row; ++j) g.transposed_U[e * row + j] = j < m ? g.U[j * g.embeddings + e] : T(0);
  });
  team.phase(groups.count, [&](int64_t item) {
    const Group group = groups[item];
    multiply<T>({group.size, row, g.embeddings, 1, g.U + group.begin * g.embeddings, 0, g.embeddings, 1,
                 g.transposed_U, row, 0, zeros, 0, g.similarity + group.begin * row, row});
    for (int64_t i = group.begin; i < group.begin + group.size; ++i) {
      T* R = g.similarity + i * row;
      T total = 0, largest = 0;
      for (int64_t j = 0; j < m; ++j) {
        R[j] = R[j] < 0 ? T(0) : R[j];
        largest = R[j] < largest ? largest : R[j];
        total += R[j];
      }
      if (g.softmax) {
        T* A = g.adjacency + i * row;
        for (int64_t j = 0; j < row; j += lanes<T>)
          store<T>(A + j, vexp<T>(load<T>(R + j) - set1<T>(largest)));
        total = 0;
        for (int64_t j = 0; j < m; ++j) total += A[j];
        for (int64_t j = 0; j < row; ++j) A[j] = j < m ? A[j] / total : T(0);
      }
      g.row_sums[i] = total;
    }
  });
  team.phase(groups.count, [&](int64_t item) {
    const Group group = groups[item];
    T total = 0;
    for (int64_t i = 0; i < m; ++i) total += g.row_sums[i];
    for (int64_t i = group.begin; i < group.begin + group.size; ++i) {
      T *S0 = g.supports + i * row, *A = g.adjacency + i * row, *R = g.similarity + i * row;
      for (int64_t j = 0; j < row; ++j) {
        if (!g.softmax) A[j] = j < m ? R[j] / (total == 0 ? T(1) : total) : T(0);
        S0[j] = (i == j ? T(1) : T(0)) + (g.softmax ? T(0) : A[j]);
        if (g.order > 1) S0[g.matrix() + j] = A[j];
      }
    }
  });
  for (int64_t k = 2; k < g.order; ++k)  // S_k = 2 A S_{k-1} - S_{k-2}
    team.phase(groups.count, [&](int64_t item) {
      const Group group = groups[item];
      T* S = g.supports + k * g.matrix() + group.begin * row;
      mix<T>(g.adjacency, row, false, group, m, S - g.matrix() - group.begin * row, row, zeros, 0, S, row);
      for (int64_t j = 0; j < group.size * row; ++j) S[j] = 2 * S[j] - S[j - 2 * g.matrix()];
    });
}

// grad_U from grad_supports. docs/operators/graph_conv.md, "Gradient of the graph".
template <class T, class Team>
void supports_backward(const Graph<T>& g, Team& team, const Groups& groups, const T* zeros) {
  const int64_t m = g.nodes, row = g.row, width = padded<T>(g.embeddings), matrix = g.matrix();
  for (int64_t k = g.order - 1; k >= 2; --k) {
    T* grad = g.grad_supports + k * matrix;  // (m, row)
    team.phase(groups.count, [&](int64_t item) {
      const Group group = groups[item];
      for (int64_t i = group.begin; i < group.begin + group.size; ++i) {
        T *later = grad + i * row, *before = later - 2 * matrix;
        for (int64_t j = 0; j < row; ++j) before[j] -= later[j], later[j] *= 2;
      }
    });
    team.phase(groups.count, [&](int64_t item) {
      const Group group = groups[item];
      T* before = grad - matrix + group.begin * row;
      mix<T>(g.adjacency, row, true, group, m, grad, row, before, row, before, row);
      // The gradient of A gathers in grad_similarity: += grad S_{k-1}ᵀ, a product of rows.
      if (k == g.order - 1) zero_row(g.grad_similarity + group.begin * row, group.size * row);
      dot_products<T>({group.size, m, 1, row, grad + group.begin * row, row, 0, g.supports + (k - 1) * matrix,
                       row, 0, g.grad_similarity + group.begin * row, row});
    });
  }
  team.phase(groups.count, [&](int64_t item) {
    const Group group = groups[item];
    for (int64_t i = group.begin; i < group.begin + group.size; ++i) {
      T *grad = g.grad_similarity + i * row, *U = g.padded_U + i * width;
      if (g.order < 3) zero_row(grad, row);
      if (!g.softmax || g.order > 1)
        for (int64_t j = 0; j < m; ++j) grad[j] += g.grad_supports[(g.softmax ? matrix : 0) + i * row + j];
      T inner = 0;
      for (int64_t j = 0; j < m; ++j) inner += grad[j] * g.adjacency[i * row + j];
      if (g.softmax)
        for (int64_t j = 0; j < m; ++j)
          grad[j] = g.similarity[i * row + j] > 0 ? g.adjacency[i * row + j] * (grad[j] - inner) : T(0);
      g.transposed_U[i] = inner;
      for (int64_t e = 0; e < width; ++e) U[e] = e < g.embeddings ? g.U[i * g.embeddings + e] : T(0);
    }
  });
  if (!g.softmax)  // N = R / ΣR: grad R = (grad N - Σ grad N · N) / ΣR where R > 0
    team.phase(groups.count, [&](int64_t item) {
      const Group group = groups[item];
      T inner = 0, total = 0;
      for (int64_t i = 0; i < m; ++i) inner += g.transposed_U[i], total += g.row_sums[i];
      for (int64_t i = group.begin; i < group.begin + group.size; ++i)
        for (int64_t j = 0; j < m; ++j) {
          T& grad = g.grad_similarity[i * row + j];
          grad = g.similarity[i * row + j] > 0 ? (grad - inner) / total : T(0);
        }
    });
  team.phase(groups.count, [&](int64_t item) {  // grad U = (G + Gᵀ) U
    const Group group = groups[item];
    T* grad_U = g.grad_U + group.begin * width;
    mix<T>(g.grad_similarity, row, false, group, m, g.padded_U, width, zeros, 0, grad_U, width);
    mix<T>(g.grad_similarity, row, true, group, m, g.padded_U, width, grad_U, width, grad_U, width);
  });
}

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

// The same for a group of nodes; room for Q's pairs in scratch.
inline void theta_pairs(const Thetas<float>& t, Group group, const PoolBlock& b, float* scratch) {
  uint32_t* Q = reinterpret_cast<uint32_t*>(scratch);
  const int64_t ce = t.embeddings, q_row = (ce + 1) / 2;
  for (int64_t i = 0; i < group.size; ++i)
    for (int64_t e = 0; e < ce; e += 2) {
      const float* q = t.Q + (group.begin + i) * ce + e;
      Q[i * q_row + e / 2] = upper_half(q[0]) >> 16 | (e + 1 < ce ? upper_half(q[1]) : 0);
    }
  for (int64_t i = 0; i < group.size;) {
    const int64_t node = group.begin + i, left = group.size - i;
    const uint32_t* own = Q + i * q_row;
    switch (left == 7 || left == 8 ? 4 : left) {
      case 1:
        theta_pairs<1>(t, node, b, own, q_row), i += 1;
        break;
      case 2:
        theta_pairs<2>(t, node, b, own, q_row), i += 2;
        break;
      case 3:
        theta_pairs<3>(t, node, b, own, q_row), i += 3;
        break;
      case 4:
        theta_pairs<4>(t, node, b, own, q_row), i += 4;
        break;
      case 5:
        theta_pairs<5>(t, node, b, own, q_row), i += 5;
        break;
      default:
        theta_pairs<6>(t, node, b, own, q_row), i += 6;
        break;
    }
  }
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
  for (int64_t r = 0; r < count; r += 2, to += 2 * width, from += 2 * from_row) {
    const uint16_t* second = r + 1 < count ? from + from_row : nullptr;
    for (int64_t k = 0; k < width; k += 16) _mm512_storeu_si512(to + k, word_pairs(from, second, k));
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

// grad W_e = Σ_i Q_ie grad Θ_i and grad Q_ie = ⟨grad Θ_i, W_e⟩, both in one pass over grad Θ; or added to
// what is there.
template <class T, class Team>
void thetas_backward(const Thetas<T>& t, Team& team, const T* zeros, bool add_weights = false,
                     bool add_Q = false) {
  const int64_t blocks = t.blocks(), m = t.nodes, ce = t.embeddings;
  team.phase(blocks, [&](int64_t item) {
    const PoolBlock b = pool_block(t, item);
    const Pool<T>& pool = t.pool[b.pool];
    const int64_t length = b.rows * t.columns, pool_size = pool.rows * t.columns,
                  offset = b.begin * t.columns;
    const T* grad_theta = t.grad_theta + pool.theta + offset;
    if (pool.grad != nullptr) {
      T* grad = pool.grad + offset;
      multiply<T>({ce, length, m, 1, t.Q, 0, 1, ce, grad_theta, t.block, 0, add_weights ? grad : zeros,
                   add_weights ? pool_size : 0, grad, pool_size});
    }
    if (t.grad_Q == nullptr) return;
    T* partial = t.partial_Q + item * m * ce;
    for (int64_t i = 0; i < m * ce; ++i) partial[i] = 0;
    with_weights<T>(pool, [&]<class W>(const W* weights) {
      dot_products<T, T, W>(
          {m, ce, 1, length, grad_theta, t.block, 0, weights + offset, pool_size, 0, partial, ce});
    });
  });
  if (t.grad_Q == nullptr) return;
  team.phase(m, [&](int64_t i) {
    for (int64_t e = 0; e < ce; ++e) {
      T total = add_Q ? t.grad_Q[i * ce + e] : T(0);
      for (int64_t block = 0; block < blocks; ++block) total += t.partial_Q[(block * m + i) * ce + e];
      t.grad_Q[i * ce + e] = total;
    }
  });
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

// The Θᵀ of a group, for one block of columns, to `theta` or as pairs.
template <class T>
void transpose_block(const TransposedPool<T>& pool, const Thetas<T>& t, Group group, int64_t item, T* scratch,
                     const T* zeros) {
  const int64_t column_blocks = pool.blocks() / pool.segments, segment = item / column_blocks;
  const int64_t begin = item % column_blocks * kTransposed, row = pool.row(), rows = pool.first + pool.second;
  const int64_t left = pool.live - begin, width = left < kTransposed ? left : kTransposed;
  for (int64_t e = 0; e < t.embeddings; ++e)
    with_weights<T>(pool, [&]<class W>(const W* weights) {
      const W* from = weights + (e * pool.segments + segment) * rows * pool.columns + begin;
      T* to = scratch + e * kTransposed * row;
      transpose_rows<T>(from, pool.columns, pool.first, width, to, row);
      transpose_rows<T>(from + pool.first * pool.columns, pool.columns, pool.second, width,
                        to + padded<T>(pool.first), row);
    });
  const int64_t offset = group.begin * pool.block + pool.theta + (segment * pool.live + begin) * row;
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

// The door's conversions of bfloat16, n elements.
inline void widen(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + lanes<float> <= n; i += lanes<float>) store<float>(to + i, load_bf16(from + i));
  for (; i < n; ++i) to[i] = value_of(from + i);
}
inline void narrow(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + lanes<float> <= n; i += lanes<float>) store_bf16(to + i, load<float>(from + i));
  if (i == n) return;
  uint16_t last[lanes<float>];
  store_bf16(last, load_n<float>(from + i, static_cast<int>(n - i)));
  for (int64_t k = 0; i < n; ++i, ++k) to[i] = last[k];
}
