// Winograd's minimal filtering F(2×2, 3×3): four results of nine taps by 16 products in the place of 36. No
// include guard: read once per level, after vec.h.
//
// Along one axis, two results of a filter of three taps take four products: with pixels d, taps g, results y,
//
//   v = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)    u = (g0, (g0 + g1 + g2)/2, (g0 - g1 + g2)/2, g2)
//   m = u v                                     y = (m0 + m1 + m2, m1 - m2 - m3)
//
// Along both, four results take sixteen, called points. The gradient of the filters takes the transposes of
// the last two maps, for results and for taps.

constexpr int kPoints = 16;

// Each takes elements `step` apart and gives elements `step` apart.
struct PixelsToPoints {
  static constexpr int kFrom = 4, kTo = 4;
  template <class V>
  static AUFAST_INLINE void line(const V* d, V* v, int step, int to) {
    v[0] = d[0] - d[2 * step], v[to] = d[step] + d[2 * step];
    v[2 * to] = d[2 * step] - d[step], v[3 * to] = d[step] - d[3 * step];
  }
};
struct TapsToPoints {
  static constexpr int kFrom = 3, kTo = 4;
  template <class V>
  static AUFAST_INLINE void line(const V* g, V* u, int step, int to) {
    const V outer = g[0] + g[2 * step];
    u[0] = g[0], u[to] = (outer + g[step]) / 2, u[2 * to] = (outer - g[step]) / 2, u[3 * to] = g[2 * step];
  }
};
struct PointsToTaps {
  static constexpr int kFrom = 4, kTo = 3;
  template <class V>
  static AUFAST_INLINE void line(const V* u, V* g, int step, int to) {
    const V half = (u[step] + u[2 * step]) / 2;
    g[0] = u[0] + half, g[to] = (u[step] - u[2 * step]) / 2, g[2 * to] = half + u[3 * step];
  }
};
struct PointsToResults {
  static constexpr int kFrom = 4, kTo = 2;
  template <class V>
  static AUFAST_INLINE void line(const V* m, V* y, int step, int to) {
    const V middle = m[step] - m[2 * step];
    y[0] = m[0] + (m[step] + m[2 * step]), y[to] = middle - m[3 * step];
  }
};
struct ResultsToPoints {
  static constexpr int kFrom = 2, kTo = 4;
  template <class V>
  static AUFAST_INLINE void line(const V* y, V* m, int step, int to) {
    m[0] = y[0], m[to] = y[0] + y[step], m[2 * to] = y[0] - y[step], m[3 * to] = -y[step];
  }
};

// Along columns, then along rows.
template <class Map, class V>
AUFAST_INLINE void both_axes(const V* from, V* to) {
  V half[Map::kTo * Map::kFrom];
#pragma GCC unroll 4
  for (int x = 0; x < Map::kFrom; ++x) Map::line(from + x, half + x, Map::kFrom, Map::kFrom);
#pragma GCC unroll 4
  for (int y = 0; y < Map::kTo; ++y) Map::line(half + y * Map::kFrom, to + y * Map::kTo, 1, 1);
}
