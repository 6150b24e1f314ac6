// Multi-ROI affine crop-and-resize on NVIDIA GPUs, and its gradients.
//
// The kernels are in roi_crop_forward.cuh and roi_crop_backward.cuh; this file chooses how a call is cut, by
// its sizes alone, and launches them on the current stream. docs/operators/roi_crop_cuda.md has the bytes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "arguments.h"
#include "roi_crop_backward.cuh"
#include "roi_crop_forward.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWantFeatures = 1, kWantRois = 2;
constexpr size_t kMapBytes = 44 << 10;  // of a block's map: some blocks on a multiprocessor
constexpr size_t kShared = 96 << 10;    // of a block; every GPU from sm_80 on has it
constexpr int kGatherBytes = 2304;      // of a warp: a run of 16 channels of 6×6 crops in float32
constexpr int kTapBytes = 8 << 10;
constexpr int64_t kEnoughBlocks = 1024;
constexpr int kGradientBytes = 36 << 10;
constexpr int kAnyTile = 64;

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

bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Blocks that do not wait for each other.
template <class Arguments>
void launch(const Device& device, void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared,
            const Arguments& arguments) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "roi_crop: too many regions for one call");
  device.launch(kernel, Shape{static_cast<int>(blocks), 1, threads, shared}, arguments);
}

CropShape shape_of(const Tensor& features, const Tensor& rois, int64_t out_height, int64_t out_width,
                   bool align_corners) {
  check_device("roi_crop", "rois", rois, "features", features);
  STD_TORCH_CHECK(features.dim() == 4 && (rois.dim() == 3 || rois.dim() == 4), "roi_crop: wrong rank");
  const bool boxes = rois.dim() == 3;
  STD_TORCH_CHECK(
      rois.size(0) == features.size(0) && rois.size(2) == (boxes ? 4 : 2) && (boxes || rois.size(3) == 3),
      "roi_crop: rois do not fit the features");
  constexpr int64_t kMost = INT16_MAX;  // of a side; sums of a few of them and products of two fit an int
  STD_TORCH_CHECK(features.size(2) <= kMost && features.size(3) <= kMost && out_height <= kMost &&
                      out_width <= kMost && features.size(1) <= INT32_MAX / 2 &&
                      rois.size(1) <= INT32_MAX / 2,
                  "roi_crop: a map's or a crop's side is above ", kMost);
  return {features.size(0), rois.size(1), features.size(1), features.size(2), features.size(3), out_height,
          out_width,        boxes,        align_corners};
}

bool is_empty(const CropShape& s) {
  return s.batch * s.rois * s.channels * s.height * s.width * s.out_height * s.out_width == 0;
}

// Boxes from a map in shared memory; false where it does not fit.
template <class T, int kVector, bool kLast>
bool forward_boxes(const Device& device, ForwardBoxes<T> a) {
  const CropShape& s = a.s;
  const int64_t points = s.out_height * s.out_width, entries = s.out_height + s.out_width;
  const int64_t pixel_bytes = s.height * (s.width + 2) * static_cast<int64_t>(sizeof(T));
  const int64_t tap_bytes = entries * sizeof(Tap<accumulator<T>>);
  if (tap_bytes > kTapBytes || kVector * points * int64_t{sizeof(T)} > 2 * kGatherBytes) return false;
  a.tile = 128;
  while (a.tile > kVector && (a.tile * pixel_bytes > int64_t{kMapBytes} || a.tile / 2 >= s.channels))
    a.tile /= 2;
  if (a.tile * pixel_bytes > int64_t{kMapBytes}) return false;
  a.tiles = static_cast<int>((s.channels + a.tile - 1) / a.tile);
  a.groups = static_cast<int>(std::clamp<int64_t>(kEnoughBlocks / (s.batch * a.tiles), 1,
                                                  (s.rois + kForwardWarps - 1) / kForwardWarps));
  a.at_once = static_cast<int>(std::min(kTapBytes / tap_bytes, (s.rois + a.groups - 1) / a.groups));
  const int gathered = kGatherBytes / static_cast<int>(points * sizeof(T) * kVector) * kVector;
  a.gathered = std::clamp(gathered, kVector, a.tile);
  const bool whole_runs = a.gathered * points * sizeof(T) % 16 == 0 &&
                          a.tile * points * sizeof(T) % 16 == 0 &&
                          s.channels * points * sizeof(T) % 16 == 0 && a.tile % a.gathered == 0 &&
                          s.channels % a.tile % a.gathered == 0;
  a.vectors = whole_runs && is_aligned(a.out, 16);
  const size_t shared = BoxesRoom<T, kVector, kLast>(a, nullptr).bytes;
  if (shared > kShared) return false;
  launch(device, &roi_crop_boxes<T, kVector, kLast>, s.batch * a.tiles * a.groups, kForwardWarps * 32, shared,
         a);
  return true;
}

template <class T>
bool forward_boxes(const Device& device, const ForwardBoxes<T>& a, bool channels_last) {
  constexpr int kPlanes = sizeof(T) == 2 ? 2 : 1, kWide = sizeof(T) == 8 ? 2 : 4;
  if (!channels_last) return forward_boxes<T, kPlanes, false>(device, a);
  const bool vectors = a.s.channels % kWide == 0 && is_aligned(a.features, kWide * sizeof(T)) &&
                       is_aligned(a.out, kWide * sizeof(T));
  return vectors ? forward_boxes<T, kWide, true>(device, a) : forward_boxes<T, 1, true>(device, a);
}

template <class T>
void forward(const Device& device, const CropShape& s, const Tensor& features, const Tensor& rois,
             const Tensor& out, bool channels_last) {
  using A = accumulator<T>;
  ForwardBoxes<T> boxes = {};
  boxes.s = s, boxes.features = data<T>(features), boxes.rois = data<A>(rois), boxes.out = data<T>(out);
  if (s.boxes && forward_boxes(device, boxes, channels_last)) return;
  const int tile = static_cast<int>(std::min<int64_t>(kAnyTile, s.channels));
  const int tiles = static_cast<int>((s.channels + tile - 1) / tile);
  launch(device, &roi_crop_any<T>, s.batch * s.rois * tiles, kPointsAtOnce, kPointsAtOnce * sizeof(Point<A>),
         ForwardAny<T>{s, boxes.features, boxes.rois, boxes.out, tile, tiles, channels_last});
}

// Cuts the image into squares and the channels into tiles, so that a block's threads own a pixel and a slice
// of channels each.
template <class T>
void cut(Backward<T>& a) {
  using A = accumulator<T>;
  const CropShape& s = a.s;
  a.side_x = static_cast<int>(std::min<int64_t>(s.width, 32));
  a.side_y = static_cast<int>(std::min<int64_t>(s.height, kMostBackwardThreads / a.side_x));
  a.across = static_cast<int>((s.width + a.side_x - 1) / a.side_x);
  a.squares = a.d_features ? a.across * static_cast<int>((s.height + a.side_y - 1) / a.side_y) : 1;
  const int64_t all_slices = (s.channels + depth_of<T> - 1) / depth_of<T>;
  const int most = std::clamp(kMostBackwardThreads / (a.side_x * a.side_y), 1, 4);
  a.slices = static_cast<int>(std::min<int64_t>(most, all_slices));
  const auto row_bytes = [&] {
    return (a.slices * depth_of<T> + 1) * s.out_width * static_cast<int64_t>(sizeof(A));
  };
  while (a.slices > 1 && row_bytes() > kGradientBytes) --a.slices;
  a.tiles = static_cast<int>((all_slices + a.slices - 1) / a.slices);
  // Whole crops where at least one fits, else rows of one.
  const int64_t rows = std::max<int64_t>(1, kGradientBytes / row_bytes());
  a.band = static_cast<int>(std::min(rows, s.out_height));
  a.at_once = static_cast<int>(std::clamp<int64_t>(rows / s.out_height, 1, s.rois));
  const int points = a.at_once * a.band * static_cast<int>(s.out_width);
  a.stride_channel = a.channels_last ? 1 : points;
  a.stride_point = a.channels_last ? a.slices * depth_of<T> + 1 : 1;
}

template <class T, bool kBoxes>
void gradients(const Device& device, const Backward<T>& a) {
  const size_t shared = BackwardRoom<T, kBoxes>(a, nullptr).bytes;
  STD_TORCH_CHECK(shared <= kShared, "roi_crop: crops this wide, ", a.s.out_width,
                  ", have no room on the GPU in the backward pass");
  const int threads = (a.side_x * a.side_y * a.slices + 31) / 32 * 32;
  launch(device, &roi_crop_gradients<T, kBoxes>, a.s.batch * a.tiles * a.squares, threads, shared, a);
}

template <class T>
void backward(const Device& device, Backward<T> a, const Tensor& features, bool want_rois,
              const Tensor& grad_rois) {
  using A = accumulator<T>;
  cut(a);
  const int64_t regions = a.s.batch * a.s.rois;
  const Tensor terms =
      torch::stable::new_empty(features, {want_rois ? regions * a.tiles * kTerms : 0}, ScalarType::Double);
  if (want_rois) a.terms = data<double>(terms);
  a.s.boxes ? gradients<T, true>(device, a) : gradients<T, false>(device, a);
  if (!want_rois) return;
  launch(device, &roi_crop_finish<A>, (regions + kFinishThreads - 1) / kFinishThreads, kFinishThreads, 0,
         Finish<A>{a.s, a.terms, data<A>(grad_rois), a.tiles});
}

// Calls body with a value of the features' type.
template <class Body>
void dispatch(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float());
    case ScalarType::Double:
      return body(double());
    case ScalarType::BFloat16:
      return body(c10::BFloat16());
    case ScalarType::Half:
      return body(c10::Half());
    default:
      STD_TORCH_CHECK(false, "roi_crop: features must be float32, float64, bfloat16 or float16");
  }
}

// Regions in the type that the definition computes in.
Tensor as_computed(const Tensor& rois, ScalarType features) {
  const ScalarType computed = features == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(rois.scalar_type() == computed ? rois : torch::stable::to(rois, computed));
}

Tensor roi_crop(Tensor features, Tensor rois, int64_t out_height, int64_t out_width, bool align_corners) {
  const Device device(features.get_device_index());
  const CropShape s = shape_of(features, rois, out_height, out_width, align_corners);
  const bool channels_last = is_channels_last(features);
  if (!channels_last) features = torch::stable::contiguous(features);
  rois = as_computed(rois, features.scalar_type());
  Tensor out = channels_last
                   ? torch::stable::new_empty(features, {s.batch, s.rois, out_height, out_width, s.channels})
                   : torch::stable::new_empty(features, {s.batch, s.rois, s.channels, out_height, out_width});
  if (is_empty(s)) {
    torch::stable::zero_(out);
  } else {
    dispatch(features.scalar_type(), [&](auto element) {
      forward<decltype(element)>(device, s, features, rois, out, channels_last);
    });
  }
  if (!channels_last) return out;
  return torch::stable::transpose(torch::stable::transpose(out, 3, 4), 2, 3);  // (B, R, C, h, w)
}

std::tuple<Tensor, Tensor> roi_crop_backward(Tensor grad, Tensor features, Tensor rois, bool align_corners,
                                             int64_t needs) {
  const Device device(features.get_device_index());
  check_device("roi_crop_backward", "grad", grad, "features", features);
  STD_TORCH_CHECK(grad.dim() == 5, "roi_crop_backward: grad has a wrong rank");
  const CropShape s = shape_of(features, rois, grad.size(3), grad.size(4), align_corners);
  STD_TORCH_CHECK(grad.scalar_type() == features.scalar_type() && grad.size(0) == s.batch &&
                      grad.size(1) == s.rois && grad.size(2) == s.channels,
                  "roi_crop_backward: grad does not fit the features and the regions");
  const bool channels_last = is_channels_last(features);
  if (channels_last) {
    grad = torch::stable::transpose(torch::stable::transpose(grad, 2, 3), 3, 4);  // (B, R, h, w, C)
  } else {
    features = torch::stable::contiguous(features);
  }
  grad = torch::stable::contiguous(grad);
  const bool want_features = needs & kWantFeatures, want_rois = needs & kWantRois;
  const ScalarType given = rois.scalar_type();
  rois = as_computed(rois, features.scalar_type());
  Tensor grad_features =
      want_features ? torch::stable::empty_like(features) : torch::stable::new_empty(features, {0});
  Tensor grad_rois = want_rois ? torch::stable::empty_like(rois) : torch::stable::new_empty(rois, {0});
  if (is_empty(s) || !(want_features || want_rois)) {
    torch::stable::zero_(grad_features);
    torch::stable::zero_(grad_rois);
  } else {
    dispatch(features.scalar_type(), [&](auto element) {
      using T = decltype(element);
      Backward<T> a = {};
      a.s = s, a.grad = data<T>(grad), a.features = data<T>(features), a.channels_last = channels_last;
      a.rois = data<accumulator<T>>(rois);
      a.d_features = want_features ? data<T>(grad_features) : nullptr;
      backward(device, a, features, want_rois, grad_rois);
    });
  }
  if (given != grad_rois.scalar_type()) grad_rois = torch::stable::to(grad_rois, given);
  return {grad_features, grad_rois};
}

}  // namespace

#ifdef __CUDACC__
STABLE_TORCH_LIBRARY_IMPL(aufast, CUDA, m) {
#else  // the emulator's
STABLE_TORCH_LIBRARY_IMPL(aufast_emulator, CPU, m) {
#endif
  m.impl("roi_crop", TORCH_BOX(&roi_crop));
  m.impl("roi_crop_backward", TORCH_BOX(&roi_crop_backward));
}
