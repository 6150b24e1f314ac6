// Supports, node matrices and their gradients. No include guard: read once per level, after vec.h, gemm.h and crew.h.

template <class T>
AUFAST_INLINE void copy_row(T* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes<T>) store<T>(to + i, load<T>(from + i));
}
template <class T>
AUFAST_INLINE void zero_row(T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes<T>) store<T>(to + i, vec<T>{});
}

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

// to_g[r] = Σ_j S(g, j) from[j] for the nodes of a group and one frame `from` (m, channels). Transposed takes S(j, g).
template <class T>
AUFAST_INLINE void mix(const T* S, int64_t s_row, bool transposed, Group group, int64_t nodes, const T* from,
                       int64_t channels, const T* start, int64_t start_row, T* to, int64_t to_row) {
  multiply<T>({group.size, channels, nodes, 1, S + group.begin * (transposed ? 1 : s_row), 0, transposed ? 1 : s_row,
               transposed ? s_row : 1, from, channels, 0, start, start_row, to, to_row});
}

// to_s[g] = Σ_j S_s(g, j) from[j] for a group and one frame. With softmax S_0 is the identity: a copy.
template <class T>
AUFAST_INLINE void mix_support(const Graph<T>& g, int64_t s, Group group, const T* from, int64_t channels, T* to,
                               int64_t to_row, const T* zeros) {
  if (!g.softmax || s > 0)
    return mix<T>(g.supports + s * g.matrix(), g.row, false, group, g.nodes, from, channels, zeros, 0, to, to_row);
  for (int64_t i = 0; i < group.size; ++i) copy_row(to + i * to_row, from + (group.begin + i) * channels, channels);
}

// The transposed mix of a group over all supports: to[g] = start + Σ_s Σ_i S_s(i, g) from_s[i].
template <class T>
AUFAST_INLINE void mix_back(const Graph<T>& g, Group group, const T* from, int64_t from_segment, int64_t channels,
                            const T* start, int64_t start_row, T* to, int64_t to_row) {
  multiply<T>({group.size, channels, g.nodes, g.order, g.supports + group.begin, g.matrix(), 1, g.row, from, channels,
               from_segment, start, start_row, to, to_row});
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
    multiply<T>({group.size, row, g.embeddings, 1, g.U + group.begin * g.embeddings, 0, g.embeddings, 1, g.transposed_U,
                 row, 0, zeros, 0, g.similarity + group.begin * row, row});
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
        for (int64_t j = 0; j < row; j += lanes<T>) store<T>(A + j, vexp<T>(load<T>(R + j) - set1<T>(largest)));
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
      dot_products<T>({group.size, m, 1, row, grad + group.begin * row, row, 0, g.supports + (k - 1) * matrix, row, 0,
                       g.grad_similarity + group.begin * row, row});
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

// Θ_i = Σ_e Q_ie W_e, node groups outermost so that a node's matrices are made by the thread that will use them.
template <class T, class Team>
void make_thetas(const Thetas<T>& t, Team& team, int64_t members, const T* zeros) {
  const Groups groups(t.distinct, members, kMostNodes);
  const int64_t blocks = t.blocks();
  team.phase(groups.count * blocks, [&](int64_t item) {
    const Group group = groups[item / blocks];
    const PoolBlock b = pool_block(t, item % blocks);
    const Pool<T>& pool = t.pool[b.pool];
    multiply<T>({group.size, b.rows * t.columns, t.embeddings, 1, t.Q + group.begin * t.embeddings, 0, t.embeddings, 1,
                 pool.weights + b.begin * t.columns, pool.rows * t.columns, 0, zeros, 0,
                 t.theta + group.begin * t.block + pool.theta + b.begin * t.columns, t.block});
  });
}

// grad W_e = Σ_i Q_ie grad Θ_i and grad Q_ie = ⟨grad Θ_i, W_e⟩, both in one pass over grad Θ.
template <class T, class Team>
void thetas_backward(const Thetas<T>& t, Team& team, const T* zeros) {
  const int64_t blocks = t.blocks(), m = t.nodes, ce = t.embeddings;
  team.phase(blocks, [&](int64_t item) {
    const PoolBlock b = pool_block(t, item);
    const Pool<T>& pool = t.pool[b.pool];
    const int64_t length = b.rows * t.columns, pool_size = pool.rows * t.columns, offset = b.begin * t.columns;
    const T* grad_theta = t.grad_theta + pool.theta + offset;
    if (pool.grad != nullptr)
      multiply<T>({ce, length, m, 1, t.Q, 0, 1, ce, grad_theta, t.block, 0, zeros, 0, pool.grad + offset, pool_size});
    if (t.grad_Q == nullptr) return;
    T* partial = t.partial_Q + item * m * ce;
    for (int64_t i = 0; i < m * ce; ++i) partial[i] = 0;
    dot_products<T>({m, ce, 1, length, grad_theta, t.block, 0, pool.weights + offset, pool_size, 0, partial, ce});
  });
  if (t.grad_Q == nullptr) return;
  team.phase(m, [&](int64_t i) {
    for (int64_t e = 0; e < ce; ++e) {
      T total = 0;
      for (int64_t block = 0; block < blocks; ++block) total += t.partial_Q[(block * m + i) * ce + e];
      t.grad_Q[i * ce + e] = total;
    }
  });
}

// The Θᵀ of a group, for one block of columns.
template <class T>
void transpose_block(const TransposedPool<T>& pool, const T* Q, int64_t embeddings, Group group, int64_t item, T* theta,
                     T* scratch, const T* zeros) {
  const int64_t column_blocks = pool.blocks() / pool.segments, segment = item / column_blocks;
  const int64_t begin = item % column_blocks * kTransposed, row = pool.row(), rows = pool.first + pool.second;
  const int64_t left = pool.live - begin, width = left < kTransposed ? left : kTransposed;
  for (int64_t e = 0; e < embeddings; ++e) {
    T* to = scratch + e * kTransposed * row;
    for (int64_t i = 0; i < width * row; i += lanes<T>) store<T>(to + i, vec<T>{});
    const T* from = pool.weights + (e * pool.segments + segment) * rows * pool.columns + begin;
    for (int64_t r = 0; r < rows; ++r, from += pool.columns) {
      T* column = to + (r < pool.first ? r : padded<T>(pool.first) + r - pool.first);
      for (int64_t n = 0; n < width; ++n) column[n * row] = from[n];
    }
  }
  multiply<T>({group.size, width * row, embeddings, 1, Q + group.begin * embeddings, 0, embeddings, 1, scratch,
               kTransposed * row, 0, zeros, 0,
               theta + group.begin * pool.block + pool.theta + (segment * pool.live + begin) * row, pool.block});
}
