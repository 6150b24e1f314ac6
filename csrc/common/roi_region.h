// Where the regions of roi_crop lie, for the CPU and for GPUs: the map from output pixels to sampling points,
// and the cell that a point falls into. Computed in double; docs/operators/roi_crop.md has the formulas.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define AUFAST_EVERYWHERE __host__ __device__
#else
#define AUFAST_EVERYWHERE
#endif

namespace {

struct CropShape {
  int64_t batch, rois, channels, height, width, out_height, out_width;
  bool boxes, align_corners;
  AUFAST_EVERYWHERE int64_t roi_size() const { return boxes ? 4 : 6; }
};

// Half the number of pixels that the normalised interval [-1, 1] spans.
AUFAST_EVERYWHERE inline double half_span(int64_t size, bool align_corners) {
  return 0.5 * static_cast<double>(align_corners ? size - 1 : size);
}

// The normalised coordinate of output pixel u of n is numerator / divisor, kept apart so that round numbers
// stay exact.
AUFAST_EVERYWHERE inline double numerator(int64_t u, int64_t n) {
  return static_cast<double>(2 * u + 1 - n);
}
AUFAST_EVERYWHERE inline double divisor(int64_t n, bool align_corners) {
  return static_cast<double>(align_corners ? (n > 1 ? n - 1 : 1) : n);
}

// ix = xx·x̂ + xy·ŷ + x0 in pixels of the map, iy alike.
struct Region {
  double xx, xy, x0, yx, yy, y0;
  bool finite;
};

// A is the type that the definition computes in.
template <class A, class R>
AUFAST_EVERYWHERE Region read_region(const R* roi, const CropShape& s) {
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
  bool finite = true;
  for (int k = 0; k < 6; ++k) {
    theta[k] = static_cast<A>(roi[k]);
    finite = finite && std::isfinite(theta[k]);
  }
  return {theta[0] * half_w,
          theta[1] * half_w,
          (theta[2] + 1) * half_w + centre,
          theta[3] * half_h,
          theta[4] * half_h,
          (theta[5] + 1) * half_h + centre,
          finite};
}

// One coordinate's cell: NaN and infinity fail the test, and behind it the conversion to an integer is safe.
template <class A>
AUFAST_EVERYWHERE void find_cell(double position, int64_t size, int32_t& lo, int32_t& hi, A& weight_lo,
                                 A& weight_hi) {
  lo = hi = -1;
  weight_lo = weight_hi = 0;
  if (!(position > -1 && position < static_cast<double>(size))) return;
  // Truncation of what is positive is its floor.
  lo = static_cast<int32_t>(static_cast<int64_t>(position + 1) - 1);
  hi = lo + 1;
  weight_lo = static_cast<A>(hi - position);
  weight_hi = static_cast<A>(position - lo);
}

// Of one region: Σ over channels and points of d/dix · (x̂, ŷ, 1), then of d/diy · (x̂, ŷ, 1); here taken to
// the coordinates of the region.
template <class R>
AUFAST_EVERYWHERE void to_roi_gradient(const double* terms, const CropShape& s, R* gradient) {
  const double half_w = half_span(s.width, s.align_corners), half_h = half_span(s.height, s.align_corners);
  if (s.boxes) {
    const double per_w = half_w / s.width, per_h = half_h / s.height;
    gradient[0] = static_cast<R>((terms[2] - terms[0]) * per_w);
    gradient[1] = static_cast<R>((terms[5] - terms[4]) * per_h);
    gradient[2] = static_cast<R>((terms[2] + terms[0]) * per_w);
    gradient[3] = static_cast<R>((terms[5] + terms[4]) * per_h);
  } else {
    for (int k = 0; k < 6; ++k) gradient[k] = static_cast<R>(terms[k] * (k < 3 ? half_w : half_h));
  }
}

}  // namespace
