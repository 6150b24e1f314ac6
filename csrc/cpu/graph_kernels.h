// Rows, mixing, supports and their gradients. No include guard: read once per level, after vec.h, gemm.h,
// crew.h and graph_pairs.h.

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

// to[g] = Σ_j S_s(g, j) from[j] for a group and `frames` frames (m, channels), rows `from_row` apart. With
// softmax S_0 is the identity: a copy.
template <class T, class From, class To>
AUFAST_INLINE void mix_support(const Graph<T>& g, int64_t s, Group group, const From* from, int64_t from_row,
                               int64_t frames, int64_t from_frame, int64_t channels, To* to, int64_t to_row,
                               int64_t to_frame, const T* zeros) {
  if (!g.softmax || s > 0)
    return multiply<T, From, To>({group.size, channels, g.nodes, 1,
                                  g.supports + s * g.matrix() + group.begin * g.row, 0, g.row, 1, from,
                                  from_row, 0, zeros, 0, to, to_row, frames, from_frame, 0, to_frame});
  for (int64_t f = 0; f < frames; ++f)
    for (int64_t i = 0; i < group.size; ++i)
      convert_row<T>(to + f * to_frame + i * to_row, from + f * from_frame + (group.begin + i) * from_row,
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

// The same without `accumulate`, to rows `to_row` apart that may be bfloat16: sums are rounded once, so the
// identity is a support like others.
template <class T, class From, class To>
AUFAST_INLINE void mix_back(const Graph<T>& g, Group group, const From* from, int64_t from_segment,
                            int64_t frames, int64_t from_frame, int64_t channels, To* to, int64_t to_row,
                            int64_t to_frame, const T* zeros) {
  multiply<T, From, To>({group.size, channels, g.nodes, g.order, g.supports + group.begin, g.matrix(), 1,
                         g.row, from, channels, from_segment, zeros, 0, to, to_row, frames, from_frame, 0,
                         to_frame});
}

#if AUFAST_BF16
// mix_support of bfloat16 rows by pairs of nodes, S rounded; room for its pairs in scratch.
inline void mix_low(const Graph<float>& g, int64_t s, Group group, const uint16_t* from, int64_t from_row,
                    int64_t frames, int64_t from_frame, int64_t channels, uint16_t* to, int64_t to_row,
                    int64_t to_frame, float* scratch, const float* zeros) {
  if (g.softmax && s == 0)  // a copy
    return mix_support<float>(g, s, group, from, from_row, frames, from_frame, channels, to, to_row, to_frame,
                              zeros);
  uint32_t* S = reinterpret_cast<uint32_t*>(scratch);
  pair_factors(g.supports + s * g.matrix() + group.begin * g.row, g.row, 1, group.size, g.nodes, S);
  for (int64_t f = 0; f < frames; ++f)
    low_sums(
        {group.size, channels, g.nodes, 1, S, from + f * from_frame, 0, from_row, to + f * to_frame, to_row});
}

// mix_back of all nodes in the same way: from (K, frames, m, channels) to frames of rows `to_row` apart.
inline void mix_low_back(const Graph<float>& g, const uint16_t* from, int64_t frames, int64_t channels,
                         uint16_t* to, int64_t to_row, float* scratch) {
  const int64_t m = g.nodes, frame = m * channels;
  uint32_t *S = reinterpret_cast<uint32_t*>(scratch), *end = S;
  for (int64_t s = 0; s < g.order; ++s) end = pair_factors(g.supports + s * g.matrix(), 1, g.row, m, m, end);
  for (int64_t f = 0; f < frames; ++f)
    low_sums({m, channels, m, g.order, S, from + f * frame, frames * frame, channels, to + f * m * to_row,
              to_row});
}
#endif

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
