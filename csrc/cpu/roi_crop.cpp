// Multi-ROI affine crop-and-resize on the CPU: affine_grid + bilinear grid_sample with zeros outside, and its gradients.
//
// Geometry is computed once per ROI, in double, and shared by all channels. A work item is one image and one tile of
// channels: it alone writes its part of the output (forward) or of the feature gradient (backward), so nothing is
// atomic and the result does not depend on the number of threads. docs/operators/roi_crop.md derives the backward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChannelTile = 32;
constexpr int kWantFeatures = 1, kWantRois = 2;

template <class T>
using accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Shape {
  int64_t batch, rois, channels, height, width, out_height, out_width;
  bool boxes, align_corners;
};

// ix = xx * x̂ + xy * ŷ + x0 in pixels of the map (iy alike), x̂ and ŷ the normalised output coordinates of affine_grid.
struct Region {
  double xx, xy, x0, yx, yy, y0;
  bool finite;
};

// Half the number of pixels that the normalised interval [-1, 1] spans.
double half_span(int64_t size, bool align_corners) { return 0.5 * static_cast<double>(align_corners ? size - 1 : size); }

template <class A, class R>
Region read_region(const R* roi, const Shape& s) {
  const double half_w = half_span(s.width, s.align_corners), half_h = half_span(s.height, s.align_corners);
  const double centre = s.align_corners ? 0.0 : -0.5;
  Region r{};
  A theta[6] = {static_cast<A>(roi[0]), static_cast<A>(roi[1]), static_cast<A>(roi[2]), static_cast<A>(roi[3])};
  if (s.boxes) {
    const double x1 = theta[0], y1 = theta[1], x2 = theta[2], y2 = theta[3];
    const double per_w = half_w / s.width, per_h = half_h / s.height;
    r = {(x2 - x1) * per_w, 0, (x1 + x2) * per_w + centre, 0, (y2 - y1) * per_h, (y1 + y2) * per_h + centre, true};
    // The definition judges the affine matrix, in the type it computes in: a box may overflow there.
    r.finite = std::isfinite(theta[2] - theta[0]) && std::isfinite(theta[0] + theta[2]) &&
               std::isfinite(theta[3] - theta[1]) && std::isfinite(theta[1] + theta[3]);
  } else {
    theta[4] = static_cast<A>(roi[4]);
    theta[5] = static_cast<A>(roi[5]);
    r = {theta[0] * half_w, theta[1] * half_w, (theta[2] + 1.0) * half_w + centre,
         theta[3] * half_h, theta[4] * half_h, (theta[5] + 1.0) * half_h + centre, true};
    r.finite = std::all_of(theta, theta + 6, [](A value) { return std::isfinite(value); });
  }
  return r;
}

// Normalised coordinate of output pixel u of n, times `divisor`: kept apart so that round numbers stay exact.
double numerator(int64_t u, int64_t n) { return static_cast<double>(2 * u + 1 - n); }
double divisor(int64_t n, bool align_corners) { return static_cast<double>(align_corners ? std::max<int64_t>(n - 1, 1) : n); }

// One sampling point: its cell, the position inside the cell, and which of the four corners lie on the map.
template <class A>
struct Point {
  int64_t offset[4];  // of the north-west, north-east, south-west and south-east corner, in pixels
  bool inside[4];
  A tx, ty;
  A normal_x, normal_y;  // x̂, ŷ
};

template <class A>
void sample_points(const Region& r, const Shape& s, Point<A>* points) {
  const double div_x = divisor(s.out_width, s.align_corners), div_y = divisor(s.out_height, s.align_corners);
  for (int64_t v = 0; v < s.out_height; ++v) {
    for (int64_t u = 0; u < s.out_width; ++u) {
      const double nx = numerator(u, s.out_width), ny = numerator(v, s.out_height);
      const double ix = r.xx * nx / div_x + r.xy * ny / div_y + r.x0;
      const double iy = r.yx * nx / div_x + r.yy * ny / div_y + r.y0;
      Point<A>& p = *points++;
      p = {};
      p.normal_x = static_cast<A>(nx / div_x);
      p.normal_y = static_cast<A>(ny / div_y);
      // Written so that NaN fails it; inside, the conversion to an integer is safe.
      if (!(ix > -1 && ix < s.width && iy > -1 && iy < s.height)) continue;
      const double west = std::floor(ix), north = std::floor(iy);
      p.tx = static_cast<A>(ix - west);
      p.ty = static_cast<A>(iy - north);
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t x = static_cast<int64_t>(west) + corner % 2, y = static_cast<int64_t>(north) + corner / 2;
        p.inside[corner] = x >= 0 && x < s.width && y >= 0 && y < s.height;
        p.offset[corner] = p.inside[corner] ? y * s.width + x : 0;
      }
    }
  }
}

template <class A>
void corner_weights(const Point<A>& p, A (&weight)[4]) {
  weight[0] = (1 - p.tx) * (1 - p.ty);
  weight[1] = p.tx * (1 - p.ty);
  weight[2] = (1 - p.tx) * p.ty;
  weight[3] = p.tx * p.ty;
}

// Strides in elements: of a channel and a pixel of the map, and of a channel and a pixel of one crop.
struct Strides {
  int64_t channel, pixel, crop_channel, crop_pixel;
};

Strides strides_of(const Shape& s, bool channels_last) {
  if (channels_last) return {1, s.channels, 1, s.channels};
  return {s.height * s.width, 1, s.out_height * s.out_width, 1};
}

// Calls body(image, first channel, last channel) for every tile, in parallel; tiles do not depend on the thread count.
template <class Body>
void for_each_tile(const Shape& s, const Body& body) {
  const int64_t tiles = (s.channels + kChannelTile - 1) / kChannelTile;
  torch::stable::parallel_for(0, s.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % tiles * kChannelTile;
      body(item / tiles, first, std::min(first + kChannelTile, s.channels));
    }
  });
}

template <class T, class R>
void forward(const T* features, const R* rois, T* out, const Shape& s, const Strides& d) {
  using A = accumulator<T>;
  const int64_t map = s.height * s.width, points_per_roi = s.out_height * s.out_width;
  for_each_tile(s, [&](int64_t b, int64_t first, int64_t last) {
    std::vector<Point<A>> points(points_per_roi);
    const T* image = features + b * s.channels * map;
    for (int64_t n = 0; n < s.rois; ++n) {
      const int64_t index = b * s.rois + n;
      T* crop = out + index * s.channels * points_per_roi;
      const Region region = read_region<A>(rois + index * (s.boxes ? 4 : 6), s);
      if (region.finite) sample_points(region, s, points.data());
      for (int64_t c = first; c < last; ++c) {
        for (int64_t i = 0; i < points_per_roi; ++i) {
          A value = region.finite ? A(0) : std::numeric_limits<A>::quiet_NaN();
          A weight[4];
          corner_weights(points[i], weight);
          for (int corner = 0; region.finite && corner < 4; ++corner) {
            if (points[i].inside[corner])
              value += weight[corner] * static_cast<A>(image[c * d.channel + points[i].offset[corner] * d.pixel]);
          }
          crop[c * d.crop_channel + i * d.crop_pixel] = static_cast<T>(value);
        }
      }
    }
  });
}

// Per ROI and channel tile: the sums over channels and points of d/d(xx, xy, x0, yx, yy, y0).
constexpr int kRegionTerms = 6;

template <class T, class R>
void backward(const T* grad, const T* features, const R* rois, T* grad_features, double* partial, const Shape& s,
              const Strides& d) {
  using A = accumulator<T>;
  const int64_t map = s.height * s.width, points_per_roi = s.out_height * s.out_width;
  const int64_t tiles = (s.channels + kChannelTile - 1) / kChannelTile;
  for_each_tile(s, [&](int64_t b, int64_t first, int64_t last) {
    std::vector<Point<A>> points(points_per_roi);
    std::vector<A> sum(grad_features ? (last - first) * map : 0);
    const T* image = features + b * s.channels * map;
    for (int64_t n = 0; n < s.rois; ++n) {
      const int64_t index = b * s.rois + n;
      const T* crop = grad + index * s.channels * points_per_roi;
      const Region region = read_region<A>(rois + index * (s.boxes ? 4 : 6), s);
      double terms[kRegionTerms] = {};
      if (region.finite) sample_points(region, s, points.data());
      for (int64_t i = 0; region.finite && i < points_per_roi; ++i) {
        const Point<A>& p = points[i];
        A weight[4];
        corner_weights(p, weight);
        A along_x = 0, along_y = 0;
        for (int64_t c = first; c < last; ++c) {
          const A g = static_cast<A>(crop[c * d.crop_channel + i * d.crop_pixel]);
          A value[4] = {};
          for (int corner = 0; corner < 4; ++corner) {
            if (!p.inside[corner]) continue;
            value[corner] = static_cast<A>(image[c * d.channel + p.offset[corner] * d.pixel]);
            if (grad_features) sum[(c - first) * map + p.offset[corner]] += weight[corner] * g;
          }
          along_x += g * ((value[1] - value[0]) * (1 - p.ty) + (value[3] - value[2]) * p.ty);
          along_y += g * ((value[2] - value[0]) * (1 - p.tx) + (value[3] - value[1]) * p.tx);
        }
        const double dx = along_x, dy = along_y, nx = p.normal_x, ny = p.normal_y;
        const double point_terms[kRegionTerms] = {dx * nx, dx * ny, dx, dy * nx, dy * ny, dy};
        for (int k = 0; k < kRegionTerms; ++k) terms[k] += point_terms[k];
      }
      if (partial) std::copy(terms, terms + kRegionTerms, partial + (index * tiles + first / kChannelTile) * kRegionTerms);
    }
    for (int64_t c = first; grad_features && c < last; ++c) {
      for (int64_t i = 0; i < map; ++i)
        grad_features[b * s.channels * map + c * d.channel + i * d.pixel] = static_cast<T>(sum[(c - first) * map + i]);
    }
  });
}

// Adds the tiles' sums in their fixed order and takes them from pixels to the coordinates of the ROI.
template <class R>
void finish_rois(const double* partial, int64_t tiles, const Shape& s, R* grad_rois) {
  const double half_w = half_span(s.width, s.align_corners), half_h = half_span(s.height, s.align_corners);
  for (int64_t index = 0; index < s.batch * s.rois; ++index) {
    double t[kRegionTerms] = {};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int k = 0; k < kRegionTerms; ++k) t[k] += *partial++;
    }
    if (s.boxes) {
      const double per_w = half_w / s.width, per_h = half_h / s.height;
      const double gradient[4] = {(t[2] - t[0]) * per_w, (t[5] - t[4]) * per_h, (t[2] + t[0]) * per_w,
                                  (t[5] + t[4]) * per_h};
      for (int k = 0; k < 4; ++k) *grad_rois++ = static_cast<R>(gradient[k]);
    } else {
      for (int k = 0; k < 6; ++k) *grad_rois++ = static_cast<R>(t[k] * (k < 3 ? half_w : half_h));
    }
  }
}

// Dense in the order batch, height, width, channels, and not also in the default order.
bool is_channels_last(const Tensor& features) {
  if (features.is_contiguous()) return false;
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (features.size(dim) != 1 && features.stride(dim) != expected) return false;
    expected *= features.size(dim);
  }
  return true;
}

// A crop tensor (B, R, C, h, w) with memory in the order (B, R, h, w, C), seen as that order.
Tensor channels_to_end(const Tensor& crops) {
  return torch::stable::transpose(torch::stable::transpose(crops, 2, 3), 3, 4);
}

Tensor channels_from_end(const Tensor& crops) {
  return torch::stable::transpose(torch::stable::transpose(crops, 3, 4), 2, 3);
}

Shape shape_of(const Tensor& features, const Tensor& rois, int64_t out_height, int64_t out_width, bool align_corners) {
  STD_TORCH_CHECK(features.dim() == 4 && (rois.dim() == 3 || rois.dim() == 4), "roi_crop: wrong rank");
  const bool boxes = rois.dim() == 3;
  STD_TORCH_CHECK(rois.size(0) == features.size(0) && rois.size(2) == (boxes ? 4 : 2) && (boxes || rois.size(3) == 3),
                  "roi_crop: rois do not fit the features");
  return {features.size(0), rois.size(1), features.size(1), features.size(2), features.size(3),
          out_height,       out_width,    boxes,            align_corners};
}

bool is_empty(const Shape& s) {
  return s.batch * s.rois * s.channels * s.height * s.width * s.out_height * s.out_width == 0;
}

// Calls body(features element, rois element) with values of the tensors' types.
template <class Body>
void dispatch(ScalarType features, ScalarType rois, const Body& body) {
  STD_TORCH_CHECK(rois == ScalarType::Float || rois == ScalarType::Double, "roi_crop: rois must be float32 or float64");
  const auto with_rois = [&](auto element) {
    if (rois == ScalarType::Float) {
      body(element, float());
    } else {
      body(element, double());
    }
  };
  switch (features) {
    case ScalarType::Float: return with_rois(float());
    case ScalarType::Double: return with_rois(double());
    case ScalarType::BFloat16: return with_rois(torch::headeronly::BFloat16());
    case ScalarType::Half: return with_rois(torch::headeronly::Half());
    default: STD_TORCH_CHECK(false, "roi_crop: features must be float32, float64, bfloat16 or float16");
  }
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Tensor roi_crop(Tensor features, Tensor rois, int64_t out_height, int64_t out_width, bool align_corners) {
  const Shape s = shape_of(features, rois, out_height, out_width, align_corners);
  const bool channels_last = is_channels_last(features);
  if (!channels_last) features = torch::stable::contiguous(features);
  rois = torch::stable::contiguous(rois);
  Tensor out = channels_last ? torch::stable::new_empty(features, {s.batch, s.rois, out_height, out_width, s.channels})
                             : torch::stable::new_empty(features, {s.batch, s.rois, s.channels, out_height, out_width});
  if (is_empty(s)) {
    torch::stable::zero_(out);
  } else {
    dispatch(features.scalar_type(), rois.scalar_type(), [&](auto element, auto coordinate) {
      using T = decltype(element);
      using R = decltype(coordinate);
      forward(data<T>(features), data<R>(rois), data<T>(out), s, strides_of(s, channels_last));
    });
  }
  return channels_last ? channels_from_end(out) : out;
}

std::tuple<Tensor, Tensor> roi_crop_backward(Tensor grad, Tensor features, Tensor rois, bool align_corners, int64_t needs) {
  const Shape s = shape_of(features, rois, grad.size(3), grad.size(4), align_corners);
  const bool channels_last = is_channels_last(features);
  if (!channels_last) features = torch::stable::contiguous(features);
  grad = torch::stable::contiguous(channels_last ? channels_to_end(grad) : grad);
  rois = torch::stable::contiguous(rois);
  const bool want_features = needs & kWantFeatures, want_rois = needs & kWantRois;
  Tensor grad_features = want_features ? torch::stable::empty_like(features) : torch::stable::new_empty(features, {0});
  Tensor grad_rois = want_rois ? torch::stable::empty_like(rois) : torch::stable::new_empty(rois, {0});
  if (is_empty(s)) {
    torch::stable::zero_(grad_features);
    torch::stable::zero_(grad_rois);
    return {grad_features, grad_rois};
  }
  const int64_t tiles = (s.channels + kChannelTile - 1) / kChannelTile;
  std::vector<double> partial(want_rois ? s.batch * s.rois * tiles * kRegionTerms : 0);
  dispatch(features.scalar_type(), rois.scalar_type(), [&](auto element, auto coordinate) {
    using T = decltype(element);
    using R = decltype(coordinate);
    backward(data<T>(grad), data<T>(features), data<R>(rois), want_features ? data<T>(grad_features) : nullptr,
             want_rois ? partial.data() : nullptr, s, strides_of(s, channels_last));
    if (want_rois) finish_rois(partial.data(), tiles, s, data<R>(grad_rois));
  });
  return {grad_features, grad_rois};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aufast, CPU, m) {
  m.impl("roi_crop", TORCH_BOX(&roi_crop));
  m.impl("roi_crop_backward", TORCH_BOX(&roi_crop_backward));
}
