// Matrix products of the graph kernels, on padded row-major panels. No include guard: read once per level,
// after vec.h.
//
// Every element of C is summed over k in the same order whatever the tile it falls into, so neither the cut
// into tiles nor the number of threads changes a bit of the result.

#if AUFAST_AVX512
constexpr int kRows[] = {
    0, 8, 8, 8, 6, 0, 4};  // rows of a tile of 1, 2, 3, 4, 6 vectors: 24 accumulators of 32 registers
#else
constexpr int kRows[] = {0, 6, 6, 4, 0, 0, 0};  // 12 accumulators in 16 registers
#endif
constexpr int64_t kDepth = 256;  // k-block of a single-segment product: its panel of B stays in L1

// C = start + Σ_s A_s B_s. A_s(r, k) lies at s*a_segment + r*a_row + k*a_step, so that a transposed A needs
// no copy; a row k of B_s at s*b_segment + k*b_row. start may be C itself (accumulate) or a single row
// (start_row = 0). B and C may be stored in bfloat16; sums are of T.
template <class T, class InB = T, class InC = T>
struct Product {
  int64_t rows, columns, depth;  // columns: a multiple of lanes<T>
  int64_t segments;
  const T* A;
  int64_t a_segment, a_row, a_step;
  const InB* B;
  int64_t b_row, b_segment;
  const T* start;
  int64_t start_row;
  InC* C;
  int64_t c_row;
  // The same A times further B: product number f has its B, start and C f steps further on.
  int64_t repeats = 1, b_repeat = 0, start_repeat = 0, c_repeat = 0;
  bool add = false;  // C += the sum, which is taken apart first: long sums in parts are more exact
};

template <int ROWS, int VECTORS, class T, class InB, class InC>
void tile(const Product<T, InB, InC>& p, int64_t row, int64_t column) {
  const int64_t b_row = p.b_row, a_row = p.a_row, a_step = p.a_step, depth = p.depth;
  for (int64_t f = 0; f < p.repeats; ++f) {
    vec<T> sums[ROWS][VECTORS];
    const T* start = p.start + f * p.start_repeat + row * p.start_row + column;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 6
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = load<T>(start + r * p.start_row + v * lanes<T>);
    for (int64_t s = 0; s < p.segments; ++s) {
      const T* a = p.A + s * p.a_segment + row * a_row;
      const InB* b = p.B + f * p.b_repeat + s * p.b_segment + column;
      for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_row) {
        vec<T> right[VECTORS];
#pragma GCC unroll 6
        for (int v = 0; v < VECTORS; ++v) right[v] = load_as(b + v * lanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const vec<T> left = set1<T>(a[r * a_row]);
#pragma GCC unroll 6
          for (int v = 0; v < VECTORS; ++v) sums[r][v] += left * right[v];
        }
      }
    }
    InC* c = p.C + f * p.c_repeat + row * p.c_row + column;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 6
      for (int v = 0; v < VECTORS; ++v) {
        if (p.add) sums[r][v] += load_as(c + r * p.c_row + v * lanes<T>);
        store_as(c + r * p.c_row + v * lanes<T>, sums[r][v]);
      }
  }
}

template <int ROWS, int VECTORS, class AnyProduct>
AUFAST_INLINE void tile_of(const AnyProduct& p, int64_t row, int64_t column) {
  if constexpr (ROWS <= kRows[VECTORS]) tile<ROWS, VECTORS>(p, row, column);
}

// One panel of VECTORS vectors of columns, cut into row blocks of nearly equal height.
template <int VECTORS, class AnyProduct>
void panel(const AnyProduct& p, int64_t column) {
  const int64_t blocks = (p.rows + kRows[VECTORS] - 1) / kRows[VECTORS];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = block * p.rows / blocks, height = (block + 1) * p.rows / blocks - row;
    switch (height) {
      case 1:
        tile_of<1, VECTORS>(p, row, column);
        break;
      case 2:
        tile_of<2, VECTORS>(p, row, column);
        break;
      case 3:
        tile_of<3, VECTORS>(p, row, column);
        break;
      case 4:
        tile_of<4, VECTORS>(p, row, column);
        break;
      case 5:
        tile_of<5, VECTORS>(p, row, column);
        break;
      case 6:
        tile_of<6, VECTORS>(p, row, column);
        break;
      case 7:
        tile_of<7, VECTORS>(p, row, column);
        break;
      default:
        tile_of<8, VECTORS>(p, row, column);
        break;
    }
  }
}

template <class T, class InB, class InC>
void all_panels(const Product<T, InB, InC>& p) {
  int64_t column = 0, left = p.columns / lanes<T>;
  if (AUFAST_AVX512 && p.rows <= kRows[6])
    for (; left >= 6; left -= 6, column += 6 * lanes<T>) panel<6>(p, column);
  if (left > 4 && p.rows <= kRows[3] &&
      p.repeats == 1) {  // one block of rows: go along the columns inside the tile
    Product<T, InB, InC> along = p;
    along.repeats = left % 3 == 1 ? left / 3 - 1 : left / 3;
    along.b_repeat = along.start_repeat = along.c_repeat = 3 * lanes<T>;
    panel<3>(along, column);
    left -= 3 * along.repeats, column += 3 * along.repeats * lanes<T>;
  }
  if (AUFAST_AVX512)  // whole rows of B at once where no panel of three vectors fits
    for (; left >= 4 && left % 3 != 0 && left != 5; left -= 4, column += 4 * lanes<T>) panel<4>(p, column);
  for (; left >= 3 && left != 4; left -= 3, column += 3 * lanes<T>) panel<3>(p, column);
  for (; left >= 2; left -= 2, column += 2 * lanes<T>) panel<2>(p, column);
  if (left == 1) panel<1>(p, column);
}

template <class T, class InB = T, class InC = T>
void multiply(Product<T, InB, InC> p) {
  if (p.rows == 0 || p.columns == 0) return;
  if constexpr (sizeof(InC) != sizeof(T)) {  // a sum is rounded once
    all_panels(p);
  } else {
    if (p.segments > 1 || p.depth <= kDepth) return all_panels(p);
    const int64_t depth = p.depth;
    for (int64_t k = 0; k < depth; k += kDepth) {
      p.depth = depth - k < kDepth ? depth - k : kDepth;
      all_panels(p);
      p.A += kDepth * p.a_step;
      p.B += kDepth * p.b_row;
      p.start = p.C;
      p.start_row = p.c_row;
      p.start_repeat = p.c_repeat;
      p.add = false;
    }
  }
}

#if AUFAST_BF16
// C = start + Σ_s A_s B_s with bfloat16 factors and float sums: `depth` counts pairs of k. A and B hold pairs
// (2k, 2k+1), of every row of A and of every column of B; strides count pairs, and mean what they do in
// Product. C may be stored in bfloat16.
template <class InC = float>
struct PairProduct {
  int64_t rows, columns, depth, segments;
  const uint32_t* A;
  int64_t a_segment, a_row, a_step;
  const uint32_t* B;
  int64_t b_row, b_segment;
  const float* start;
  int64_t start_row;
  InC* C;
  int64_t c_row;
  bool tiles;      // the CPU has matrix tiles and this process may use them
  float* scratch;  // (rows, columns), for tiles where C is bfloat16: they give float
};

// The same with AMX: a tile holds 16 rows of 16 floats or of 16 pairs, so a step of k takes 16 pairs. Tile 0
// is A, 1 is B, and 2 to 7 are C, so that B is loaded once for up to 16 rows.
struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

template <int TILES>
__attribute__((target("amx-tile,amx-bf16"))) void tile_panel(const PairProduct<>& p, int64_t row,
                                                             int64_t column) {
  const float* start = p.start + row * p.start_row + column;
  const int64_t start_bytes = p.start_row * 4, a_bytes = p.a_row * 4, b_bytes = p.b_row * 4,
                c_bytes = p.c_row * 4;
#define AUFAST_EACH_TILE(step)          \
  step(2, 0) if constexpr (TILES > 1) { \
    step(3, 1)                          \
  }                                     \
  if constexpr (TILES > 2) {            \
    step(4, 2)                          \
  }                                     \
  if constexpr (TILES > 3) {            \
    step(5, 3)                          \
  }                                     \
  if constexpr (TILES > 4) {            \
    step(6, 4)                          \
  }                                     \
  if constexpr (TILES > 5) {            \
    step(7, 5)                          \
  }
#define AUFAST_LOAD(tile, n) _tile_loadd(tile, start + n * 16, start_bytes);
  AUFAST_EACH_TILE(AUFAST_LOAD)
  for (int64_t s = 0; s < p.segments; ++s) {
    const uint32_t *a = p.A + s * p.a_segment + row * p.a_row, *b = p.B + s * p.b_segment + column;
    for (int64_t k = 0; k < p.depth; k += 16, a += 16, b += 16 * p.b_row) {
      _tile_loadd(0, a, a_bytes);
#define AUFAST_MULTIPLY(tile, n)       \
  _tile_loadd(1, b + n * 16, b_bytes); \
  _tile_dpbf16ps(tile, 0, 1);
      AUFAST_EACH_TILE(AUFAST_MULTIPLY)
    }
  }
  float* c = p.C + row * p.c_row + column;
#define AUFAST_STORE(tile, n) _tile_stored(tile, c + n * 16, c_bytes);
  AUFAST_EACH_TILE(AUFAST_STORE)
#undef AUFAST_EACH_TILE
#undef AUFAST_LOAD
#undef AUFAST_MULTIPLY
#undef AUFAST_STORE
}

__attribute__((target("amx-tile,amx-bf16"))) inline void multiply_tiles(const PairProduct<>& p) {
  const int64_t blocks = (p.rows + 15) / 16;
  int64_t height = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = block * p.rows / blocks, rows = (block + 1) * p.rows / blocks - row;
    if (rows != height) {
      TileShapes shapes{};
      shapes.palette = 1;
      for (int tile = 0; tile < 8; ++tile)
        shapes.row_bytes[tile] = 64, shapes.rows[tile] = static_cast<uint8_t>(rows);
      shapes.rows[1] = 16;
      _tile_loadconfig(&shapes);
      height = rows;
    }
    int64_t column = 0, left = p.columns / 16;
    for (; left >= 6; left -= 6, column += 96) tile_panel<6>(p, row, column);
    switch (left) {
      case 5:
        tile_panel<5>(p, row, column);
        break;
      case 4:
        tile_panel<4>(p, row, column);
        break;
      case 3:
        tile_panel<3>(p, row, column);
        break;
      case 2:
        tile_panel<2>(p, row, column);
        break;
      case 1:
        tile_panel<1>(p, row, column);
        break;
      default:
        break;
    }
  }
  _tile_release();
}

template <int ROWS, int VECTORS, class InC>
void pair_tile(const PairProduct<InC>& p, int64_t row, int64_t column) {
  __m512 sums[ROWS][VECTORS];
  const float* start = p.start + row * p.start_row + column;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 6
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_loadu_ps(start + r * p.start_row + v * 16);
  const int64_t a_row = p.a_row, a_step = p.a_step, depth = p.depth, b_row = p.b_row;
  for (int64_t s = 0; s < p.segments; ++s) {
    const uint32_t *a = p.A + s * p.a_segment + row * a_row, *b = p.B + s * p.b_segment + column;
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_row) {
      __m512bh right[VECTORS];
#pragma GCC unroll 6
      for (int v = 0; v < VECTORS; ++v) right[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + v * 16));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[r * a_row])));
#pragma GCC unroll 6
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
      }
    }
  }
  InC* c = p.C + row * p.c_row + column;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 6
    for (int v = 0; v < VECTORS; ++v)
      store_as(c + r * p.c_row + v * 16, reinterpret_cast<vec<float>>(sums[r][v]));
}

template <int VECTORS, class InC>
void pair_panel(const PairProduct<InC>& p, int64_t column) {
  constexpr int most = kRows[VECTORS];
  const int64_t blocks = (p.rows + most - 1) / most;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = block * p.rows / blocks;
    switch ((block + 1) * p.rows / blocks - row) {
      case 1:
        pair_tile<1, VECTORS>(p, row, column);
        break;
      case 2:
        pair_tile<2, VECTORS>(p, row, column);
        break;
      case 3:
        pair_tile<3, VECTORS>(p, row, column);
        break;
      case 4:
        pair_tile<4, VECTORS>(p, row, column);
        break;
      case 5:
        pair_tile < most<5 ? 1 : 5, VECTORS>(p, row, column);
        break;
      case 6:
        pair_tile < most<5 ? 1 : 6, VECTORS>(p, row, column);
        break;
      case 7:
        pair_tile < most<5 ? 1 : 7, VECTORS>(p, row, column);
        break;
      default:
        pair_tile < most<5 ? 1 : 8, VECTORS>(p, row, column);
        break;
    }
  }
}

template <class InC = float>
void multiply_pairs(const PairProduct<InC>& p) {
  if (p.rows == 0 || p.columns == 0) return;
  if (p.tiles && p.depth % 16 == 0 && p.a_step == 1) {
    if constexpr (sizeof(InC) == 4) {
      return multiply_tiles(p);
    } else {
      multiply_tiles({p.rows, p.columns, p.depth, p.segments, p.A, p.a_segment, p.a_row, 1, p.B, p.b_row,
                      p.b_segment, p.start, p.start_row, p.scratch, p.columns, true, nullptr});
      for (int64_t r = 0; r < p.rows; ++r)
        for (int64_t k = 0; k < p.columns; k += 16)
          store_bf16(p.C + r * p.c_row + k, load<float>(p.scratch + r * p.columns + k));
      return;
    }
  }
  int64_t column = 0, left = p.columns / 16;
  if (p.rows <= kRows[6])
    for (; left >= 6; left -= 6, column += 96) pair_panel<6>(p, column);
  for (; left >= 3 && left != 4; left -= 3, column += 48) pair_panel<3>(p, column);
  for (; left >= 2; left -= 2, column += 32) pair_panel<2>(p, column);
  if (left == 1) pair_panel<1>(p, column);
}
#endif  // AUFAST_BF16

// C(i, j) += Σ_f Σ_n A_f(i, n) B_f(j, n): rows of `length` elements (a multiple of lanes<T>) in each of
// `frames` frames. A and B may be stored in bfloat16.
template <class T, class InA = T, class InB = T>
struct RowProducts {
  int64_t rows, columns, frames, length;
  const InA* A;
  int64_t a_row, a_frame;
  const InB* B;
  int64_t b_row, b_frame;
  T* C;
  int64_t c_row;
};

#if AUFAST_BF16
// 32 bfloat16 values, or 16 and zeros.
AUFAST_INLINE __m512i load_words(const uint16_t* p, bool whole) {
  return whole ? _mm512_loadu_si512(p)
               : _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#endif

// The sum of each of COUNT vectors; its lanes are added in the order in which sum() adds them.
template <int COUNT, class T>
AUFAST_INLINE void sum_each(const vec<T>* v, T* totals) {
  if constexpr (COUNT % lanes<T> == 0) {
#pragma GCC unroll 8
    for (int k = 0; k < COUNT; k += lanes<T>) {
      vec<T> square[lanes<T>];
#pragma GCC unroll 16
      for (int i = 0; i < lanes<T>; ++i) square[i] = v[k + i];
      transpose<T>(square);
      vec<T> total = square[0];
#pragma GCC unroll 16
      for (int i = 1; i < lanes<T>; ++i) total += square[i];
      store<T>(totals + k, total);
    }
  } else {
    for (int k = 0; k < COUNT; ++k) totals[k] = sum<T>(v[k]);
  }
}

template <int ROWS, int COLUMNS, class T, class InA, class InB>
void dot_tile(const RowProducts<T, InA, InB>& p, int64_t i0, int64_t j0, int64_t begin, int64_t end) {
  vec<T> sums[ROWS][COLUMNS] = {};
  for (int64_t f = 0; f < p.frames; ++f) {
    const InA* a = p.A + f * p.a_frame + i0 * p.a_row;
    const InB* b = p.B + f * p.b_frame + j0 * p.b_row;
#if AUFAST_BF16
    if constexpr (sizeof(InA) == 2 && sizeof(InB) == 2) {
      for (int64_t n = begin; n < end; n += 2 * lanes<T>) {
        const bool whole = n + 2 * lanes<T> <= end;
        __m512bh right[COLUMNS];
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; ++j)
          right[j] = reinterpret_cast<__m512bh>(load_words(b + j * p.b_row + n, whole));
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
          const __m512bh left = reinterpret_cast<__m512bh>(load_words(a + i * p.a_row + n, whole));
#pragma GCC unroll 4
          for (int j = 0; j < COLUMNS; ++j)
            sums[i][j] = reinterpret_cast<vec<T>>(
                _mm512_dpbf16_ps(reinterpret_cast<__m512>(sums[i][j]), left, right[j]));
        }
      }
      continue;
    }
#endif
    for (int64_t n = begin; n < end; n += lanes<T>) {
      vec<T> right[COLUMNS];
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) right[j] = load_as(b + j * p.b_row + n);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        const vec<T> left = load_as(a + i * p.a_row + n);
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; ++j) sums[i][j] += left * right[j];
      }
    }
  }
  T totals[ROWS * COLUMNS];
  sum_each<ROWS * COLUMNS, T>(&sums[0][0], totals);
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) p.C[(i0 + i) * p.c_row + j0 + j] += totals[i * COLUMNS + j];
}

template <int ROWS, class AnyProducts>
void dot_rows(const AnyProducts& p, int64_t i, int64_t begin, int64_t end) {
  int64_t j = 0;
  for (; j + 4 <= p.columns; j += 4) dot_tile<ROWS, 4>(p, i, j, begin, end);
  for (; j < p.columns; ++j) dot_tile<ROWS, 1>(p, i, j, begin, end);
}

constexpr int64_t kDotBlock =
    2048;  // elements of a row that stay in cache while all pairs of rows are visited

template <class T, class InA = T, class InB = T>
void dot_products(RowProducts<T, InA, InB> p) {
  if (p.length == 0) return;
  const int64_t all = p.frames, per_block = p.length < kDotBlock ? kDotBlock / p.length : 1;
  for (int64_t f = 0; f < all; f += per_block) {
    p.frames = all - f < per_block ? all - f : per_block;
    for (int64_t begin = 0; begin < p.length; begin += kDotBlock) {
      const int64_t end = p.length - begin < kDotBlock ? p.length : begin + kDotBlock;
      int64_t i = 0;
      for (; i + 4 <= p.rows; i += 4) dot_rows<4>(p, i, begin, end);
      for (; i < p.rows; ++i) dot_rows<1>(p, i, begin, end);
    }
    p.A += per_block * p.a_frame;
    p.B += per_block * p.b_frame;
  }
}
