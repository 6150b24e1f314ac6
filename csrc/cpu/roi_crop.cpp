// Multi-ROI affine crop-and-resize on the CPU: affine_grid + bilinear grid_sample with zeros outside, and its
// gradients.
//
// Geometry is computed in double and shared by all channels. Every region is sampled from a map of pixels,
// whose channels lie side by side. In channels_last that is the map itself, in NCHW a buffer that a work item
// brings its channels into. An item is one image and a range of channels (forward: and a group of regions);
// it takes every region from there and alone writes its part of the crops or of the feature gradient:
// nothing is atomic and no result depends on the number of threads.
// docs/operators/roi_crop.md derives the backward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "dense.h"
#include "image.h"
#include "isa.h"
#include "roi_geometry.h"

namespace {

// How an image or a crop lies in memory: elements from plane to plane, or in channels_last from pixel to
// pixel.
struct Layout {
  bool channels_last;
  int64_t stride;
};

// A map as pixels, channels side by side, and the pixel that stands for all that is not on it.
template <class E>
struct Place {
  E *pixels, *outside;
};

// The part of a map that an item reads and adds to.
struct Window {
  int64_t top, bottom, left, right;
  int64_t rows() const { return bottom - top; }
  int64_t columns() const { return right - left; }
};

// Taps in elements of the map that is sampled; negative where outside of it.
struct Offsets {
  const int64_t *x_lo, *x_hi, *y_lo, *y_hi;
};

// One region's points as pixels, on their way from or to planes; `channels` apart.
template <class E>
struct Staging {
  E* pixels;
  int64_t channels;
};

constexpr int kPlaneTile = 16;  // channels that are brought from planes to pixels together

// Of one ROI: Σ over channels and points of d/dix · (x̂, ŷ, 1), then of d/diy · (x̂, ŷ, 1).
constexpr int kTerms = 6;

}  // namespace

#define AUFAST_KERNELS "roi_crop.inc"
#include "foreach_isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kEnoughItems = 16;          // below, the forward also splits the regions of an image
constexpr int64_t kCachedBytes = 160 << 10;   // of an item's maps, well inside the second cache
constexpr int64_t kStagedBytes = 12 << 10;    // of a region's points, well inside the first
constexpr int64_t kWalked = 4;                // tiles of channels that a level may walk together
constexpr int64_t kFetchedBytes = 512 << 10;  // of a map at once into the second cache, at most
constexpr int kWantFeatures = 1, kWantRois = 2;

// How many items one thread should at least have, for waking another to pay.
int64_t grain_of(int64_t points_per_item) {
  return std::max<int64_t>(1, (int64_t{1} << 14) / std::max<int64_t>(1, points_per_item));
}

// How the channels are cut: in ranges as large as leave enough items, and whose buffers stay in the second
// cache. A function of the shape alone: the sums over ranges must not depend on the thread count.
struct Cut {
  int64_t range, ranges;

  // Ranges of a multiple of `least` channels; without buffers, 0 bytes a channel.
  Cut(const Shape& s, int64_t least, int64_t bytes_per_channel) {
    const int64_t tiles = (s.channels + least - 1) / least,
                  most = std::max<int64_t>(1, s.batch * tiles / kEnoughItems),
                  cached = bytes_per_channel ? kCachedBytes / (least * bytes_per_channel) : most;
    range = least * std::min(tiles, std::clamp<int64_t>(cached, 1, most));
    ranges = (s.channels + range - 1) / range;
  }
  static Cut whole(const Shape& s) { return Cut(s.channels); }

 private:
  explicit Cut(int64_t all) : range(all), ranges(1) {}
};

// Elements whose first begins a cache line.
template <class E>
class Buffer {
 public:
  E* reserve(int64_t wanted) {
    const size_t size = wanted + kLine<E>;
    if (elements_.size() < size) elements_.resize(size);
    return on_lines(elements_.data());
  }

 private:
  std::vector<E> elements_;
};

// The buffers of one thread, and the walk over the regions of its items. `in_place`: the map is sampled where
// it lies.
template <class T, class R>
class Worker {
 public:
  using A = accumulator<T>;

  Worker(const Shape& s, const R* rois, bool channels_last, bool in_place, int64_t range)
      : s_(s),
        rois_(rois),
        geometry_(s),
        map_layout_{channels_last, channels_last ? s.channels : s.height * s.width},
        crop_layout_{channels_last, channels_last ? s.channels : s.out_height * s.out_width},
        in_place_(in_place),
        step_(in_place ? s.channels : range),
        staged_(staged_channels(s.out_height * s.out_width, range)) {}

  // Channels [first, last) of the regions [begin, end) of image b.
  void forward(int64_t b, int64_t begin, int64_t end, int64_t first, int64_t last, const T* features,
               T* out) {
    prepare(b, begin, end);
    const int64_t channels = last - first;
    features += map_offset(b, first);
    fetch_map(features, channels, end - begin);
    const Place<const T> map{features, in_place_ ? nothing_.reserve(step_) : nullptr};
    const Place<const A> buffer = in_place_ ? Place<const A>{} : read(features, channels);
    const Staging<A> staging = stage();
    for (int64_t n = begin; n < end; ++n) {
      T* to = out + crop_offset(b, n, first);
      const Taps<A> taps = geometry_[n - begin];
      const Offsets offsets = offsets_of(n - begin, taps);
      if (!taps.finite) {
        fill_not_finite(to, channels);
      } else if (in_place_) {
        AUFAST_PICK(crop_in_place<T>)(map, to, step_, channels, s_, taps, offsets);
      } else {
        const T* next = n + 1 < end ? out + crop_offset(b, n + 1, first) : to;
        AUFAST_PICK(crop_to_planes<T>)(buffer, to, next, staging, channels, s_, taps, offsets);
      }
    }
  }

  // Channels [first, last) of all regions of image b. The terms of region n are added to terms + n *
  // terms_stride.
  void backward(int64_t b, int64_t first, int64_t last, const T* grad, const T* features, T* grad_features,
                double* terms, int64_t terms_stride) {
    prepare(b, 0, s_.rois);
    const int64_t channels = last - first;
    features += map_offset(b, first);
    if (terms) fetch_map(features, channels, s_.rois);
    if (grad_features) grad_features += map_offset(b, first);
    Place<const A> map{};
    Place<A> sum{};
    if constexpr (std::is_same_v<T, A>) {
      if (in_place_) {
        map = {features, nothing_.reserve(step_)};
        if (grad_features) {
          sum = {grad_features, sum_.reserve(step_)};
          AUFAST_PICK(clear_run<T>)(map_layout_, channels, s_.height * s_.width, grad_features);
        }
      }
    }
    if (!in_place_) {
      if (terms) map = read(features, channels);
      if (grad_features) {
        const int64_t size = window_.rows() * window_.columns() * step_;
        A* pixels = sum_.reserve(size + step_);
        std::fill_n(pixels, size, A(0));
        sum = {pixels, pixels + size};
      }
    }
    const Staging<A> staging = stage();
    for (int64_t n = 0; n < s_.rois; ++n) {
      double* result = terms ? terms + n * terms_stride : nullptr;
      const Taps<A> taps = geometry_[n];
      if (!taps.finite) continue;
      const T* from = grad + crop_offset(b, n, first);
      const Offsets offsets = offsets_of(n, taps);
      if constexpr (std::is_same_v<T, A>) {
        if (in_place_) {
          AUFAST_PICK(crop_backward_in_place<T>)
          (from, step_, channels, map, sum, result, s_, taps, offsets);
          continue;
        }
      }
      const T* next = n + 1 < s_.rois ? grad + crop_offset(b, n + 1, first) : from;
      AUFAST_PICK(crop_backward<T>)
      (from, next, crop_layout_, channels, staging, map, sum, result, s_, taps, offsets);
    }
    if (grad_features && !in_place_) {
      AUFAST_PICK(write_map<T>)
      (sum.pixels, step_, map_layout_, channels, s_, window_, grad_features);
    }
  }

 private:
  static int64_t staged_channels(int64_t area, int64_t range) {
    const int64_t tiles = kStagedBytes / (area * kPlaneTile * static_cast<int64_t>(sizeof(A)));
    return std::min(range,
                    kPlaneTile * std::max<int64_t>(1, tiles < kWalked ? tiles : tiles / kWalked * kWalked));
  }
  Staging<A> stage() {
    if (in_place_) return {};
    return {staging_.reserve(s_.out_height * s_.out_width * staged_), staged_};
  }

  int64_t map_offset(int64_t b, int64_t c) const {
    return b * s_.channels * s_.height * s_.width + c * (map_layout_.channels_last ? 1 : map_layout_.stride);
  }
  int64_t crop_offset(int64_t b, int64_t n, int64_t c) const {
    return (b * s_.rois + n) * s_.channels * s_.out_height * s_.out_width +
           c * (crop_layout_.channels_last ? 1 : crop_layout_.stride);
  }

  // Fetches an item's part of the map, where its regions read most of that: in the order of the regions, or
  // of 16 planes at once, each line would be waited for.
  void fetch_map(const T* features, int64_t channels, int64_t count) const {
    const int64_t pixels = s_.height * s_.width;
    if (pixels * channels > kFetchedBytes / static_cast<int64_t>(sizeof(T)) || !reads_most(count)) return;
    const int64_t runs = map_layout_.channels_last && channels < s_.channels ? pixels : 1;
    for (int64_t i = 0; i < runs; ++i, features += map_layout_.stride) {
      for (int64_t k = 0; k < pixels * channels / runs; k += kLine<T>) __builtin_prefetch(features + k, 0, 2);
    }
  }

  // The window of the map in the buffer, and behind it one pixel of zeros.
  Place<const A> read(const T* features, int64_t channels) {
    const int64_t size = window_.rows() * window_.columns() * step_;
    A* pixels = map_.reserve(size + step_);
    AUFAST_PICK(read_window<T>)(features, map_layout_, channels, s_, window_, pixels, step_);
    std::fill_n(pixels + size, step_, A(0));
    return {pixels, pixels + size};
  }

  // Geometry, window and offsets of the regions [begin, end) of image b; the next range of the same image
  // finds them done.
  void prepare(int64_t b, int64_t begin, int64_t end) {
    if (b == image_ && begin == begin_) return;
    image_ = b;
    begin_ = begin;
    const int64_t count = end - begin;
    geometry_.place(rois_ + (b * s_.rois + begin) * s_.roi_size(), count);
    window_ = in_place_ ? Window{0, s_.height, 0, s_.width} : find_window(count);
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

  // Whether so many regions read most of the map, as far as their points tell.
  bool reads_most(int64_t count) const {
    return s_.height * s_.width <= 2 * count * s_.out_height * s_.out_width;
  }

  // The whole map where the taps would read most of it anyway, else the rectangle that holds them.
  Window find_window(int64_t count) const {
    if (reads_most(count)) return {0, s_.height, 0, s_.width};
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

  void find_offsets(const Taps<A>& t, int64_t* to) const {
    const auto convert = [&](const int32_t* index, int64_t entries, int64_t size, int64_t first,
                             int64_t step) {
      for (int64_t k = 0; k < entries; ++k)
        *to++ = index[k] < 0 || index[k] >= size ? -1 : (index[k] - first) * step;
    };
    const int64_t row = window_.columns() * step_;
    convert(t.x_lo, t.columns, s_.width, window_.left, step_);
    convert(t.x_hi, t.columns, s_.width, window_.left, step_);
    convert(t.y_lo, t.rows, s_.height, window_.top, row);
    convert(t.y_hi, t.rows, s_.height, window_.top, row);
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
  bool in_place_;
  int64_t step_;    // elements from pixel to pixel of the map that is sampled
  int64_t staged_;  // channels of a region that are staged together
  int64_t image_ = -1, begin_ = -1;
  Window window_{};
  std::vector<int64_t> offsets_;
  Buffer<T> nothing_;  // zeros
  Buffer<A> map_, sum_, staging_;
};

// In channels_last a range of few channels would touch memory in single lines.
int64_t least_range(const Shape& s, bool channels_last) {
  return channels_last && s.channels >= 128 ? 64 : kPlaneTile;
}

// T is the storage type; uint16_t stands for bfloat16.
template <class T, class R>
void forward(const T* features, const R* rois, T* out, const Shape& s, bool channels_last) {
  const int64_t area = s.out_height * s.out_width, pixels = s.height * s.width,
                element = sizeof(accumulator<T>);
  const Cut cut = channels_last ? Cut::whole(s) : Cut(s, kPlaneTile, pixels * element);
  const int64_t groups = std::clamp<int64_t>(kEnoughItems / (s.batch * cut.ranges), 1, s.rois);
  const int64_t grain = grain_of(cut.range * area * s.rois / groups);
  torch::stable::parallel_for(0, s.batch * cut.ranges * groups, grain, [&](int64_t begin, int64_t end) {
    Worker<T, R> worker(s, rois, channels_last, channels_last, cut.range);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / (cut.ranges * groups), group = item / cut.ranges % groups,
                    first = item % cut.ranges * cut.range;
      worker.forward(b, group * s.rois / groups, (group + 1) * s.rois / groups, first,
                     std::min(first + cut.range, s.channels), features, out);
    }
  });
}

// Adds the ranges' terms in their fixed order.
template <class R>
void finish_rois(const double* terms, int64_t ranges, const Shape& s, R* grad_rois) {
  for (int64_t n = 0; n < s.batch * s.rois; ++n) {
    double sums[kTerms] = {};
    for (int64_t range = 0; range < ranges; ++range) {
      for (int k = 0; k < kTerms; ++k) sums[k] += *terms++;
    }
    to_roi_gradient(sums, s, grad_rois + n * s.roi_size());
  }
}

template <class T, class R>
void backward(const T* grad, const T* features, const R* rois, T* grad_features, R* grad_rois, const Shape& s,
              bool channels_last) {
  // Gradients are summed in place only where their own type holds the sums.
  const bool in_place = channels_last && std::is_same_v<T, accumulator<T>>;
  const int64_t area = s.out_height * s.out_width, pixels = s.height * s.width,
                element = sizeof(accumulator<T>);
  const Cut cut(s, least_range(s, channels_last), in_place ? 0 : 2 * pixels * element);
  std::vector<double> terms(grad_rois ? s.batch * s.rois * cut.ranges * kTerms : 0);
  const int64_t grain = grain_of(cut.range * area * s.rois);
  torch::stable::parallel_for(0, s.batch * cut.ranges, grain, [&](int64_t begin, int64_t end) {
    Worker<T, R> worker(s, rois, channels_last, in_place, cut.range);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / cut.ranges, range = item % cut.ranges, first = range * cut.range;
      double* to = grad_rois ? terms.data() + (b * s.rois * cut.ranges + range) * kTerms : nullptr;
      worker.backward(b, first, std::min(first + cut.range, s.channels), grad, features, grad_features, to,
                      cut.ranges * kTerms);
    }
  });
  if (grad_rois) finish_rois(terms.data(), cut.ranges, s, grad_rois);
}

Shape shape_of(const Tensor& features, const Tensor& rois, int64_t out_height, int64_t out_width,
               bool align_corners) {
  aufast::isa();  // here a wrong level is told: what a thread of parallel_for throws loses its message
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
  if (!channels_last) features = dense_of(features);
  rois = dense_of(rois);
  Tensor out = channels_last
                   ? torch::stable::new_empty(features, {s.batch, s.rois, out_height, out_width, s.channels})
                   : torch::stable::new_empty(features, {s.batch, s.rois, s.channels, out_height, out_width});
  if (is_empty(s)) {
    torch::stable::zero_(out);
  } else {
    prefer_huge_pages(out);
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
    features = dense_of(features);
  }
  grad = dense_of(grad);
  rois = dense_of(rois);
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
