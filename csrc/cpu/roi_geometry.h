// Where the regions of roi_crop lie: for every ROI of a call the taps of its output points, computed once, in
// double, and shared by all channels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

struct Shape {
  int64_t batch, rois, channels, height, width, out_height, out_width;
  bool boxes, align_corners;
  int64_t roi_size() const { return boxes ? 4 : 6; }
};

// The taps of one ROI. Indices are map pixels, -1 or the map's size where outside. Separable: one entry per
// output column and per output row, else one per output point in both. Normalised coordinates are
// affine_grid's, per column and row.
template <class A>
struct Taps {
  const int32_t *x_lo, *x_hi, *y_lo, *y_hi;
  const A *x_weight_lo, *x_weight_hi, *y_weight_lo, *y_weight_hi, *normal_x, *normal_y;
  int64_t columns, rows;  // entries
  bool finite, separable;
};

// Half the number of pixels that the normalised interval [-1, 1] spans.
double half_span(int64_t size, bool align_corners) {
  return 0.5 * static_cast<double>(align_corners ? size - 1 : size);
}

// ix = xx·x̂ + xy·ŷ + x0 in pixels of the map, iy alike.
struct Region {
  double xx, xy, x0, yx, yy, y0;
  bool finite;
};

template <class A, class R>
Region read_region(const R* roi, const Shape& s) {
  const double half_w = half_span(s.width, s.align_corners), half_h = half_span(s.height, s.align_corners);
  const double centre = s.align_corners ? 0.0 : -0.5;
  if (s.boxes) {
    const A a[4] = {static_cast<A>(roi[0]), static_cast<A>(roi[1]), static_cast<A>(roi[2]),
                    static_cast<A>(roi[3])};
    const double x1 = a[0], y1 = a[1], x2 = a[2], y2 = a[3], per_w = half_w / s.width,
                 per_h = half_h / s.height;
    // The definition judges the affine matrix, in the type it computes in: a box may overflow there.
    const bool finite = std::isfinite(a[2] - a[0]) && std::isfinite(a[0] + a[2]) &&
                        std::isfinite(a[3] - a[1]) && std::isfinite(a[1] + a[3]);
    return {(x2 - x1) * per_w,          0,     (x1 + x2) * per_w + centre, 0, (y2 - y1) * per_h,
            (y1 + y2) * per_h + centre, finite};
  }
  double theta[6];
  for (int k = 0; k < 6; ++k) theta[k] = static_cast<A>(roi[k]);
  return {theta[0] * half_w,
          theta[1] * half_w,
          (theta[2] + 1) * half_w + centre,
          theta[3] * half_h,
          theta[4] * half_h,
          (theta[5] + 1) * half_h + centre,
          std::all_of(theta, theta + 6, [](double value) { return std::isfinite(value); })};
}

// One coordinate's cell: NaN and infinity fail the test, and behind it the conversion to an integer is safe.
template <class A>
void find_cell(double position, int64_t size, int32_t& lo, int32_t& hi, A& weight_lo, A& weight_hi) {
  lo = hi = -1;
  weight_lo = weight_hi = 0;
  if (!(position > -1 && position < static_cast<double>(size))) return;
  // Truncation of what is positive is its floor.
  lo = static_cast<int32_t>(static_cast<int64_t>(position + 1) - 1);
  hi = lo + 1;
  weight_lo = static_cast<A>(hi - position);
  weight_hi = static_cast<A>(position - lo);
}

// The taps of some ROIs of one image.
template <class A>
class Geometry {
 public:
  explicit Geometry(const Shape& s)
      : shape_(s),
        columns_(s.boxes ? s.out_width : s.out_width * s.out_height),
        rows_(s.boxes ? s.out_height : columns_),
        normal_(s.out_width + s.out_height) {
    for (int64_t u = 0; u < s.out_width; ++u) {
      normal_[u] = static_cast<A>(numerator(u, s.out_width) / divisor(s.out_width));
    }
    for (int64_t v = 0; v < s.out_height; ++v) {
      normal_[s.out_width + v] = static_cast<A>(numerator(v, s.out_height) / divisor(s.out_height));
    }
  }

  template <class R>
  void place(const R* rois, int64_t count) {
    index_.resize(count * entries());
    weight_.resize(count * entries());
    finite_.resize(count);
    separable_.resize(count);
    for (int64_t n = 0; n < count; ++n) place(n, read_region<A>(rois + n * shape_.roi_size(), shape_));
  }

  // Of all taps of one ROI.
  int64_t entries() const { return 2 * (columns_ + rows_); }

  Taps<A> operator[](int64_t n) const {
    const int32_t* index = index_.data() + n * entries();
    const A* weight = weight_.data() + n * entries();
    return {index,
            index + columns_,
            index + 2 * columns_,
            index + 2 * columns_ + rows_,
            weight,
            weight + columns_,
            weight + 2 * columns_,
            weight + 2 * columns_ + rows_,
            normal_.data(),
            normal_.data() + shape_.out_width,
            separable_[n] ? shape_.out_width : columns_,
            separable_[n] ? shape_.out_height : rows_,
            finite_[n] != 0,
            separable_[n] != 0};
  }

 private:
  // Normalised coordinate of output pixel u of n times a divisor, kept apart so that round numbers stay
  // exact.
  static double numerator(int64_t u, int64_t n) { return static_cast<double>(2 * u + 1 - n); }
  double divisor(int64_t n) const {
    return static_cast<double>(shape_.align_corners ? std::max<int64_t>(n - 1, 1) : n);
  }

  void place(int64_t n, const Region& r) {
    const Shape& s = shape_;
    finite_[n] = r.finite;
    separable_[n] = r.xy == 0 && r.yx == 0;
    if (!r.finite) return;
    int32_t* index = index_.data() + n * entries();
    A* weight = weight_.data() + n * entries();
    const auto column = [&](int64_t k, double x) {
      find_cell(x, s.width, index[k], index[columns_ + k], weight[k], weight[columns_ + k]);
    };
    const auto row = [&](int64_t k, double y) {
      const int64_t lo = 2 * columns_ + k, hi = lo + rows_;
      find_cell(y, s.height, index[lo], index[hi], weight[lo], weight[hi]);
    };
    const double by_x = divisor(s.out_width), by_y = divisor(s.out_height);
    if (separable_[n]) {
      for (int64_t u = 0; u < s.out_width; ++u) column(u, r.xx * numerator(u, s.out_width) / by_x + r.x0);
      for (int64_t v = 0; v < s.out_height; ++v) row(v, r.yy * numerator(v, s.out_height) / by_y + r.y0);
      return;
    }
    for (int64_t v = 0; v < s.out_height; ++v) {
      for (int64_t u = 0; u < s.out_width; ++u) {
        const double x = numerator(u, s.out_width), y = numerator(v, s.out_height);
        column(v * s.out_width + u, r.xx * x / by_x + r.xy * y / by_y + r.x0);
        row(v * s.out_width + u, r.yx * x / by_x + r.yy * y / by_y + r.y0);
      }
    }
  }

  const Shape& shape_;
  int64_t columns_, rows_;
  std::vector<int32_t> index_;
  std::vector<A> weight_, normal_;
  std::vector<uint8_t> finite_, separable_;
};

}  // namespace
