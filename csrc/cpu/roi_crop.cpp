// Multi-ROI affine crop-and-resize on the CPU: affine_grid + bilinear grid_sample with zeros outside, and its
// gradients.
//
// Geometry is computed in double and shared by all channels. A work item is one image and one
// tile of channels (forward: and a group of ROIs). It brings the tile of the map into its own small buffer,
// where one pixel's channels are a vector, takes every ROI from there, and alone writes its part of the crops
// or of the feature gradient: nothing is atomic and no result depends on the number of threads.
// docs/operators/roi_crop.md derives the backward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "image.h"
#include "isa.h"
#include "roi_geometry.h"

namespace {

// How an image or a crop lies in memory: elements from plane to plane, or in channels_last from pixel to
// pixel; and the channels of a work item, a multiple of every level's lanes. In planes they are few, so that
// the map stays in the first cache; in channels_last many, so that memory is read and written in longer runs.
struct Layout {
  bool channels_last;
  int64_t stride, tile;
};

// The part of a map that an item reads and adds to.
struct Window {
  int64_t top, bottom, left, right;
  int64_t rows() const { return bottom - top; }
  int64_t columns() const { return right - left; }
};

// Taps in elements of an item's framed window.
struct Offsets {
  const int64_t *x_lo, *x_hi, *y_lo, *y_hi;
};

constexpr int kPlaneTile = 16, kWideTile = 64;

// Of one ROI: Σ over channels and points of d/dix · (x̂, ŷ, 1), then of d/diy · (x̂, ŷ, 1).
constexpr int kTerms = 6;

}  // namespace

#define AUFAST_KERNELS "roi_crop.inc"
#include "foreach_isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kEnoughItems = 16;  // below, the forward also splits the ROIs of an image
constexpr int64_t kCachedBytes = 40 << 10;
constexpr int kWantFeatures = 1, kWantRois = 2;

// How many items one thread should at least have, for waking another to pay.
int64_t grain_of(int64_t points_per_item) {
  return std::max<int64_t>(1, (int64_t{1} << 14) / std::max<int64_t>(1, points_per_item));
}

// A function of the shape alone: sums over tiles must not depend on the thread count.
int64_t tile_of(const Shape& s, bool channels_last) {
  return channels_last && s.channels >= 2 * kWideTile ? kWideTile : kPlaneTile;
}

// The buffers of one thread, and the walk over the ROIs of its items.
template <class T, class R>
class Worker {
 public:
  using A = accumulator<T>;

  Worker(const Shape& s, const R* rois, bool channels_last)
      : s_(s),
        rois_(rois),
        geometry_(s),
        map_layout_{channels_last, channels_last ? s.channels : s.height * s.width,
                    tile_of(s, channels_last)},
        crop_layout_{channels_last, channels_last ? s.channels : s.out_height * s.out_width,
                     map_layout_.tile} {}

  // Channels [first, last) of ROIs [begin, end) of image b.
  void forward(int64_t b, int64_t begin, int64_t end, int64_t first, int64_t last, const T* features,
               T* out) {
    prepare(b, begin, end);
    const int64_t tile = map_layout_.tile, tiles = (last - first + tile - 1) / tile,
                  size = framed_pixels() * tile;
    A* map = reserve(map_, tiles * framed_pixels());
    A* staging = reserve(staging_, s_.out_height * s_.out_width);
    for (int64_t k = 0; k < tiles; ++k) read(features, b, first + k * tile, last, map + k * size);
    const auto crop = AUFAST_PICK(crop<T>);
    for (int64_t n = begin; n < end; ++n) {
      const Taps<A> taps = geometry_[n - begin];
      for (int64_t k = 0; k < tiles; ++k) {
        const int64_t c = first + k * tile, channels = std::min(tile, last - c);
        T* to = out + crop_offset(b, n, c);
        const T* next = k + 1 < tiles ? out + crop_offset(b, n, c + tile)
                        : n + 1 < end ? out + crop_offset(b, n + 1, first)
                                      : to;
        if (taps.finite) {
          crop(map + k * size, to, next, crop_layout_, channels, s_, taps, offsets_of(n - begin, taps),
               staging);
        } else {
          fill_not_finite(to, channels);
        }
      }
    }
  }

  // Channels [first, last) of all ROIs of image b. The terms of ROI n and of the range's k-th tile go to
  // terms + n * terms_stride + k * kTerms.
  void backward(int64_t b, int64_t first, int64_t last, const T* grad, const T* features, T* grad_features,
                double* terms, int64_t terms_stride) {
    prepare(b, 0, s_.rois);
    const int64_t tile = map_layout_.tile, tiles = (last - first + tile - 1) / tile,
                  size = framed_pixels() * tile;
    A* map = reserve(map_, terms ? tiles * framed_pixels() : 0);
    A* sum = grad_features ? reserve(sum_, tiles * framed_pixels()) : nullptr;
    A* staging = reserve(staging_, std::max(s_.out_height * s_.out_width, s_.width));
    for (int64_t k = 0; terms && k < tiles; ++k) read(features, b, first + k * tile, last, map + k * size);
    if (sum) std::fill_n(sum, tiles * size, A(0));
    const auto crop_backward = AUFAST_PICK(crop_backward<T>);
    for (int64_t n = 0; n < s_.rois; ++n) {
      const Taps<A> taps = geometry_[n];
      for (int64_t k = 0; k < tiles; ++k) {
        double* result = terms ? terms + n * terms_stride + k * kTerms : nullptr;
        const int64_t c = first + k * tile, channels = std::min(tile, last - c);
        const T* from = grad + crop_offset(b, n, c);
        const T* next = k + 1 < tiles     ? grad + crop_offset(b, n, c + tile)
                        : n + 1 < s_.rois ? grad + crop_offset(b, n + 1, first)
                                          : from;
        if (taps.finite) {
          crop_backward(from, next, crop_layout_, channels, map + k * size, sum ? sum + k * size : nullptr,
                        result, s_, taps, offsets_of(n, taps), staging);
        } else if (result) {
          std::fill_n(result, kTerms, 0.0);
        }
      }
    }
    if (!sum) return;
    std::fill_n(staging, s_.width * tile, A(0));
    for (int64_t k = 0; k < tiles; ++k) {
      const int64_t c = first + k * tile;
      AUFAST_PICK(write_map<T>)
      (sum + k * size, map_layout_, std::min(tile, last - c), s_, window_, staging,
       grad_features + map_offset(b, c));
    }
  }

 private:
  int64_t framed_pixels() const { return (window_.rows() + 2) * (window_.columns() + 2); }

  int64_t map_offset(int64_t b, int64_t c) const {
    return b * s_.channels * s_.height * s_.width + c * (map_layout_.channels_last ? 1 : map_layout_.stride);
  }
  int64_t crop_offset(int64_t b, int64_t n, int64_t c) const {
    return (b * s_.rois + n) * s_.channels * s_.out_height * s_.out_width +
           c * (crop_layout_.channels_last ? 1 : crop_layout_.stride);
  }

  void read(const T* features, int64_t b, int64_t first, int64_t last, A* map) const {
    const int64_t channels = std::min(map_layout_.tile, last - first);
    AUFAST_PICK(read_window<T>)(features + map_offset(b, first), map_layout_, channels, s_, window_, map);
  }

  // Geometry, window and offsets of the ROIs [begin, end) of image b; the next range of the same image finds
  // them done.
  void prepare(int64_t b, int64_t begin, int64_t end) {
    if (b == image_ && begin == begin_) return;
    image_ = b;
    begin_ = begin;
    const int64_t count = end - begin;
    geometry_.place(rois_ + (b * s_.rois + begin) * s_.roi_size(), count);
    window_ = find_window(count);
    offsets_.resize(count * geometry_.entries());
    for (int64_t k = 0; k < count; ++k) {
      const Taps<A> taps = geometry_[k];
      if (taps.finite) find_offsets(taps, offsets_.data() + k * geometry_.entries());
    }
  }

  Offsets offsets_of(int64_t k, const Taps<A>& t) const {
    const int64_t* x = offsets_.data() + k * geometry_.entries();
    const int64_t* y = x + 2 * t.columns;
    return {x, x + t.columns, y, y + t.rows};
  }

  // `pixels` pixels of the tile, aligned to a cache line.
  A* reserve(std::vector<A>& buffer, int64_t pixels) const {
    constexpr size_t kLine = 64;
    const size_t wanted = pixels * map_layout_.tile + kLine / sizeof(A);
    if (buffer.size() < wanted) buffer.resize(wanted);
    return reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(buffer.data()) + kLine - 1) / kLine * kLine);
  }

  // The whole map where the taps would read most of it anyway, else the rectangle that holds them.
  Window find_window(int64_t count) const {
    if (s_.height * s_.width <= 2 * count * s_.out_height * s_.out_width) return {0, s_.height, 0, s_.width};
    Window w{s_.height, 0, s_.width, 0};
    const auto include = [](const int32_t* lo, const int32_t* hi, int64_t entries, int64_t size,
                            int64_t& first, int64_t& last) {
      for (int64_t k = 0; k < entries; ++k) {
        if (hi[k] < 0) continue;
        first = std::min(first, std::max<int64_t>(lo[k], 0));
        last = std::max(last, std::min<int64_t>(hi[k] + 1, size));
      }
    };
    for (int64_t k = 0; k < count; ++k) {
      const Taps<A> t = geometry_[k];
      if (!t.finite) continue;
      include(t.x_lo, t.x_hi, t.columns, s_.width, w.left, w.right);
      include(t.y_lo, t.y_hi, t.rows, s_.height, w.top, w.bottom);
    }
    w.left = std::min(w.left, w.right);
    w.top = std::min(w.top, w.bottom);
    return w;
  }

  // The frame stands for all that is outside the map.
  void find_offsets(const Taps<A>& t, int64_t* to) const {
    const auto convert = [&](const int32_t* index, int64_t entries, int64_t first, int64_t last,
                             int64_t step) {
      for (int64_t k = 0; k < entries; ++k)
        *to++ = (index[k] < 0 ? 0 : std::min<int64_t>(index[k], last) - first + 1) * step;
    };
    const int64_t tile = map_layout_.tile, row = (window_.columns() + 2) * tile;
    convert(t.x_lo, t.columns, window_.left, window_.right, tile);
    convert(t.x_hi, t.columns, window_.left, window_.right, tile);
    convert(t.y_lo, t.rows, window_.top, window_.bottom, row);
    convert(t.y_hi, t.rows, window_.top, window_.bottom, row);
  }

  void fill_not_finite(T* to, int64_t channels) const {
    const T nan = sizeof(T) == 2 ? static_cast<T>(0x7fc0) : std::numeric_limits<T>::quiet_NaN();
    const int64_t area = s_.out_height * s_.out_width;
    const int64_t runs = crop_layout_.channels_last ? area : 1, run = channels * area / runs;
    for (int64_t i = 0; i < runs; ++i) std::fill_n(to + i * crop_layout_.stride, run, nan);
  }

  const Shape& s_;
  const R* rois_;
  Geometry<A> geometry_;
  Layout map_layout_, crop_layout_;
  int64_t image_ = -1, begin_ = -1;
  Window window_{};
  std::vector<int64_t> offsets_;
  std::vector<A> map_, sum_, staging_;
};

// How the channels are cut. A range of several tiles goes through one ROI after the other, so that crops are
// long runs of memory; it has as many as stay in the first cache together, and no more than leave enough
// items for all cores.
struct Cut {
  int64_t tile, tiles, range, ranges;

  Cut(const Shape& s, bool channels_last, int64_t element)
      : tile(tile_of(s, channels_last)), tiles((s.channels + tile - 1) / tile) {
    const int64_t cached = kCachedBytes / ((s.height + 2) * (s.width + 2) * tile * element);
    range = tile * std::clamp<int64_t>(cached, 1, std::max<int64_t>(1, s.batch * tiles / kEnoughItems));
    ranges = (s.channels + range - 1) / range;
  }
};

// T is the storage type; uint16_t stands for bfloat16.
template <class T, class R>
void forward(const T* features, const R* rois, T* out, const Shape& s, bool channels_last) {
  const Cut cut(s, channels_last, sizeof(accumulator<T>));
  const int64_t groups = std::clamp<int64_t>(kEnoughItems / (s.batch * cut.ranges), 1, s.rois);
  const int64_t grain = grain_of(cut.range * s.out_height * s.out_width * s.rois / groups);
  torch::stable::parallel_for(0, s.batch * cut.ranges * groups, grain, [&](int64_t begin, int64_t end) {
    Worker<T, R> worker(s, rois, channels_last);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / (cut.ranges * groups), group = item / cut.ranges % groups,
                    first = item % cut.ranges * cut.range;
      worker.forward(b, group * s.rois / groups, (group + 1) * s.rois / groups, first,
                     std::min(first + cut.range, s.channels), features, out);
    }
  });
}

// Adds the tiles' terms in their fixed order.
template <class R>
void finish_rois(const double* terms, int64_t tiles, const Shape& s, R* grad_rois) {
  for (int64_t n = 0; n < s.batch * s.rois; ++n) {
    double sums[kTerms] = {};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int k = 0; k < kTerms; ++k) sums[k] += *terms++;
    }
    to_roi_gradient(sums, s, grad_rois + n * s.roi_size());
  }
}

template <class T, class R>
void backward(const T* grad, const T* features, const R* rois, T* grad_features, R* grad_rois, const Shape& s,
              bool channels_last) {
  const Cut cut(s, channels_last, 2 * sizeof(accumulator<T>));
  std::vector<double> terms(grad_rois ? s.batch * s.rois * cut.tiles * kTerms : 0);
  const int64_t grain = grain_of(cut.range * s.out_height * s.out_width * s.rois);
  torch::stable::parallel_for(0, s.batch * cut.ranges, grain, [&](int64_t begin, int64_t end) {
    Worker<T, R> worker(s, rois, channels_last);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / cut.ranges, first = item % cut.ranges * cut.range;
      double* to = grad_rois ? terms.data() + (b * s.rois * cut.tiles + first / cut.tile) * kTerms : nullptr;
      worker.backward(b, first, std::min(first + cut.range, s.channels), grad, features, grad_features, to,
                      cut.tiles * kTerms);
    }
  });
  if (grad_rois) finish_rois(terms.data(), cut.tiles, s, grad_rois);
}

Shape shape_of(const Tensor& features, const Tensor& rois, int64_t out_height, int64_t out_width,
               bool align_corners) {
  STD_TORCH_CHECK(features.dim() == 4 && (rois.dim() == 3 || rois.dim() == 4), "roi_crop: wrong rank");
  const bool boxes = rois.dim() == 3;
  STD_TORCH_CHECK(
      rois.size(0) == features.size(0) && rois.size(2) == (boxes ? 4 : 2) && (boxes || rois.size(3) == 3),
      "roi_crop: rois do not fit the features");
  STD_TORCH_CHECK(features.size(2) <= INT32_MAX && features.size(3) <= INT32_MAX,
                  "roi_crop: the map is too large");
  return {features.size(0), rois.size(1), features.size(1), features.size(2), features.size(3), out_height,
          out_width,        boxes,        align_corners};
}

bool is_empty(const Shape& s) {
  return s.batch * s.rois * s.channels * s.height * s.width * s.out_height * s.out_width == 0;
}

// Calls body(feature element, roi element) with values of the tensors' storage types.
template <class Body>
void dispatch(ScalarType features, ScalarType rois, const Body& body) {
  STD_TORCH_CHECK(rois == ScalarType::Float || rois == ScalarType::Double,
                  "roi_crop: rois must be float32 or float64");
  const auto with_rois = [&](auto element) {
    rois == ScalarType::Float ? body(element, float()) : body(element, double());
  };
  switch (features) {
    case ScalarType::Float:
      return with_rois(float());
    case ScalarType::Double:
      return with_rois(double());
    case ScalarType::BFloat16:
      return with_rois(uint16_t());
    default:
      STD_TORCH_CHECK(false, "roi_crop: features must be float32, float64, bfloat16 or float16");
  }
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
  Tensor out = channels_last
                   ? torch::stable::new_empty(features, {s.batch, s.rois, out_height, out_width, s.channels})
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

std::tuple<Tensor, Tensor> roi_crop_backward(Tensor grad, Tensor features, Tensor rois, bool align_corners,
                                             int64_t needs) {
  if (features.scalar_type() == ScalarType::Half) {
    auto [wide_features, grad_rois] =
        roi_crop_backward(torch::stable::to(grad, ScalarType::Float),
                          torch::stable::to(features, ScalarType::Float), rois, align_corners, needs);
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
  Tensor grad_features =
      want_features ? torch::stable::empty_like(features) : torch::stable::new_empty(features, {0});
  Tensor grad_rois = want_rois ? torch::stable::empty_like(rois) : torch::stable::new_empty(rois, {0});
  if (is_empty(s) || !(want_features || want_rois)) {
    torch::stable::zero_(grad_features);
    torch::stable::zero_(grad_rois);
    return {grad_features, grad_rois};
  }
  dispatch(features.scalar_type(), rois.scalar_type(), [&](auto element, auto coordinate) {
    using T = decltype(element);
    using R = decltype(coordinate);
    backward(data<T>(grad), data<T>(features), data<R>(rois),
             want_features ? data<T>(grad_features) : nullptr, want_rois ? data<R>(grad_rois) : nullptr, s,
             channels_last);
  });
  return {grad_features, grad_rois};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aufast, CPU, m) {
  m.impl("roi_crop", TORCH_BOX(&roi_crop));
  m.impl("roi_crop_backward", TORCH_BOX(&roi_crop_backward));
}
