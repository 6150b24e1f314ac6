// Matrix products of the graph kernels, on padded row-major panels. No include guard: read once per level, after vec.h.
//
// Every element of C is summed over k in the same order whatever the tile it falls into, so neither the cut into tiles nor
// the number of threads changes a bit of the result.

#if AUFAST_AVX512
constexpr int kRows[] = {0, 8, 8, 8, 0, 0, 4};  // rows of a tile of 1, 2, 3, 6 vectors: 24 accumulators in 32 registers
#else
constexpr int kRows[] = {0, 6, 6, 4, 0, 0, 0};  // 12 accumulators in 16 registers
#endif
constexpr int64_t kDepth = 256;  // k-block of a single-segment product: its panel of B stays in L1

// C = start + Σ_s A_s B_s. A_s(r, k) lies at s*a_segment + r*a_row + k*a_step, so that a transposed A needs no copy; a row k of
// B_s at s*b_segment + k*b_row. start may be C itself (accumulate) or a single row (start_row = 0).
template <class T>
struct Product {
  int64_t rows, columns, depth;  // columns: a multiple of lanes<T>
  int64_t segments;
  const T* A;
  int64_t a_segment, a_row, a_step;
  const T* B;
  int64_t b_row, b_segment;
  const T* start;
  int64_t start_row;
  T* C;
  int64_t c_row;
};

template <class T, int ROWS, int VECTORS>
void tile(const Product<T>& p, int64_t row, int64_t column) {
  vec<T> sums[ROWS][VECTORS];
  const T* start = p.start + row * p.start_row + column;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 6
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = load<T>(start + r * p.start_row + v * lanes<T>);
  const int64_t b_row = p.b_row, a_row = p.a_row, a_step = p.a_step, depth = p.depth;
  for (int64_t s = 0; s < p.segments; ++s) {
    const T* a = p.A + s * p.a_segment + row * a_row;
    const T* b = p.B + s * p.b_segment + column;
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_row) {
      vec<T> right[VECTORS];
#pragma GCC unroll 6
      for (int v = 0; v < VECTORS; ++v) right[v] = load<T>(b + v * lanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const vec<T> left = set1<T>(a[r * a_row]);
#pragma GCC unroll 6
        for (int v = 0; v < VECTORS; ++v) sums[r][v] += left * right[v];
      }
    }
  }
  T* c = p.C + row * p.c_row + column;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 6
    for (int v = 0; v < VECTORS; ++v) store<T>(c + r * p.c_row + v * lanes<T>, sums[r][v]);
}

template <class T, int ROWS, int VECTORS>
AUFAST_INLINE void tile_of(const Product<T>& p, int64_t row, int64_t column) {
  if constexpr (ROWS <= kRows[VECTORS]) tile<T, ROWS, VECTORS>(p, row, column);
}

// One panel of VECTORS vectors of columns, cut into row blocks of nearly equal height.
template <class T, int VECTORS>
void panel(const Product<T>& p, int64_t column) {
  const int64_t blocks = (p.rows + kRows[VECTORS] - 1) / kRows[VECTORS];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = block * p.rows / blocks, height = (block + 1) * p.rows / blocks - row;
    switch (height) {
      case 1: tile_of<T, 1, VECTORS>(p, row, column); break;
      case 2: tile_of<T, 2, VECTORS>(p, row, column); break;
      case 3: tile_of<T, 3, VECTORS>(p, row, column); break;
      case 4: tile_of<T, 4, VECTORS>(p, row, column); break;
      case 5: tile_of<T, 5, VECTORS>(p, row, column); break;
      case 6: tile_of<T, 6, VECTORS>(p, row, column); break;
      case 7: tile_of<T, 7, VECTORS>(p, row, column); break;
      default: tile_of<T, 8, VECTORS>(p, row, column); break;
    }
  }
}

template <class T>
void all_panels(const Product<T>& p) {
  int64_t column = 0, left = p.columns / lanes<T>;
  if (AUFAST_AVX512 && p.rows <= kRows[6])
    for (; left >= 6; left -= 6, column += 6 * lanes<T>) panel<T, 6>(p, column);
  for (; left >= 3 && left != 4; left -= 3, column += 3 * lanes<T>) panel<T, 3>(p, column);
  for (; left >= 2; left -= 2, column += 2 * lanes<T>) panel<T, 2>(p, column);
  if (left == 1) panel<T, 1>(p, column);
}

template <class T>
void multiply(Product<T> p) {
  if (p.rows == 0 || p.columns == 0) return;
  if (p.segments > 1 || p.depth <= kDepth) return all_panels(p);
  const int64_t depth = p.depth;
  for (int64_t k = 0; k < depth; k += kDepth) {
    p.depth = depth - k < kDepth ? depth - k : kDepth;
    all_panels(p);
    p.A += kDepth * p.a_step;
    p.B += kDepth * p.b_row;
    p.start = p.C;
    p.start_row = p.c_row;
  }
}

// C(i, j) += Σ_f Σ_n A_f(i, n) B_f(j, n): rows of `length` elements (a multiple of lanes<T>) in each of `frames` frames.
template <class T>
struct RowProducts {
  int64_t rows, columns, frames, length;
  const T* A;
  int64_t a_row, a_frame;
  const T* B;
  int64_t b_row, b_frame;
  T* C;
  int64_t c_row;
};

template <class T, int ROWS, int COLUMNS>
void dot_tile(const RowProducts<T>& p, int64_t i0, int64_t j0, int64_t begin, int64_t end) {
  vec<T> sums[ROWS][COLUMNS] = {};
  for (int64_t f = 0; f < p.frames; ++f) {
    const T *a = p.A + f * p.a_frame + i0 * p.a_row, *b = p.B + f * p.b_frame + j0 * p.b_row;
    for (int64_t n = begin; n < end; n += lanes<T>) {
      vec<T> right[COLUMNS];
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) right[j] = load<T>(b + j * p.b_row + n);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        const vec<T> left = load<T>(a + i * p.a_row + n);
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; ++j) sums[i][j] += left * right[j];
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) p.C[(i0 + i) * p.c_row + j0 + j] += sum<T>(sums[i][j]);
}

template <class T, int ROWS>
void dot_rows(const RowProducts<T>& p, int64_t i, int64_t begin, int64_t end) {
  int64_t j = 0;
  for (; j + 4 <= p.columns; j += 4) dot_tile<T, ROWS, 4>(p, i, j, begin, end);
  for (; j < p.columns; ++j) dot_tile<T, ROWS, 1>(p, i, j, begin, end);
}

constexpr int64_t kDotBlock = 2048;  // elements of a row that stay in cache while all pairs of rows are visited

template <class T>
void dot_products(RowProducts<T> p) {
  if (p.length == 0) return;
  const int64_t all = p.frames, per_block = p.length < kDotBlock ? kDotBlock / p.length : 1;
  for (int64_t f = 0; f < all; f += per_block) {
    p.frames = all - f < per_block ? all - f : per_block;
    for (int64_t begin = 0; begin < p.length; begin += kDotBlock) {
      const int64_t end = p.length - begin < kDotBlock ? p.length : begin + kDotBlock;
      int64_t i = 0;
      for (; i + 4 <= p.rows; i += 4) dot_rows<T, 4>(p, i, begin, end);
      for (; i < p.rows; ++i) dot_rows<T, 1>(p, i, begin, end);
    }
    p.A += per_block * p.a_frame;
    p.B += per_block * p.b_frame;
  }
}
