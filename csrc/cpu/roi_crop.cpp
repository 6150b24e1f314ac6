// Multi-ROI affine crop-and-resize on the CPU: affine_grid + bilinear grid_sample with zeros outside, and its gradients.
//
// Geometry is computed once per ROI, in double, and shared by all channels. A work item is one image and one tile of
// channels (forward: of one ROI): it alone writes its part of the crops or of the feature gradient, so nothing is atomic
// and no result depends on the number of threads. docs/operators/roi_crop.md derives the backward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "isa.h"

namespace {

struct Shape {
  int64_t batch, rois, channels, height, width, out_height, out_width;
  bool boxes, align_corners;
};

// The taps of one ROI. Indices are pixels of the map, -1 outside; separable: one entry per output column and per output
// row, else one per output point in both. Normalised coordinates are those of affine_grid, per output column and row.
template <class A>
struct Taps {
  const int32_t *x_lo, *x_hi, *y_lo, *y_hi;
  const A *x_weight_lo, *x_weight_hi, *y_weight_lo, *y_weight_hi, *normal_x, *normal_y;
  bool finite, separable;
};

// The same for one output point of a plane, and the derivatives collected there.
template <class A>
struct Corners {
  int64_t offset[4];  // north-west, north-east, south-west, south-east; -1 outside the map
  A weight_x[2], weight_y[2], along_x, along_y;
};

// Of one ROI: Σ over channels and points of d/dix · (x̂, ŷ, 1), then of d/diy · (x̂, ŷ, 1).
constexpr int kTerms = 6;

}  // namespace

#define AUFAST_KERNELS "roi_crop.inc"
#include "foreach_isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What one channel tile of the feature gradient may take, to stay in the second-level cache beside its features.
constexpr int64_t kTileBytes = 128 << 10;
constexpr int64_t kMinTile = 16, kMaxTile = 128;
constexpr int kWantFeatures = 1, kWantRois = 2;

template <class T>
using accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Half the number of pixels that the normalised interval [-1, 1] spans.
double half_span(int64_t size, bool align_corners) { return 0.5 * static_cast<double>(align_corners ? size - 1 : size); }

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
    const A a[4] = {static_cast<A>(roi[0]), static_cast<A>(roi[1]), static_cast<A>(roi[2]), static_cast<A>(roi[3])};
    const double x1 = a[0], y1 = a[1], x2 = a[2], y2 = a[3], per_w = half_w / s.width, per_h = half_h / s.height;
    // The definition judges the affine matrix, in the type it computes in: a box may overflow there.
    const bool finite = std::isfinite(a[2] - a[0]) && std::isfinite(a[0] + a[2]) && std::isfinite(a[3] - a[1]) &&
                        std::isfinite(a[1] + a[3]);
    return {(x2 - x1) * per_w, 0, (x1 + x2) * per_w + centre, 0, (y2 - y1) * per_h, (y1 + y2) * per_h + centre, finite};
  }
  double theta[6];
  for (int k = 0; k < 6; ++k) theta[k] = static_cast<A>(roi[k]);
  return {theta[0] * half_w, theta[1] * half_w, (theta[2] + 1) * half_w + centre,
          theta[3] * half_h, theta[4] * half_h, (theta[5] + 1) * half_h + centre,
          std::all_of(theta, theta + 6, [](double value) { return std::isfinite(value); })};
}

// One coordinate's cell: NaN and infinity fail the first test, and behind it the conversion to an integer is safe.
template <class A>
void find_cell(double position, int64_t size, int32_t& lo, int32_t& hi, A& weight_lo, A& weight_hi) {
  lo = hi = -1;
  weight_lo = weight_hi = 0;
  if (!(position > -1 && position < size)) return;
  const double cell = std::floor(position);
  const int64_t index = static_cast<int64_t>(cell);
  if (index >= 0) lo = static_cast<int32_t>(index);
  if (index + 1 < size) hi = static_cast<int32_t>(index + 1);
  weight_lo = static_cast<A>(cell + 1 - position);
  weight_hi = static_cast<A>(position - cell);
}

// The taps of all ROIs of a call.
template <class A>
class Geometry {
 public:
  template <class R>
  Geometry(const R* rois, const Shape& s)
      : shape_(s),
        columns_(s.boxes ? s.out_width : s.out_width * s.out_height),
        rows_(s.boxes ? s.out_height : columns_),
        index_(s.batch * s.rois * 2 * (columns_ + rows_)),
        weight_(index_.size()),
        normal_(s.out_width + s.out_height),
        finite_(s.batch * s.rois),
        separable_(s.batch * s.rois) {
    for (int64_t u = 0; u < s.out_width; ++u) normal_[u] = static_cast<A>(numerator(u, s.out_width) / divisor(s.out_width));
    for (int64_t v = 0; v < s.out_height; ++v) {
      normal_[s.out_width + v] = static_cast<A>(numerator(v, s.out_height) / divisor(s.out_height));
    }
    torch::stable::parallel_for(0, s.batch * s.rois, 64, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) place(n, read_region<A>(rois + n * (s.boxes ? 4 : 6), s));
    });
  }

  Taps<A> operator[](int64_t n) const {
    const int32_t* index = index_.data() + n * 2 * (columns_ + rows_);
    const A* weight = weight_.data() + n * 2 * (columns_ + rows_);
    return {index,          index + columns_,  index + 2 * columns_,  index + 2 * columns_ + rows_,
            weight,         weight + columns_, weight + 2 * columns_, weight + 2 * columns_ + rows_,
            normal_.data(), normal_.data() + shape_.out_width, finite_[n] != 0, separable_[n] != 0};
  }

 private:
  // Normalised coordinate of output pixel u of n times a divisor, kept apart so that round numbers stay exact.
  static double numerator(int64_t u, int64_t n) { return static_cast<double>(2 * u + 1 - n); }
  double divisor(int64_t n) const { return static_cast<double>(shape_.align_corners ? std::max<int64_t>(n - 1, 1) : n); }

  void place(int64_t n, const Region& r) {
    const Shape& s = shape_;
    finite_[n] = r.finite;
    separable_[n] = r.xy == 0 && r.yx == 0;
    if (!r.finite) return;
    int32_t* index = index_.data() + n * 2 * (columns_ + rows_);
    A* weight = weight_.data() + n * 2 * (columns_ + rows_);
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

  Shape shape_;
  int64_t columns_, rows_;
  std::vector<int32_t> index_;
  std::vector<A> weight_, normal_;
  std::vector<uint8_t> finite_, separable_;
};

// Channels per work item: a function of the shape alone, so that sums over tiles are the same at any thread count.
int64_t tile_of(const Shape& s, int64_t accumulator_bytes) {
  const int64_t fits = kTileBytes / (s.height * s.width * accumulator_bytes) / kMinTile * kMinTile;
  return std::clamp(fits, kMinTile, kMaxTile);
}

int64_t tiles_of(const Shape& s, int64_t tile) { return (s.channels + tile - 1) / tile; }

// How many items one thread should at least have, for waking another to pay.
int64_t grain_of(int64_t points_per_item) { return std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(1, points_per_item)); }

template <class T>
void fill_not_finite(T* crop, const Shape& s, bool channels_last, int64_t first, int64_t channels) {
  const T nan = sizeof(T) == 2 ? static_cast<T>(0x7fc0) : std::numeric_limits<T>::quiet_NaN();
  const int64_t area = s.out_height * s.out_width;
  if (!channels_last) {
    std::fill_n(crop + first * area, channels * area, nan);
    return;
  }
  for (int64_t i = 0; i < area; ++i) std::fill_n(crop + i * s.channels + first, channels, nan);
}

// T is the storage type; uint16_t stands for bfloat16.
template <class T, class R>
void forward(const T* features, const R* rois, T* out, const Shape& s, bool channels_last) {
  using A = accumulator<T>;
  const Geometry<A> geometry(rois, s);
  const int64_t map = s.height * s.width, area = s.out_height * s.out_width;
  const int64_t tile = tile_of(s, sizeof(A)), tiles = tiles_of(s, tile);
  const auto planes = AUFAST_PICK(crop_planes<T>);
  const auto channel_vectors = AUFAST_PICK(crop_channels<T>);
  torch::stable::parallel_for(0, s.batch * tiles * s.rois, grain_of(tile * area), [&](int64_t begin, int64_t end) {
    std::vector<Corners<A>> corners(channels_last ? 0 : area);
    const std::vector<T> zeros(channels_last ? tile : 0);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / (tiles * s.rois), n = b * s.rois + item % s.rois;
      const int64_t first = item / s.rois % tiles * tile, channels = std::min(tile, s.channels - first);
      const T* image = features + b * s.channels * map;
      T* crop = out + n * s.channels * area;
      const Taps<A> taps = geometry[n];
      if (!taps.finite) {
        fill_not_finite(crop, s, channels_last, first, channels);
      } else if (channels_last) {
        channel_vectors(image + first, crop + first, channels, s, taps, zeros.data());
      } else {
        planes(image + first * map, crop + first * area, channels, s, taps, corners.data());
      }
    }
  });
}

// One image and one tile of channels: its feature gradient, summed over ROIs, and per ROI its part of the six terms.
template <class T>
class BackwardItem {
 public:
  using A = accumulator<T>;

  BackwardItem(const Shape& s, int64_t tile, bool channels_last, bool want_features)
      : s_(s),
        channels_last_(channels_last),
        sum_(want_features && !kDirect ? tile * s.height * s.width : 0),
        zeros_(channels_last ? tile : 0),
        corners_(channels_last ? 0 : s.out_height * s.out_width) {}

  void run(const T* grad, const T* image, T* grad_image, const Geometry<A>& geometry, int64_t first_roi, int64_t first,
           int64_t channels, double* terms, int64_t terms_stride) {
    const int64_t map = s_.height * s_.width, area = s_.out_height * s_.out_width;
    const int64_t tile_start = channels_last_ ? first : first * map;
    // In float and double the sum is the result's own memory; in bfloat16 it is a float32 copy of the tile.
    A* sum = nullptr;
    int64_t sum_stride = kDirect ? s_.channels : channels;
    if (grad_image) {
      if constexpr (kDirect) {
        sum = grad_image + tile_start;
      } else {
        sum = sum_.data();
      }
      clear(sum, sum_stride, channels);
    }
    for (int64_t n = 0; n < s_.rois; ++n, grad += s_.channels * area) {
      double* result = terms ? terms + n * terms_stride : nullptr;
      const Taps<A> taps = geometry[first_roi + n];
      if (!taps.finite) {
        if (result) std::fill_n(result, kTerms, 0.0);
      } else if (channels_last_) {
        AUFAST_PICK(crop_channels_backward<T>)
        (grad + first, image + first, sum, sum_stride, result, channels, s_, taps, zeros_.data());
      } else {
        AUFAST_PICK(crop_planes_backward<T>)
        (grad + first * area, image + first * map, sum, result, channels, s_, taps, corners_.data());
      }
    }
    if constexpr (!kDirect) {
      if (grad_image) narrow(grad_image + tile_start, channels);
    }
  }

 private:
  static constexpr bool kDirect = std::is_same_v<T, A>;

  void clear(A* sum, int64_t stride, int64_t channels) const {
    const int64_t map = s_.height * s_.width;
    if (!channels_last_) {
      std::fill_n(sum, channels * map, A(0));
      return;
    }
    for (int64_t i = 0; i < map; ++i) std::fill_n(sum + i * stride, channels, A(0));
  }

  void narrow(T* grad_image, int64_t channels) const {
    const int64_t map = s_.height * s_.width, rows = channels_last_ ? map : 1, row = channels_last_ ? channels : channels * map;
    for (int64_t i = 0; i < rows; ++i) {
      AUFAST_PICK(convert_to_bf16)(sum_.data() + i * row, grad_image + i * s_.channels, row);
    }
  }

  const Shape& s_;
  bool channels_last_;
  std::vector<A> sum_;
  std::vector<T> zeros_;
  std::vector<Corners<A>> corners_;
};

// Adds the tiles' terms in their fixed order and takes them from pixels to the coordinates of the ROI.
template <class R>
void finish_rois(const double* terms, int64_t tiles, const Shape& s, R* grad_rois) {
  const double half_w = half_span(s.width, s.align_corners), half_h = half_span(s.height, s.align_corners);
  for (int64_t n = 0; n < s.batch * s.rois; ++n) {
    double t[kTerms] = {};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int k = 0; k < kTerms; ++k) t[k] += *terms++;
    }
    if (s.boxes) {
      const double per_w = half_w / s.width, per_h = half_h / s.height;
      const double box[4] = {(t[2] - t[0]) * per_w, (t[5] - t[4]) * per_h, (t[2] + t[0]) * per_w, (t[5] + t[4]) * per_h};
      for (int k = 0; k < 4; ++k) *grad_rois++ = static_cast<R>(box[k]);
    } else {
      for (int k = 0; k < 6; ++k) *grad_rois++ = static_cast<R>(t[k] * (k < 3 ? half_w : half_h));
    }
  }
}

template <class T, class R>
void backward(const T* grad, const T* features, const R* rois, T* grad_features, R* grad_rois, const Shape& s,
              bool channels_last) {
  using A = accumulator<T>;
  const Geometry<A> geometry(rois, s);
  const int64_t image_size = s.channels * s.height * s.width, crops_size = s.rois * s.channels * s.out_height * s.out_width;
  const int64_t tile = tile_of(s, sizeof(A)), tiles = tiles_of(s, tile);
  std::vector<double> terms(grad_rois ? s.batch * s.rois * tiles * kTerms : 0);
  const int64_t grain = grain_of(tile * s.rois * s.out_height * s.out_width);
  torch::stable::parallel_for(0, s.batch * tiles, grain, [&](int64_t begin, int64_t end) {
    BackwardItem<T> work(s, tile, channels_last, grad_features != nullptr);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / tiles, k = item % tiles, first = k * tile;
      work.run(grad + b * crops_size, features + b * image_size, grad_features ? grad_features + b * image_size : nullptr,
               geometry, b * s.rois, first, std::min(tile, s.channels - first),
               grad_rois ? terms.data() + (b * s.rois * tiles + k) * kTerms : nullptr, tiles * kTerms);
    }
  });
  if (grad_rois) finish_rois(terms.data(), tiles, s, grad_rois);
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

Shape shape_of(const Tensor& features, const Tensor& rois, int64_t out_height, int64_t out_width, bool align_corners) {
  STD_TORCH_CHECK(features.dim() == 4 && (rois.dim() == 3 || rois.dim() == 4), "roi_crop: wrong rank");
  const bool boxes = rois.dim() == 3;
  STD_TORCH_CHECK(rois.size(0) == features.size(0) && rois.size(2) == (boxes ? 4 : 2) && (boxes || rois.size(3) == 3),
                  "roi_crop: rois do not fit the features");
  STD_TORCH_CHECK(features.size(2) <= INT32_MAX && features.size(3) <= INT32_MAX, "roi_crop: the map is too large");
  return {features.size(0), rois.size(1), features.size(1), features.size(2), features.size(3),
          out_height,       out_width,    boxes,            align_corners};
}

bool is_empty(const Shape& s) {
  return s.batch * s.rois * s.channels * s.height * s.width * s.out_height * s.out_width == 0;
}

// Calls body(feature element, roi element) with values of the tensors' storage types.
template <class Body>
void dispatch(ScalarType features, ScalarType rois, const Body& body) {
  STD_TORCH_CHECK(rois == ScalarType::Float || rois == ScalarType::Double, "roi_crop: rois must be float32 or float64");
  const auto with_rois = [&](auto element) { rois == ScalarType::Float ? body(element, float()) : body(element, double()); };
  switch (features) {
    case ScalarType::Float: return with_rois(float());
    case ScalarType::Double: return with_rois(double());
    case ScalarType::BFloat16: return with_rois(uint16_t());
    default: STD_TORCH_CHECK(false, "roi_crop: features must be float32, float64, bfloat16 or float16");
  }
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Tensor roi_crop(Tensor features, Tensor rois, int64_t out_height, int64_t out_width, bool align_corners) {
  if (features.scalar_type() == ScalarType::Half) {
    const Tensor wide = torch::stable::to(features, ScalarType::Float);
    return torch::stable::to(roi_crop(wide, rois, out_height, out_width, align_corners), ScalarType::Half);
  }
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
      forward(data<T>(features), data<R>(rois), data<T>(out), s, channels_last);
    });
  }
  if (!channels_last) return out;
  return torch::stable::transpose(torch::stable::transpose(out, 3, 4), 2, 3);  // (B, R, C, h, w)
}

std::tuple<Tensor, Tensor> roi_crop_backward(Tensor grad, Tensor features, Tensor rois, bool align_corners, int64_t needs) {
  if (features.scalar_type() == ScalarType::Half) {
    auto [wide_features, grad_rois] =
        roi_crop_backward(torch::stable::to(grad, ScalarType::Float), torch::stable::to(features, ScalarType::Float), rois,
                          align_corners, needs);
    return {torch::stable::to(wide_features, ScalarType::Half), grad_rois};
  }
  const Shape s = shape_of(features, rois, grad.size(3), grad.size(4), align_corners);
  const bool channels_last = is_channels_last(features);
  if (channels_last) {
    grad = torch::stable::transpose(torch::stable::transpose(grad, 2, 3), 3, 4);  // (B, R, h, w, C)
  } else {
    features = torch::stable::contiguous(features);
  }
  grad = torch::stable::contiguous(grad);
  rois = torch::stable::contiguous(rois);
  const bool want_features = needs & kWantFeatures, want_rois = needs & kWantRois;
  Tensor grad_features = want_features ? torch::stable::empty_like(features) : torch::stable::new_empty(features, {0});
  Tensor grad_rois = want_rois ? torch::stable::empty_like(rois) : torch::stable::new_empty(rois, {0});
  if (is_empty(s)) {
    torch::stable::zero_(grad_features);
    torch::stable::zero_(grad_rois);
    return {grad_features, grad_rois};
  }
  dispatch(features.scalar_type(), rois.scalar_type(), [&](auto element, auto coordinate) {
    using T = decltype(element);
    using R = decltype(coordinate);
    backward(data<T>(grad), data<T>(features), data<R>(rois), want_features ? data<T>(grad_features) : nullptr,
             want_rois ? data<R>(grad_rois) : nullptr, s, channels_last);
  });
  return {grad_features, grad_rois};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aufast, CPU, m) {
  m.impl("roi_crop", TORCH_BOX(&roi_crop));
  m.impl("roi_crop_backward", TORCH_BOX(&roi_crop_backward));
}
