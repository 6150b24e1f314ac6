// Where the regions of roi_crop lie: for every ROI of a call the taps of its output points, computed once, in
// double, and shared by all channels.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/roi_region.h"

namespace {

using Shape = CropShape;

// The taps of one ROI. Indices are map pixels, -1 or the map's size where outside. Of a box one entry per
// output column and per output row, of a matrix one per output point in both. Normalised coordinates are
// affine_grid's, per column and row.
template <class A>
struct Taps {
  const int32_t *x_lo, *x_hi, *y_lo, *y_hi;
  const A *x_weight_lo, *x_weight_hi, *y_weight_lo, *y_weight_hi, *normal_x, *normal_y;
  int64_t columns, rows;  // entries
  bool finite;
};

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
      normal_[u] = static_cast<A>(numerator(u, s.out_width) / divisor(s.out_width, s.align_corners));
    }
    for (int64_t v = 0; v < s.out_height; ++v) {
      normal_[s.out_width + v] =
          static_cast<A>(numerator(v, s.out_height) / divisor(s.out_height, s.align_corners));
    }
  }

  template <class R>
  void place(const R* rois, int64_t count) {
    index_.resize(count * entries());
    weight_.resize(count * entries());
    finite_.resize(count);
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
            columns_,
            rows_,
            finite_[n] != 0};
  }

 private:
  void place(int64_t n, const Region& r) {
    const Shape& s = shape_;
    finite_[n] = r.finite;
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
    const double by_x = divisor(s.out_width, s.align_corners), by_y = divisor(s.out_height, s.align_corners);
    if (s.boxes) {
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
  std::vector<uint8_t> finite_;
};

}  // namespace
